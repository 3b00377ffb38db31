#include "kernels/cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace tq {
namespace {

// How many forks lie between the process that loaded this library and this one. A process id would not do: a child in a
// new PID namespace can have its parent's.
std::atomic<int> generation_of_process{0};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { ++generation_of_process; });

}  // namespace

// The threads of one process, and what they share.
struct ThreadPool::State {
  const int process = generation_of_process;
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

  void run(int64_t count, void (*f)(void*, int64_t), void* with) {
    std::lock_guard call(call_mutex);
    {
      std::lock_guard lock(mutex);
      task = f;
      arg = with;
      num_tasks = count;
      next = 0;
      running = static_cast<int>(threads.size());
      ++generation;
    }
    start.notify_all();
    drain();
    std::unique_lock lock(mutex);
    done.wait(lock, [&] { return running == 0; });
  }

  explicit State(int num_threads) {
    try {
      for (int i = 1; i < num_threads; ++i) threads.emplace_back([this] { worker(); });
    } catch (...) {  // a thread that is not joined would end the process
      join();
      throw;
    }
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { join(); }

  void join() {
    {
      std::lock_guard lock(mutex);
      stop = true;
    }
    start.notify_all();
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  }
};

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), state_(new State(num_threads)) {}

// fork() copies the State and none of its threads, and whatever a thread of the parent held at that moment stays locked
// for ever. So a child leaves the State that it was born with alone, its memory included.
ThreadPool::~ThreadPool() {
  if (const State* s = state_; s->process == generation_of_process) delete s;
}

ThreadPool::State& ThreadPool::state() {
  State* s = state_;
  if (s->process == generation_of_process) return *s;
  auto made = std::make_unique<State>(num_threads_);
  // Another thread of this child may have been faster; then s is what it made.
  return state_.compare_exchange_strong(s, made.get()) ? *made.release() : *s;
}

ParallelFor ThreadPool::parallel_for() {
  return {num_threads_, this, [](void* context, int64_t num_tasks, void (*task)(void*, int64_t), void* arg) {
            static_cast<ThreadPool*>(context)->state().run(num_tasks, task, arg);
          }};
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return std::max(1u, std::thread::hardware_concurrency());
  return std::max(1, CPU_COUNT(&set));
}

}  // namespace tq
