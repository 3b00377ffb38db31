// dequant.cuh - decodes ranges of tokens of several sequences into the caller's K and V, and rotates vectors.
//
// Both are bound by memory: a warp starts all its loads before it decodes the first, and stores 16 bytes per lane so
// that neighbouring lanes fill whole 32-byte sectors. Lanes as in store.cuh.
#pragma once

#include "kernels/gpu/arguments.h"
#include "kernels/gpu/row_lanes.cuh"
#include "kernels/gpu/units.cuh"

namespace tq::gpu {

// One row of 16 * kLanes elements at most, element i of base onwards. A lane has 16 elements, which are 32 bytes of a
// 16-bit dtype: lanes are paired, and the pair stores first the lower lane's sector, then the upper's.
template <int kLanes>
TQ_DEVICE void store_row(Dtype dtype, void* base, int64_t i, int part, int dim, const float (&x)[16], bool vector,
                         bool valid) {
  if (dtype == Dtype::kF32 || !vector) {
    if (valid && 16 * part < dim) {
#pragma unroll
      for (int j = 0; j < 16; j += 4) {
        store_4(dtype, base, i + 16 * part + j, make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]), false);
      }
    }
    return;
  }
  uint32_t w[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    w[j] = dtype == Dtype::kF16 ? pack_half2(x[2 * j], x[2 * j + 1]) : pack_bfloat2(x[2 * j], x[2 * j + 1]);
  }
  const bool upper = (part & 1) != 0;
  uint32_t other[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) other[j] = shuffle_xor(upper ? w[j] : w[j + 4], 1);
  const uint4 first = upper ? make_uint4(other[0], other[1], other[2], other[3]) : make_uint4(w[0], w[1], w[2], w[3]);
  const uint4 second = upper ? make_uint4(w[4], w[5], w[6], w[7]) : make_uint4(other[0], other[1], other[2], other[3]);
  const int pair = 16 * (part & ~1), half = 8 * (part & 1);
  uint16_t* out = static_cast<uint16_t*>(base) + i + pair + half;
  if (valid && pair < dim) *reinterpret_cast<uint4*>(out) = first;
  if (valid && pair + 16 < dim) *reinterpret_cast<uint4*>(out + 16) = second;
}

// The last sequence that begins at or before a row; 0 if none does. Tables that do not ascend give some sequence.
TQ_DEVICE int sequence_of(const int32_t* start, int num_seqs, int row) {
  int lo = 0, hi = num_seqs;  // start[lo] <= row < start[hi], if the table ascends
  while (hi - lo > 1) {
    const int middle = (lo + hi) / 2;
    if (start[middle] <= row) {
      lo = middle;
    } else {
      hi = middle;
    }
  }
  return lo;
}

template <class F, int kLanes, int kWave>
TQ_KERNEL(kDequantThreads)
dequant_kernel(TQ_ARGUMENT(DequantArgs) p) {
  wait_for_previous_grid();
  constexpr int kVectors = kWave / kLanes, kUnroll = row_unroll(kLanes), kRows = kVectors * kUnroll;
  const DequantParams& d = p.dequant;
  const PageLayout& layout = d.cache.layout;
  const int lane = threadIdx.x % kWave, part = lane % kLanes;
  const int64_t warp = int64_t{blockIdx.x} * (kDequantThreads / kWave) + threadIdx.x / kWave;
  const int64_t group = warp / layout.num_kv_heads;
  const int head = static_cast<int>(warp - group * layout.num_kv_heads);
  const int64_t num_rows = min(d.num_tokens, int64_t{d.token_start_loc[d.num_seqs]});
  const int64_t capacity = int64_t{d.max_blocks_per_seq} * layout.block_size;
  if (group * kRows >= num_rows || capacity == 0) return;

  // Where the rows are. One search per warp; the few rows behind the first walk on from its sequence.
  int seq = sequence_of(d.token_start_loc, d.num_seqs, static_cast<int>(group * kRows));
  const uint8_t* atom[kUnroll];
  int t[kUnroll];
  bool valid[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t row = group * kRows + u * kVectors + lane / kLanes;
    while (seq + 1 < d.num_seqs && d.token_start_loc[seq + 1] <= row) ++seq;
    const int start = d.token_start_loc[seq];
    const int count = d.token_counts != nullptr ? d.token_counts[seq] : d.token_start_loc[seq + 1] - start;
    const int64_t at = row - start, token = d.first_tokens[seq] + at;
    valid[u] = row < num_rows && at >= 0 && at < count && token >= 0 && token < capacity;
    // What lies outside the sequence's blocks is no token, but all lanes load: without branches in between, all loads
    // are under way before the first is waited for.
    const int safe = valid[u] ? static_cast<int>(token) : 0;
    atom[u] = token_atom(d.cache, d.block_table + seq * d.block_table_stride, head, safe);
    t[u] = safe % kAtomTokens;
  }

  if (d.key_out != nullptr) {
    RawUnit<F::kKeyBits> unit[kUnroll];
    [[maybe_unused]] Half norm[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      unit[u].load(atom[u] + layout.key_row_offset(t[u]), part, layout.head_dim);
      if constexpr (F::kRotatesKeys) {
        norm[u] = *reinterpret_cast<const Half*>(atom[u] + layout.key_norm_offset(t[u]));
      }
    }
    const bool holds = 16 * part < layout.head_dim;
    const int block = hadamard_block_of(part, layout.head_dim);
    const float level = p.key_book.unit * rsqrtf(static_cast<float>(layout.head_dim));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[16];
      unit[u].template key_floats<F>(p.key_book, x);
      float factor = kFp8Scale;
      if constexpr (F::kRotatesKeys) {
        factor = half_value(norm[u]) * level;
        if (!d.keep_rotated) {
#pragma unroll
          for (int i = 0; i < 16; ++i) x[i] = holds ? x[i] : 0.0f;
          hadamard_lanes<kLanes>(x, part, block);
          factor *= rsqrtf(static_cast<float>(block));
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] *= factor;
      const int64_t row = group * kRows + u * kVectors + lane / kLanes;
      store_row<kLanes>(d.dtype, d.key_out, (row * layout.num_kv_heads + head) * layout.head_dim, part, layout.head_dim,
                        x, p.vector_out, valid[u]);
    }
  }
  if (d.value_out != nullptr) {
    RawUnit<F::kValueBits> unit[kUnroll];
    Half scale[kUnroll];
    [[maybe_unused]] Half zero[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      unit[u].load(atom[u] + layout.value_row_offset(t[u]), part, layout.head_dim_v);
      scale[u] = *reinterpret_cast<const Half*>(atom[u] + layout.value_scale_offset(t[u]));
      if constexpr (!F::kRotatesValues) {
        zero[u] = *reinterpret_cast<const Half*>(atom[u] + layout.value_zero_offset(t[u]));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[16];
      if constexpr (F::kRotatesValues) {
        const bool holds = 16 * part < layout.head_dim_v;
        const int block = hadamard_block_of(part, layout.head_dim_v);
        const float level = p.value_book.unit * rsqrtf(static_cast<float>(layout.head_dim_v));
        const float factor = half_value(scale[u]) * level * rsqrtf(static_cast<float>(block));
        unit[u].template value_floats<F>(p.value_book, holds ? factor : 0.0f, 0.0f, x);
        hadamard_lanes<kLanes>(x, part, block);
      } else {
        unit[u].template value_floats<F>(p.value_book, half_value(scale[u]), half_value(zero[u]), x);
      }
      if (d.dtype == Dtype::kF16) {  // of what is in range as it is stored, a sum may round up past it
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = fminf(fmaxf(x[i], -65504.0f), 65504.0f);
      }
      const int64_t row = group * kRows + u * kVectors + lane / kLanes;
      store_row<kLanes>(d.dtype, d.value_out, (row * layout.num_kv_heads + head) * layout.head_dim_v, part,
                        layout.head_dim_v, x, p.vector_out, valid[u]);
    }
  }
}

template <int kLanes, int kWave>
TQ_KERNEL(kRotateThreads)
rotate_kernel(TQ_ARGUMENT(RotateArgs) p) {
  wait_for_previous_grid();
  constexpr int kVectors = kWave / kLanes, kUnroll = row_unroll(kLanes);
  const RotateParams& r = p.rotate;
  const int lane = threadIdx.x % kWave, part = lane % kLanes;
  const int64_t warp = int64_t{blockIdx.x} * (kRotateThreads / kWave) + threadIdx.x / kWave;
  const int64_t count = r.num_tokens * r.num_heads;
  if (warp * kVectors * kUnroll >= count) return;
  const bool holds = 16 * part < r.head_dim;
  int64_t from[kUnroll], to[kUnroll];
  bool valid[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t vector = (warp * kUnroll + u) * kVectors + lane / kLanes;
    valid[u] = vector < count;
    const int64_t safe = valid[u] ? vector : count - 1;
    const int64_t token = safe / r.num_heads, head = safe - token * r.num_heads;
    from[u] = token * r.x_token_stride + head * r.x_head_stride + (holds ? 16 * part : 0);
    to[u] = token * r.out_token_stride + head * r.out_head_stride;
  }
  uint32_t words[kUnroll][8];
  if (p.vector_x) {  // all loads before the first is waited for, as above
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load_words(words[u], static_cast<const uint16_t*>(r.x) + from[u]);
  }
  const int block = hadamard_block_of(part, r.head_dim);
  const float factor = rsqrtf(static_cast<float>(block));
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    float x[16];
    if (p.vector_x) {
      widen_16(x, r.dtype, words[u]);
    } else {
      load_16(x, r.dtype, r.x, from[u], false);
    }
    if (r.rotates) {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = holds ? x[i] : 0.0f;
      hadamard_lanes<kLanes>(x, part, block);
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] *= factor;
    }
    store_row<kLanes>(r.dtype, r.out, to[u], part, r.head_dim, x, p.vector_out, valid[u]);
  }
}

}  // namespace tq::gpu
