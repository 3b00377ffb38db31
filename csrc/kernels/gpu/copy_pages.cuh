// copy_pages.cuh - copies whole pages. Grid: (pairs, parts of a page).
#pragma once

#include "kernels/gpu/arguments.h"
#include "kernels/gpu/target.h"

namespace tq::gpu {

// A template only so that every file that includes this may have it.
template <int kThreads>
TQ_KERNEL(kThreads)
copy_pages_kernel(TQ_ARGUMENT(CopyParams) p) {
  wait_for_previous_grid();
  const int64_t from = p.src_dst[2 * blockIdx.x], to = p.src_dst[2 * blockIdx.x + 1];
  if (from < 0 || to < 0 || from >= p.cache.num_blocks || to >= p.cache.num_blocks) return;
  const auto* source = reinterpret_cast<const uint4*>(p.cache.data + from * p.cache.block_stride);
  auto* target = reinterpret_cast<uint4*>(p.cache.data + to * p.cache.block_stride);
  const int64_t count = p.cache.layout.page_bytes() / 16;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.y} * blockDim.x) {
    target[i] = source[i];
  }
}

}  // namespace tq::gpu
