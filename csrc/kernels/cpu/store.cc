// store.cc - hands the tokens of store, dequantize, rotate and copy calls to the threads.
#include <algorithm>
#include <cstring>

#include "kernels/cpu/device.h"
#include "kernels/cpu/store_task.h"

namespace tq {
namespace {

constexpr int64_t kTokensPerTask = 8;  // enough work to be worth a hand-over between threads

template <class F>
void for_each_token(const ParallelFor& pool, int64_t num_tokens, F&& f) {
  for_each_index(pool, (num_tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t, int64_t task) {
    const int64_t end = std::min(num_tokens, (task + 1) * kTokensPerTask);
    for (int64_t token = task * kTokensPerTask; token < end; ++token) f(token);
  });
}

}  // namespace

KernelStatus cpu_store_kv(DeviceState* state, const StoreParams& p) {
  for_each_token(state->parallel_for, p.num_tokens, [&](int64_t token) { run_store_task(p, token); });
  state->store_calls += 1;
  state->stored_tokens += static_cast<uint64_t>(
      std::count_if(p.slot_mapping, p.slot_mapping + p.num_tokens, [](int64_t slot) { return slot >= 0; }));
  return {0, ""};
}

KernelStatus cpu_dequant_kv(DeviceState* state, const DequantParams& p) {
  if (p.num_seqs == 0) return {0, ""};
  const int32_t* start = p.token_start_loc;
  for_each_token(state->parallel_for, start[p.num_seqs], [&](int64_t row) {
    // The last sequence that begins at or before the row: empty ones end where it begins.
    const auto s = static_cast<int>(std::upper_bound(start, start + p.num_seqs, row) - start) - 1;
    const int64_t at = row - start[s];
    if (p.token_counts == nullptr || at < p.token_counts[s]) run_dequant_task(p, s, p.first_tokens[s] + at, row);
  });
  return {0, ""};
}

KernelStatus cpu_rotate(DeviceState* state, const RotateParams& p) {
  for_each_token(state->parallel_for, p.num_tokens, [&](int64_t token) { run_rotate_task(p, token); });
  return {0, ""};
}

// In the order of the list, on one thread: a later pair may read what an earlier one wrote.
KernelStatus cpu_copy_pages(DeviceState*, const CopyParams& p) {
  for (int64_t i = 0; i < p.num_pairs; ++i) {
    const uint8_t* src = p.cache.data + p.src_dst[2 * i] * p.cache.block_stride;
    uint8_t* dst = p.cache.data + p.src_dst[2 * i + 1] * p.cache.block_stride;
    std::memmove(dst, src, static_cast<size_t>(p.cache.layout.page_bytes()));
  }
  return {0, ""};
}

}  // namespace tq
