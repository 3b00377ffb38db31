// dequant.cuh - decodes tokens of one sequence into the caller's K and V, and copies pages.
#pragma once

#include "kernels/cuda/row_lanes.cuh"
#include "kernels/cuda/units.cuh"

namespace tq::cuda {

struct DequantArgs {
  DequantParams dequant;
  DeviceBook book;
};

constexpr int kDequantThreads = 128;

TQ_DEVICE void store_16(Dtype dtype, void* base, int64_t i, const float (&x)[16]) {
#pragma unroll
  for (int j = 0; j < 16; j += 4) {
    store_4(dtype, base, i + j, make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]), true);
  }
}

// Lanes as in store.cuh.
template <class F, int kLanes>
__global__ void __launch_bounds__(kDequantThreads) dequant_kernel(const __grid_constant__ DequantArgs p) {
  wait_for_previous_grid();
  constexpr int kVectors = 32 / kLanes;
  const DequantParams& d = p.dequant;
  const PageLayout& layout = d.cache.layout;
  const int lane = threadIdx.x % 32, part = lane % kLanes;
  const int64_t warp = int64_t{blockIdx.x} * (kDequantThreads / 32) + threadIdx.x / 32;
  const int64_t group = warp / layout.num_kv_heads;
  const int head = static_cast<int>(warp - group * layout.num_kv_heads);
  if (group * kVectors >= d.num_tokens) return;
  const int64_t token = min(group * kVectors + lane / kLanes, d.num_tokens - 1);  // the last one may come twice
  const int64_t at = d.first_token + token;
  const uint8_t* atom = token_atom(d.cache, d.block_table, head, static_cast<int>(at));
  const int row = static_cast<int>(at % kAtomTokens);
  if (d.key_out != nullptr) {
    RawUnit<F::kKeyBits> unit;
    unit.load(atom + layout.key_row_offset(row), part, layout.head_dim);
    float x[16];
    unit.key_floats(p.book, x);
    const bool holds = 16 * part < layout.head_dim;
    float factor = kFp8Scale;
    if constexpr (F::kKeyBits != 8) {
      const int block = hadamard_block_of(part, layout.head_dim);
      factor =
          load_half(atom + layout.key_norm_offset(row)) * p.book.unit * rsqrtf(static_cast<float>(layout.head_dim));
      if (!d.keep_rotated) {
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = holds ? x[i] : 0.0f;
        hadamard_lanes<kLanes>(x, part, block);
        factor *= rsqrtf(static_cast<float>(block));
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= factor;
    if (holds) {
      store_16(d.dtype, d.key_out, (token * layout.num_kv_heads + head) * layout.head_dim + 16 * part, x);
    }
  }
  if (d.value_out != nullptr && 16 * part < layout.head_dim_v) {
    RawUnit<F::kValueBits> unit;
    unit.load(atom + layout.value_row_offset(row), part, layout.head_dim_v);
    float x[16];
    unit.value_floats(load_half(atom + layout.value_scale_offset(row)), load_half(atom + layout.value_zero_offset(row)),
                      x);
    store_16(d.dtype, d.value_out, (token * layout.num_kv_heads + head) * layout.head_dim_v + 16 * part, x);
  }
}

}  // namespace tq::cuda
