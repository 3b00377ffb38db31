// store.cc - hands the tokens of store, dequantize, rotate and copy calls to the threads.
#include <algorithm>
#include <cstring>
#include <vector>

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
  // Tokens and not rows are gone through: a caller's rows may be many more, up to 2^31.
  std::vector<int64_t> before(static_cast<size_t>(p.num_seqs) + 1, 0);  // tokens of the sequences before each
  for (int s = 0; s < p.num_seqs; ++s) {
    before[s + 1] = before[s] + (p.token_counts == nullptr ? start[s + 1] - start[s] : p.token_counts[s]);
  }
  for_each_token(state->parallel_for, before.back(), [&](int64_t token) {
    // The last sequence that begins at or before the token: empty ones end where it begins.
    const auto s = static_cast<int>(std::upper_bound(before.begin(), before.end() - 1, token) - before.begin()) - 1;
    const int64_t at = token - before[s];
    run_dequant_task(p, s, p.first_tokens[s] + at, start[s] + at);
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
