#include "kernels/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace tq {

struct ThreadPool::State {
  std::mutex call_mutex;  // one parallel_for at a time
  std::mutex mutex;
  std::condition_variable start;
  std::condition_variable done;
  std::vector<std::thread> threads;
  uint64_t generation = 0;
  int running = 0;
  bool stop = false;
  void (*task)(void*, int64_t) = nullptr;
  void* arg = nullptr;
  int64_t num_tasks = 0;
  std::atomic<int64_t> next{0};

  void drain() {
    for (int64_t i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) task(arg, i);
  }

  void worker() {
    uint64_t seen = 0;
    for (;;) {
      std::unique_lock lock(mutex);
      start.wait(lock, [&] { return stop || generation != seen; });
      if (stop) return;
      seen = generation;
      lock.unlock();
      drain();
      lock.lock();
      if (--running == 0) done.notify_one();
    }
  }

  static void run(void* context, int64_t num_tasks, void (*task)(void*, int64_t), void* arg) {
    State& s = *static_cast<State*>(context);
    std::lock_guard call(s.call_mutex);
    {
      std::lock_guard lock(s.mutex);
      s.task = task;
      s.arg = arg;
      s.num_tasks = num_tasks;
      s.next = 0;
      s.running = static_cast<int>(s.threads.size());
      ++s.generation;
    }
    s.start.notify_all();
    s.drain();
    std::unique_lock lock(s.mutex);
    s.done.wait(lock, [&] { return s.running == 0; });
  }
};

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
  for (int i = 1; i < num_threads; ++i) state_->threads.emplace_back([s = state_.get()] { s->worker(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->start.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

ParallelFor ThreadPool::parallel_for() {
  return {static_cast<int>(state_->threads.size()) + 1, state_.get(), &State::run};
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return std::max(1u, std::thread::hardware_concurrency());
  return std::max(1, CPU_COUNT(&set));
}

}  // namespace tq
