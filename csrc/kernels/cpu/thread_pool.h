// thread_pool.h - the library's own threads, for callers that bring none: one per usable core, idle until called.
#pragma once

#include <memory>

#include "kernels/kernels.h"

namespace tq {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // the calling thread is one of them
  ~ThreadPool();
  ParallelFor parallel_for();  // valid as long as the pool; calls from several threads take turns

 private:
  struct State;
  std::unique_ptr<State> state_;
};

int usable_cores();  // of this process, by its affinity mask; at least 1

}  // namespace tq
