// thread_pool.h - the library's own threads, for callers that bring none: one per usable core, idle until called.
#pragma once

#include <atomic>

#include "kernels/kernels.h"

namespace tq {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // the calling thread is one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Valid as long as the pool; calls from several threads take turns. A child process may use the pool that it has from
  // before the fork: it starts threads of its own.
  ParallelFor parallel_for();

 private:
  struct State;
  State& state();

  int num_threads_;
  std::atomic<State*> state_;
};

int usable_cores();  // of this process, by its affinity mask; at least 1

}  // namespace tq
