// device.h - the state of one CPU backend: its threads and its counters.
#pragma once

#include <atomic>
#include <memory>

#include "kernels/cpu/thread_pool.h"
#include "kernels/kernels.h"

namespace tq {

struct DeviceState {
  std::unique_ptr<ThreadPool> pool;  // null if the caller brought threads
  ParallelFor parallel_for;
  std::atomic<uint64_t> store_calls{0};
  std::atomic<uint64_t> stored_tokens{0};
  std::atomic<uint64_t> attend_calls{0};
  std::atomic<uint64_t> query_tokens{0};
  std::atomic<uint64_t> compressed_kv_reads{0};
};

// Calls f(worker, i) for i in [0, count). Work is handed out one index at a time whatever the caller's pool does,
// because causal tiles differ in length. worker is in [0, parallel_for.num_threads).
template <class F>
void for_each_index(const ParallelFor& pool, int64_t count, F&& f) {
  struct Shared {
    F* f;
    std::atomic<int64_t> next{0};
    int64_t count;
  } shared{&f, {}, count};
  const int64_t workers = count < pool.num_threads ? count : pool.num_threads;
  if (workers <= 0) return;
  if (workers == 1) {
    for (int64_t i = 0; i < count; ++i) f(0, i);
    return;
  }
  pool.run(
      pool.context, workers,
      [](void* arg, int64_t worker) {
        Shared& s = *static_cast<Shared*>(arg);
        for (int64_t i = s.next.fetch_add(1); i < s.count; i = s.next.fetch_add(1)) (*s.f)(worker, i);
      },
      &shared);
}

uint64_t cpu_workspace_size(const DeviceState* state, const PageLayout& layout, int num_heads);
KernelStatus cpu_store_kv(DeviceState* state, const StoreParams& params);
KernelStatus cpu_attend(DeviceState* state, const AttendParams& params);
KernelStatus cpu_dequant_kv(DeviceState* state, const DequantParams& params);
KernelStatus cpu_copy_pages(DeviceState* state, const CopyParams& params);
KernelStatus cpu_rotate(DeviceState* state, const RotateParams& params);

}  // namespace tq
