// prefill.cuh - attention of many query tokens per sequence over compressed pages, any feature, any architecture: tiles
// of K and V are decoded into shared memory as fp16 once for all query rows of a CTA, then multiplied as in
// FlashAttention-2 (arXiv 2307.08691).
//
// A query row is (token, head of the KV head's group), token-major. Keys stay rotated; queries are rotated on load and
// scaled to a largest element of 1, so fp16 holds them whatever their size.
#pragma once

#include "kernels/cuda/arch/mma.cuh"
#include "kernels/gpu/codes.cuh"
#include "kernels/gpu/elements.cuh"
#include "kernels/gpu/row_lanes.cuh"
#include "kernels/gpu/scores.cuh"
#include "kernels/gpu/units.cuh"

namespace tq::cuda {

struct PrefillParams {
  AttendParams attend;
  DeviceBook key_book, value_book;
  int min_query_len;  // shorter sequences are the decode kernel's
  bool vector_query;
};

// kRowGroups * 16 query rows; each group's outputs are shared by kValueParts warps.
template <class F_, int kDim_, int kRowGroups_, int kValueParts_, int kTokens_>
struct PrefillConfig {
  using F = F_;
  static constexpr int kDim = kDim_, kRowGroups = kRowGroups_, kValueParts = kValueParts_, kTokens = kTokens_;
  static constexpr int kThreads = 32 * kRowGroups * kValueParts;
  static constexpr int kRows = 16 * kRowGroups;
  static constexpr int kPitch = kDim + 8;  // fp16; rows a bank group apart
  static constexpr int kUnits = kDim / 16;
  static constexpr int kUnitsPerThread = kTokens * kUnits / kThreads;
  static constexpr int kPartDim = kDim / kValueParts;
  static_assert(kTokens * kUnits % kThreads == 0 && kTokens % 16 == 0 && kPartDim % 16 == 0);
};

// A CTA's shared memory.
template <class C>
struct PrefillShared {
  __half query[C::kRows * C::kPitch];
  __half keys[C::kTokens * C::kPitch];
  __half values[C::kTokens * C::kPitch];
  float norms[C::kTokens];
  float units[C::kRows];
};

struct PrefillTile {
  int seq, q_start, q_len, len, row0;  // row0: first packed row of the sequence
};

// The query tile of a CTA, or false if there are fewer.
template <int kRows>
TQ_DEVICE bool find_prefill_tile(const PrefillParams& p, int target, int group, int lane, PrefillTile& out) {
  const AttendParams& a = p.attend;
  for (int base = 0; base < a.num_seqs; base += 32) {
    const int s = base + lane;
    int tiles = 0;
    if (s < a.num_seqs) {
      const int q_len = a.query_start_loc[s + 1] - a.query_start_loc[s];
      if (q_len >= p.min_query_len) tiles = (q_len * group + kRows - 1) / kRows;
    }
    int end = tiles;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int below = __shfl_up_sync(kFullMask, end, o);
      if (lane >= o) end += below;
    }
    const unsigned past = __ballot_sync(kFullMask, end > target);
    if (past != 0) {
      const int owner = __ffs(past) - 1;
      out.seq = base + owner;
      out.q_start = a.query_start_loc[out.seq];
      out.q_len = a.query_start_loc[out.seq + 1] - out.q_start;
      out.len = a.seq_lens[out.seq];
      out.row0 = (target - __shfl_sync(kFullMask, end - tiles, owner)) * kRows;
      return true;
    }
    target -= __shfl_sync(kFullMask, end, 31);
  }
  return false;
}

// Rotates the tile's query rows into shared memory as fp16; unit[n]: what a score of row n has to be multiplied with.
template <class C>
TQ_DEVICE void load_prefill_query(const PrefillParams& p, const PrefillTile& tile, int head, int group, __half* query,
                                  float* unit) {
  constexpr int kLanes = C::kDim / 16;
  constexpr bool kRotated = C::F::kRotatesKeys;
  const AttendParams& a = p.attend;
  const int lane = threadIdx.x % 32, part = lane % kLanes;
  const int dim = a.cache.layout.head_dim;
  const int block = hadamard_block_of(part, dim);
  for (int n = threadIdx.x / kLanes; n < C::kRows; n += C::kThreads / kLanes) {
    const int row = tile.row0 + n;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = 0.0f;
    if (row < tile.q_len * group && 16 * part < dim) {
      const int64_t at =
          (tile.q_start + row / group) * a.query_token_stride + (head * group + row % group) * a.query_head_stride;
      load_16(x, a.dtype, a.query, at + 16 * part, p.vector_query);
    }
    if constexpr (kRotated) {
      hadamard_lanes<kLanes>(x, part, block);
      const float norm = rsqrtf(static_cast<float>(block));
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] *= norm;
    }
    float largest = 0.0f;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      largest = fmaxf(largest, fabsf(x[i]));
      finite = finite && fabsf(x[i]) <= 3e38f;
    }
    largest = reduce_row<kLanes>(largest, [](float u, float v) { return fmaxf(u, v); });
    finite = reduce_row<kLanes>(finite ? 1 : 0, [](int u, int v) { return u & v; }) != 0;
    const float to_one = finite && largest > 0.0f ? 1.0f / largest : 0.0f;
    auto* to = reinterpret_cast<uint32_t*>(query + n * C::kPitch + 16 * part);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = pack_half2(x[2 * i] * to_one, x[2 * i + 1] * to_one);
    if (part == 0) {
      const float levels = kRotated ? p.key_book.unit * rsqrtf(static_cast<float>(dim)) : kFp8Scale;
      unit[n] = finite ? a.scale * kLog2e * largest * levels : __int_as_float(0x7fc00000);
    }
  }
}

// The packed units of K and V of a tile that one thread decodes, on their way through registers.
template <class C>
struct PrefillUnits {
  RawUnit<C::F::kKeyBits> key[C::kUnitsPerThread];
  RawUnit<C::F::kValueBits> value[C::kUnitsPerThread];
  float norm[C::kUnitsPerThread], scale[C::kUnitsPerThread], zero[C::kUnitsPerThread];

  TQ_DEVICE void load(const PagedCache& cache, const int32_t* table, int head, int token0, int len) {
    const PageLayout& layout = cache.layout;
#pragma unroll
    for (int i = 0; i < C::kUnitsPerThread; ++i) {
      const int index = threadIdx.x + i * C::kThreads;
      const int unit = index % C::kUnits;
      const int token = min(token0 + index / C::kUnits, len - 1);  // beyond the end: masked
      const uint8_t* atom = token_atom(cache, table, head, token);
      const int row = token % kAtomTokens;
      key[i].load(atom + layout.key_row_offset(row), unit, layout.head_dim);
      value[i].load(atom + layout.value_row_offset(row), unit, layout.head_dim_v);
      norm[i] = C::F::kRotatesKeys ? load_half(atom + layout.key_norm_offset(row)) : 1.0f;
      scale[i] = load_half(atom + layout.value_scale_offset(row));
      if constexpr (!C::F::kRotatesValues) zero[i] = load_half(atom + layout.value_zero_offset(row));
    }
  }

  TQ_DEVICE void decode(const PrefillParams& p, __half* keys, __half* values, float* norms) const {
#pragma unroll
    for (int i = 0; i < C::kUnitsPerThread; ++i) {
      const int index = threadIdx.x + i * C::kThreads;
      const int unit = index % C::kUnits, token = index / C::kUnits;
      uint32_t h[8];
      key[i].template key_halves<typename C::F>(p.key_book, h);
      auto* to = reinterpret_cast<uint4*>(keys + token * C::kPitch + 16 * unit);
      to[0] = make_uint4(h[0], h[1], h[2], h[3]);
      to[1] = make_uint4(h[4], h[5], h[6], h[7]);
      if constexpr (C::F::kRotatesValues) {
        const float level = p.value_book.unit * rsqrtf(static_cast<float>(p.attend.cache.layout.head_dim_v));
        value[i].template value_halves<typename C::F>(p.value_book, scale[i] * level, 0.0f, h);
      } else {
        value[i].template value_halves<typename C::F>(p.value_book, scale[i], zero[i], h);
      }
      to = reinterpret_cast<uint4*>(values + token * C::kPitch + 16 * unit);
      to[0] = make_uint4(h[0], h[1], h[2], h[3]);
      to[1] = make_uint4(h[4], h[5], h[6], h[7]);
      if (unit == 0) norms[token] = norm[i];
    }
  }
};

// Rotates the outputs of all rows back, but for the factor rotation_norm(); by the whole CTA, whose shared memory is
// free. A row's dimensions lie in the accumulators of four lanes, and of a warp for each part.
template <class C>
TQ_DEVICE void rotate_outputs(float (&out)[C::kPartDim / 8][4], int part, int dim, float* shared) {
  constexpr int kTiles = C::kPartDim / 8;  // of 8 dimensions
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const float x = out[i][j], y = out[i][j + 1];
      out[i][j] = x + y, out[i][j + 1] = x - y;
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float other = __shfl_xor_sync(kFullMask, out[i][j], o);
        out[i][j] = (t & o) != 0 ? other - out[i][j] : out[i][j] + other;
      }
    }
  }
#pragma unroll
  for (int o = 1; o < kTiles; o <<= 1) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if ((i & o) != 0 || !rotates_over(part * C::kPartDim + 8 * i, 8 * o, dim)) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = out[i][j], y = out[i + o][j];
        out[i][j] = x + y, out[i + o][j] = x - y;
      }
    }
  }
  if constexpr (C::kValueParts > 1) {
    constexpr int kAtOnce = 8;  // tiles
    static_assert(kTiles % kAtOnce == 0 && sizeof(float4) * kAtOnce * C::kThreads <= sizeof(PrefillShared<C>));
    auto* exchange = reinterpret_cast<float4*>(shared);  // [tile][thread]
#pragma unroll
    for (int o = 1; o < C::kValueParts; o <<= 1) {  // the warp of part ^ o is o warps away
      const bool takes = rotates_over(part * C::kPartDim, C::kPartDim * o, dim), upper = (part & o) != 0;
#pragma unroll
      for (int first = 0; first < kTiles; first += kAtOnce) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float (&x)[4] = out[first + i];
          exchange[i * C::kThreads + threadIdx.x] = make_float4(x[0], x[1], x[2], x[3]);
        }
        __syncthreads();
        if (!takes) continue;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float4 other = exchange[i * C::kThreads + (threadIdx.x ^ (32 * o))];
          float (&x)[4] = out[first + i];
          x[0] = upper ? other.x - x[0] : x[0] + other.x, x[1] = upper ? other.y - x[1] : x[1] + other.y;
          x[2] = upper ? other.z - x[2] : x[2] + other.z, x[3] = upper ? other.w - x[3] : x[3] + other.w;
        }
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads) prefill_kernel(const __grid_constant__ PrefillParams p) {
  wait_for_previous_grid();
  extern __shared__ __align__(128) uint8_t smem[];
  auto& shared = *reinterpret_cast<PrefillShared<C>*>(smem);
  __half *query = shared.query, *keys = shared.keys, *values = shared.values;
  float *norms = shared.norms, *units = shared.units;
  const AttendParams& a = p.attend;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane >> 2, t = lane & 3;
  const int head = blockIdx.y, group = a.num_heads / a.cache.layout.num_kv_heads;
  const int row_group = warp / C::kValueParts, part = warp % C::kValueParts;

  PrefillTile tile;
  if (!find_prefill_tile<C::kRows>(p, blockIdx.x, group, lane, tile)) return;
  const int num_rows = min(C::kRows, tile.q_len * group - tile.row0);
  const int context = tile.len - tile.q_len;
  const int low = context + tile.row0 / group, high = context + (tile.row0 + num_rows - 1) / group;
  const int32_t* spans = a.spans == nullptr ? nullptr : a.spans + int64_t{tile.seq} * a.max_spans * 2;
  int begin = 0, end = tile.len;
  if (spans == nullptr) {
    if (a.causal) end = min(end, high + 1);
    if (a.sliding_window > 0) begin = max(0, low - a.sliding_window + 1) / C::kTokens * C::kTokens;
  }
  const bool modified = a.soft_cap > 0.0f || a.alibi_slopes != nullptr;

  const int32_t* table = a.block_table + tile.seq * a.block_table_stride;
  PrefillUnits<C> next;
  if (begin < end) next.load(a.cache, table, head, begin, tile.len);
  load_prefill_query<C>(p, tile, head, group, query, units);

  // This lane's rows r and r + 8 of its group.
  int position[2];
  float slope[2], unit[2], reference[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
  float out[C::kPartDim / 8][4];
#pragma unroll
  for (int i = 0; i < C::kPartDim / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = min(tile.row0 + 16 * row_group + r + 8 * h, tile.q_len * group - 1);
    position[h] = context + row / group;
    slope[h] = a.alibi_slopes != nullptr ? a.alibi_slopes[head * group + row % group] : 0.0f;
  }

  for (int token0 = begin; token0 < end; token0 += C::kTokens) {
    next.decode(p, keys, values, norms);
    __syncthreads();  // also: the query is there
    if (token0 + C::kTokens < end) next.load(a.cache, table, head, token0 + C::kTokens, tile.len);

    float s[C::kTokens / 8][4];
#pragma unroll
    for (int i = 0; i < C::kTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i][j] = 0.0f;
    }
    const __half* query_rows = query + (16 * row_group + lane % 16) * C::kPitch + lane / 16 * 8;
    const __half* key_rows = keys + (lane % 8 + lane / 16 * 8) * C::kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      uint32_t q[4];
      load_matrix_x4(q, query_rows + 16 * k);
#pragma unroll
      for (int i = 0; i < C::kTokens / 16; ++i) {
        uint32_t b[4];
        load_matrix_x4(b, key_rows + 16 * i * C::kPitch + 16 * k);
        mma_f16(s[2 * i], q[0], q[1], q[2], q[3], b[0], b[1]);
        mma_f16(s[2 * i + 1], q[0], q[1], q[2], q[3], b[2], b[3]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) unit[h] = units[16 * row_group + r + 8 * h];
    const bool masked = token0 + C::kTokens > tile.len || spans != nullptr ||
                        (a.causal && token0 + C::kTokens - 1 > low) ||
                        (a.sliding_window > 0 && token0 <= high - a.sliding_window);
    float top[2] = {reference[0], reference[1]};
#pragma unroll
    for (int i = 0; i < C::kTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int h = j >> 1, token = token0 + 8 * i + 2 * t + (j & 1);
        float x = s[i][j] * norms[8 * i + 2 * t + (j & 1)] * unit[h];
        if (modified) x = modify_score(x, a.soft_cap, slope[h], token - position[h]);
        if (masked &&
            (token >= tile.len || !visible(position[h], token, a.causal, a.sliding_window, spans, a.max_spans))) {
          x = kMasked;
        }
        s[i][j] = x;
        top[h] = fmaxf(top[h], x);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 2));
      const float f = exp2_approx(reference[h] - top[h]);
      reference[h] = top[h];
      sum[h] *= f;
#pragma unroll
      for (int i = 0; i < C::kPartDim / 8; ++i) {
        out[i][2 * h] *= f;
        out[i][2 * h + 1] *= f;
      }
    }
    const __half* value_rows = values + (lane % 16) * C::kPitch + part * C::kPartDim + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < C::kTokens / 16; ++k) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float u = exp2_approx(s[2 * k + i][2 * h] - reference[h]);
          const float v = exp2_approx(s[2 * k + i][2 * h + 1] - reference[h]);
          sum[h] += u + v;
          w[2 * i + h] = pack_half2(u, v);
        }
      }
#pragma unroll
      for (int i = 0; i < C::kPartDim / 16; ++i) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, value_rows + 16 * k * C::kPitch + 16 * i);
        mma_f16(out[2 * i], w[0], w[1], w[2], w[3], b[0], b[1]);
        mma_f16(out[2 * i + 1], w[0], w[1], w[2], w[3], b[2], b[3]);
      }
    }
    __syncthreads();
  }

  const int dim_v = a.cache.layout.head_dim_v;
  if constexpr (C::F::kRotatesValues) rotate_outputs<C>(out, part, dim_v, reinterpret_cast<float*>(smem));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(kFullMask, sum[h], 1);
    sum[h] += __shfl_xor_sync(kFullMask, sum[h], 2);
    const int row = tile.row0 + 16 * row_group + r + 8 * h;
    if (row >= tile.q_len * group) continue;
    const int64_t token = tile.q_start + row / group;
    const int query_head = head * group + row % group;
    const float f = a.sinks != nullptr ? add_sink(a.sinks[query_head], reference[h], sum[h]) : 1.0f;
    const float scale = sum[h] == 0.0f ? 0.0f : f / sum[h];
#pragma unroll
    for (int i = 0; i < C::kPartDim / 8; ++i) {
      const int d = part * C::kPartDim + 8 * i + 2 * t;
      if (d >= dim_v) continue;
      const float factor = C::F::kRotatesValues ? scale * rotation_norm(d, dim_v) : scale;
      const int64_t at = token * a.out_token_stride + query_head * a.out_head_stride + d;
      store_element(a.dtype, a.out, at, out[i][2 * h] * factor);
      store_element(a.dtype, a.out, at + 1, out[i][2 * h + 1] * factor);
    }
    if (a.lse != nullptr && part == 0 && t == 0) {
      a.lse[token * a.num_heads + query_head] = natural_lse(reference[h], sum[h], log2f(sum[h]));
    }
  }
}

}  // namespace tq::cuda
