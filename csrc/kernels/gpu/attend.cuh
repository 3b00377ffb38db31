// attend.cuh - attention over compressed pages for any number of query tokens and any feature, on devices whose matrix
// unit multiplies 16 x 16 x 16 in fp16 (the target's matrix operation; FlashAttention-2, arXiv 2307.08691).
//
// A block has 16 query columns of one KV head: a column is (token, head of the KV head's group), token-major. Its warps
// take turns at tiles of 16 tokens, which are one atom of a page each, and meet once, at the end. With few columns the
// context is also split over blocks, whose partial results merge_kernel joins. Nothing depends on the order in which
// blocks run, so results repeat bit for bit.
//
//   scores    S[token][column] = K Q^T: a lane decodes its token's codes in registers.
//   outputs   O[dimension][column] = V^T P^T: a column stays in the lanes that hold its scores, so the softmax's
//   factors
//             are at hand; V is transposed on its way through shared memory.
//
// Keys stay rotated; queries are rotated on load and scaled to a largest element of 1, so that fp16 holds them whatever
// their size.
#pragma once

#include "kernels/gpu/arguments.h"
#include "kernels/gpu/elements.cuh"
#include "kernels/gpu/row_lanes.cuh"
#include "kernels/gpu/scores.cuh"
#include "kernels/gpu/units.cuh"

namespace tq::gpu {

constexpr float kLowest = -1e30f;  // a softmax reference before the first score
// Weights are up to 2^12 and not 1: the matrix unit of gfx90a takes fp16 numbers below 2^-14 for 0, and many small
// weights are a large one together.
constexpr float kHeadroom = 12.0f;

template <class F_, int kDim_, int kWave_>
struct AttendConfig {
  using F = F_;
  static constexpr int kDim = kDim_, kWave = kWave_;
  static constexpr int kThreads = kAttendWarps * kWave;
  static constexpr int kPartDim = kDim < max_part_dim(kWave) ? kDim : max_part_dim(kWave);
  static constexpr int kParts = kDim / kPartDim;
  static constexpr int kGroups = 16 / kRun;                       // lanes that share a token decode different units
  static constexpr int kSteps = kDim / 16 / kGroups;              // of a dot product
  static constexpr int kSlice = kPartDim < 128 ? kPartDim : 128;  // dimensions of V in shared memory at a time
  static constexpr int kQueryPitch = kDim / 2 + 4;                // words
  static constexpr int kValuePitch = 10;  // words: 16 tokens, and rows of 8 bytes on other banks
};

struct ColumnTile {
  int seq, q_start, q_len, len, row0;  // seq -1: there is none; row0: first column, of the sequence's
};

template <class C>
struct AttendShared {
  alignas(16) uint32_t query[kColumns][C::kQueryPitch];  // pairs of fp16
  float unit[kColumns];                                  // what a score of the column has to be multiplied with
  float top[kAttendWarps][kColumns], sum[kAttendWarps][kColumns];
  ColumnTile tile;
  union {
    alignas(16) uint32_t value[kAttendWarps][C::kSlice * C::kValuePitch];  // [dimension][token], pairs of fp16
    float out[kColumns][C::kPartDim + 1];
  };
};

// The block's columns: the target-th tile of all sequences' columns. One warp searches, sequences side by side.
template <int kWave>
TQ_DEVICE void find_columns(const AttendParams& a, int target, int group, ColumnTile& out) {
  const int lane = threadIdx.x % kWave;
  if (threadIdx.x / kWave == 0) {
    if (lane == 0) out.seq = -1;
    sync_wave();
    for (int base = 0; base < a.num_seqs; base += kWave) {
      const int s = base + lane;
      int tiles = 0;
      if (s < a.num_seqs) {
        tiles = ((a.query_start_loc[s + 1] - a.query_start_loc[s]) * group + kColumns - 1) / kColumns;
      }
      int end = tiles;
#pragma unroll
      for (int o = 1; o < kWave; o <<= 1) {
        const int below = shuffle_up(end, o);
        if (lane >= o) end += below;
      }
      if (target >= end - tiles && target < end) {
        out.q_start = a.query_start_loc[s];
        out.q_len = a.query_start_loc[s + 1] - out.q_start;
        out.len = a.seq_lens[s];
        out.row0 = (target - (end - tiles)) * kColumns;
        out.seq = s;
      }
      target -= shuffle_from(end, kWave - 1);
    }
  }
  __syncthreads();
}

// The tokens that some of a block's columns see, as tiles.
struct Context {
  int num_rows;          // columns that exist
  int begin, num_tiles;  // from the start of a tile on; pages before it may have been freed
  const int32_t* spans;  // of the sequence, or null

  TQ_DEVICE Context(const AttendParams& a, const ColumnTile& tile, int group) {
    num_rows = min(kColumns, tile.q_len * group - tile.row0);
    const int before = tile.len - tile.q_len;
    const int low = before + tile.row0 / group, high = before + (tile.row0 + num_rows - 1) / group;
    spans = a.spans == nullptr ? nullptr : a.spans + int64_t{tile.seq} * a.max_spans * 2;
    int end = tile.len;
    begin = 0;
    if (spans == nullptr) {
      if (a.causal) end = min(end, high + 1);
      if (a.sliding_window > 0) begin = max(0, low - a.sliding_window + 1) / kAtomTokens * kAtomTokens;
    }
    num_tiles = max(0, end - begin + kAtomTokens - 1) / kAtomTokens;
  }

  // A split for less than a tile a warp is not worth its merge: those behind these have nothing to do.
  TQ_DEVICE int used_splits(int splits) const {
    return min(max((num_tiles + kAttendWarps - 1) / kAttendWarps, 1), splits);
  }
};

// Rotates the block's queries into shared memory as fp16.
template <class C>
TQ_DEVICE void load_columns(const AttendArgs& p, const ColumnTile& tile, int head, int group, AttendShared<C>& shared) {
  constexpr int kLanes = C::kDim / 16;
  constexpr bool kRotated = C::F::kRotatesKeys;
  const AttendParams& a = p.attend;
  const int part = threadIdx.x % kLanes, dim = a.cache.layout.head_dim;
  const int block = hadamard_block_of(part, dim);
#pragma unroll 1
  for (int n = threadIdx.x / kLanes; n < kColumns; n += C::kThreads / kLanes) {  // the same for all lanes of a warp
    const int row = tile.row0 + n;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = 0.0f;
    if (row < tile.q_len * group && 16 * part < dim) {
      const int64_t at = int64_t{tile.q_start + row / group} * a.query_token_stride +
                         int64_t{head * group + row % group} * a.query_head_stride;
      load_16(x, a.dtype, a.query, at + 16 * part, p.vector_query);
    }
    if constexpr (kRotated) {
      hadamard_lanes<kLanes>(x, part, block);
      const float norm = rsqrtf(static_cast<float>(block));
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] *= norm;
    }
    int bits = 0;  // of the largest |x|: such integers are ordered as their floats are, and what is not finite is above
#pragma unroll
    for (int i = 0; i < 16; ++i) bits = max(bits, __float_as_int(fabsf(x[i])));
    bits = reduce_row<kLanes>(bits, [](int u, int v) { return max(u, v); });
    const float largest = __int_as_float(bits);
    const bool finite = bits < 0x7f800000;
    const float to_one = finite && largest > 0.0f ? 1.0f / largest : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      shared.query[n][8 * part + i] = finite ? pack_half2(x[2 * i] * to_one, x[2 * i + 1] * to_one) : 0u;
    }
    if (part == 0) {
      const float levels = kRotated ? p.key_book.unit * rsqrtf(static_cast<float>(dim)) : 1.0f;
      shared.unit[n] = finite ? a.scale * kLog2e * largest * levels : __int_as_float(0x7fc00000);
    }
  }
  __syncthreads();
}

// s[i] = K[token result_row(lane, i)] . Q[column], in levels. row: the token of this lane, in the atom.
template <class C>
TQ_DEVICE void score_tile(const AttendArgs& p, const AttendShared<C>& shared, const uint8_t* atom, int row, int lane,
                          float (&s)[kResults]) {
  const PageLayout& layout = p.attend.cache.layout;
  // The order of dimensions within a product is free as long as keys and queries agree: a lane decodes whole units,
  // and its j-th run of one goes into the j-th product.
  const int part = first_column(lane) / kRun;
  const uint32_t* query = shared.query[lane % 16];
#pragma unroll
  for (int i = 0; i < kResults; ++i) s[i] = 0.0f;
#pragma unroll 4
  for (int step = 0; step < C::kSteps; ++step) {
    const int unit = C::kGroups * step + part;
    RawUnit<C::F::kKeyBits> raw;
    raw.load(atom + layout.key_row_offset(row), unit, layout.head_dim);
    uint32_t k[8], q[8];
    raw.template key_halves<typename C::F>(p.key_book, k);
    if constexpr (!C::F::kRotatesKeys) {  // to their own size: none may be below 2^-14 (kHeadroom)
#pragma unroll
      for (int i = 0; i < 8; ++i) k[i] = multiply_half2(k[i], pair_of_half(kFp8Scale));
    }
    const auto* from = reinterpret_cast<const uint4*>(query + 8 * unit);
    const uint4 u = from[0], v = from[1];
    q[0] = u.x, q[1] = u.y, q[2] = u.z, q[3] = u.w, q[4] = v.x, q[5] = v.y, q[6] = v.z, q[7] = v.w;
#pragma unroll
    for (int j = 0; j < C::kGroups; ++j) multiply(s, k + j * kRun / 2, q + j * kRun / 2);
  }
}

// Decodes kSlice dimensions of the tile's values, from unit first_unit, to value[dimension][token]. A lane takes a unit
// of two tokens, so that it writes pairs. last: the last token of the atom that exists.
template <class C>
TQ_DEVICE void load_values(const AttendArgs& p, const uint8_t* atom, int last, int first_unit, int lane,
                           uint32_t* value) {
  const PageLayout& layout = p.attend.cache.layout;
  for (int item = lane; item < 8 * C::kSlice / 16; item += C::kWave) {
    const int pair = item % 8, unit = item / 8;
    uint32_t h[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = min(2 * pair + i, last);
      RawUnit<C::F::kValueBits> raw;
      raw.load(atom + layout.value_row_offset(t), first_unit + unit, layout.head_dim_v);
      const float scale = load_half(atom + layout.value_scale_offset(t));
      if constexpr (C::F::kRotatesValues) {
        const float level = p.value_book.unit * rsqrtf(static_cast<float>(layout.head_dim_v));
        raw.template value_halves<typename C::F>(p.value_book, scale * level, 0.0f, h[i]);
      } else {
        raw.template value_halves<typename C::F>(p.value_book, scale, load_half(atom + layout.value_zero_offset(t)),
                                                 h[i]);
      }
    }
    uint32_t* to = value + 16 * unit * C::kValuePitch + pair;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[2 * i * C::kValuePitch] = byte_permute(h[0][i], h[1][i], 0x5410);
      to[(2 * i + 1) * C::kValuePitch] = byte_permute(h[0][i], h[1][i], 0x7632);
    }
  }
}

// out += V^T P^T of one slice.
template <class C>
TQ_DEVICE void add_values(const uint32_t* value, int lane, const uint32_t (&weights)[kRun / 2],
                          float (*out)[kResults]) {
#pragma unroll
  for (int u = 0; u < C::kSlice / 16; ++u) {
    const uint32_t* row = value + (16 * u + lane % 16) * C::kValuePitch + first_column(lane) / 2;
    uint32_t v[kRun / 2];
#pragma unroll
    for (int i = 0; i < kRun / 4; ++i) {
      const uint2 two = reinterpret_cast<const uint2*>(row)[i];
      v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
    multiply(out[u], v, weights);
  }
}

// A finished column's factor and LSE from its softmax reference and sum.
struct Normaliser {
  float factor, lse;

  TQ_DEVICE Normaliser(const AttendParams& a, int query_head, float top, float sum) {
    const float f = a.sinks != nullptr ? add_sink(a.sinks[query_head], top, sum) : 1.0f;
    factor = sum == 0.0f ? 0.0f : f / sum;
    lse = natural_lse(top, sum, log2f(sum));
  }
};

// Writes four finished outputs, and with the first of a column its LSE. kRotated: they have just been rotated back.
template <bool kRotated>
TQ_DEVICE void write_outputs(const AttendArgs& p, const ColumnTile& tile, int head, int group, int column, int d,
                             float4 x, float top, float sum) {
  const AttendParams& a = p.attend;
  const int row = tile.row0 + column;
  if (row >= tile.q_len * group || d >= a.cache.layout.head_dim_v) return;
  const int64_t token = tile.q_start + row / group;
  const int query_head = head * group + row % group;
  Normaliser n(a, query_head, top, sum);
  if constexpr (kRotated) n.factor *= rotation_norm(d, a.cache.layout.head_dim_v);
  store_4(a.dtype, a.out, token * a.out_token_stride + query_head * a.out_head_stride + d,
          make_float4(x.x * n.factor, x.y * n.factor, x.z * n.factor, x.w * n.factor), p.vector_out);
  if (d == 0 && a.lse != nullptr) a.lse[token * a.num_heads + query_head] = n.lse;
}

// Rotates the block's columns, a row of shared memory each, by all of its kThreads; unnormalised.
template <int kThreads>
TQ_DEVICE void rotate_columns(float* rows, int pitch, int dim) {
  const int pairs = (dim / 2 + 15) / 16 * 16;  // of a row; the last may not exist
  for (int stride = 1; 2 * stride <= dim; stride <<= 1) {
    __syncthreads();
    for (int i = threadIdx.x; i < kColumns * pairs; i += kThreads) {
      const int c = i / pairs, k = i % pairs, d = 2 * (k & -stride) + (k & (stride - 1));
      if (!rotates_over(d, stride, dim)) continue;
      float &x = rows[c * pitch + d], &y = rows[c * pitch + d + stride];
      const float sum = x + y, difference = x - y;
      x = sum, y = difference;
    }
  }
  __syncthreads();
}

// Grid: (tiles of columns, KV heads * parts, splits).
template <class C>
TQ_KERNEL(C::kThreads)
attend_kernel(TQ_ARGUMENT(AttendArgs) p) {
  TQ_SHARED(AttendShared<C>, shared);
  const AttendParams& a = p.attend;
  const int lane = threadIdx.x % C::kWave, warp = threadIdx.x / C::kWave;
  const int head = blockIdx.y / C::kParts, part = blockIdx.y % C::kParts;
  const int group = a.num_heads / a.cache.layout.num_kv_heads;
  find_columns<C::kWave>(a, p.first_tile + static_cast<int>(blockIdx.x), group, shared.tile);
  const ColumnTile tile = shared.tile;
  if (tile.seq < 0) return;
  const Context context(a, tile, group);
  const int split = static_cast<int>(blockIdx.z), used = context.used_splits(p.splits);
  if (split >= used) return;
  const int first = static_cast<int>(int64_t{context.num_tiles} * split / used);
  const int last = static_cast<int>(int64_t{context.num_tiles} * (split + 1) / used);
  load_columns<C>(p, tile, head, group, shared);

  // This lane's column.
  const int column = lane % kColumns, row = tile.row0 + min(column, context.num_rows - 1);
  const int position = tile.len - tile.q_len + row / group;
  const float slope = a.alibi_slopes != nullptr ? a.alibi_slopes[head * group + row % group] : 0.0f;
  const float unit = shared.unit[column];
  const bool modified = a.soft_cap > 0.0f || a.alibi_slopes != nullptr;
  const int32_t* table = a.block_table + int64_t{tile.seq} * a.block_table_stride;
  float top = kLowest, sum = 0.0f;
  float out[C::kPartDim / 16][kResults];
#pragma unroll
  for (int u = 0; u < C::kPartDim / 16; ++u) {
#pragma unroll
    for (int i = 0; i < kResults; ++i) out[u][i] = 0.0f;
  }

  for (int t = first + warp; t < last; t += kAttendWarps) {
    const int token0 = context.begin + t * kAtomTokens;
    const int last_row = min(kAtomTokens, tile.len - token0) - 1;  // rows behind it hold anything
    const uint8_t* atom = token_atom(a.cache, table, head, token0);
    const int here = renew(lane);
    float s[kResults];
    score_tile<C>(p, shared, atom, min(here % 16, last_row), here, s);
    float higher = top;
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const int r = result_row(lane, i), token = token0 + r;
      float x = s[i] * unit;
      if constexpr (C::F::kRotatesKeys) x *= load_half(atom + a.cache.layout.key_norm_offset(r));
      if (modified) x = modify_score(x, a.soft_cap, slope, token - position);
      if (token >= tile.len || !visible(position, token, a.causal, a.sliding_window, context.spans, a.max_spans))
        x = kMasked;
      s[i] = x;
      higher = fmaxf(higher, x - kHeadroom);
    }
#pragma unroll
    for (int o = 16; o < C::kWave; o <<= 1) higher = fmaxf(higher, shuffle_xor(higher, o));
    const float f = exp2_approx(top - higher);
    top = higher;
    sum *= f;
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      s[i] = exp2_approx(s[i] - top);
      sum += s[i];
    }
#pragma unroll
    for (int u = 0; u < C::kPartDim / 16; ++u) {
#pragma unroll
      for (int i = 0; i < kResults; ++i) out[u][i] *= f;
    }
    uint32_t weights[kRun / 2];
    operand_of_results(s, weights);
#pragma unroll
    for (int slice = 0; slice < C::kPartDim / C::kSlice; ++slice) {
      load_values<C>(p, atom, last_row, (part * C::kPartDim + slice * C::kSlice) / 16, here, shared.value[warp]);
      sync_wave();
      add_values<C>(shared.value[warp], lane, weights, out + slice * C::kSlice / 16);
      sync_wave();
    }
  }

  // The warps' results become one: each column by the largest reference.
#pragma unroll
  for (int o = 16; o < C::kWave; o <<= 1) sum += shuffle_xor(sum, o);
  if (lane < kColumns) shared.top[warp][lane] = top, shared.sum[warp][lane] = sum;
  __syncthreads();
  float higher = top;
#pragma unroll
  for (int w = 0; w < kAttendWarps; ++w) higher = fmaxf(higher, shared.top[w][column]);
  const float f = exp2_approx(top - higher);
#pragma unroll 1
  for (int w = 0; w < kAttendWarps; ++w) {
    if (w == warp) {
#pragma unroll
      for (int u = 0; u < C::kPartDim / 16; ++u) {
#pragma unroll
        for (int i = 0; i < kResults; ++i) {
          float& to = shared.out[column][16 * u + result_row(lane, i)];
          to = w == 0 ? out[u][i] * f : to + out[u][i] * f;
        }
      }
    }
    __syncthreads();
  }
  float* partial =
      p.partial + ((int64_t{blockIdx.x} * (a.cache.layout.num_kv_heads * C::kParts) + blockIdx.y) * p.splits + split) *
                      partial_floats(C::kPartDim);
  const bool merges = C::F::kRotatesValues ? merges_rotated(p.splits, C::kParts) : p.splits > 1;
  if (C::F::kRotatesValues && !merges) {
    rotate_columns<C::kThreads>(&shared.out[0][0], C::kPartDim + 1, a.cache.layout.head_dim_v);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kColumns * C::kPartDim / 4; i += C::kThreads) {
    const int c = i / (C::kPartDim / 4), d = 4 * (i % (C::kPartDim / 4));
    float reference = shared.top[0][c], total = 0.0f;
#pragma unroll
    for (int w = 1; w < kAttendWarps; ++w) reference = fmaxf(reference, shared.top[w][c]);
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) total += shared.sum[w][c] * exp2_approx(shared.top[w][c] - reference);
    const float* o = &shared.out[c][d];
    const float4 x = make_float4(o[0], o[1], o[2], o[3]);
    if (!merges) {
      write_outputs<C::F::kRotatesValues>(p, tile, head, group, c, part * C::kPartDim + d, x, reference, total);
    } else {
      *reinterpret_cast<float4*>(partial + c * C::kPartDim + d) = x;
      if (d == 0) {
        partial[kColumns * C::kPartDim + c] = reference;
        partial[kColumns * C::kPartDim + kColumns + c] = total;
      }
    }
  }
}

// Four unnormalised outputs of column c from dimension d of a part, joined from its splits, with their softmax.
struct Joined {
  float4 x;
  float top, sum;

  TQ_DEVICE Joined(const float* partial, int used, int part_dim, int c, int d) {
    const int floats = partial_floats(part_dim);
    const float* tops = partial + kColumns * part_dim + c;
    top = kLowest, sum = 0.0f;
    for (int s = 0; s < used; ++s) top = fmaxf(top, tops[int64_t{s} * floats]);
    x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = 0; s < used; ++s) {
      const float f = exp2_approx(tops[int64_t{s} * floats] - top);
      const float4 o = *reinterpret_cast<const float4*>(partial + int64_t{s} * floats + c * part_dim + d);
      x.x = fmaf(o.x, f, x.x), x.y = fmaf(o.y, f, x.y), x.z = fmaf(o.z, f, x.z), x.w = fmaf(o.w, f, x.w);
      sum = fmaf(tops[int64_t{s} * floats + kColumns], f, sum);
    }
  }
};

template <bool kRotated>
struct MergeShared {
  ColumnTile tile;
};
template <>
struct MergeShared<true> {
  ColumnTile tile;
  float out[kColumns][kMaxHeadDim + 1], top[kColumns], sum[kColumns];
};

// Joins the partial results of a sequence's splits. Grid: (tiles of columns, KV heads * parts); where values are
// rotated (tiles of columns, KV heads), as a rotation goes over all parts.
template <int kWave, bool kRotated>
TQ_KERNEL(kMergeThreads)
merge_kernel(TQ_ARGUMENT(MergeArgs) p) {
  TQ_SHARED(MergeShared<kRotated>, shared);
  const AttendParams& a = p.attend.attend;
  const int group = a.num_heads / a.cache.layout.num_kv_heads;
  find_columns<kWave>(a, p.attend.first_tile + static_cast<int>(blockIdx.x), group, shared.tile);
  const ColumnTile tile = shared.tile;
  if (tile.seq < 0) return;
  const int used = Context(a, tile, group).used_splits(p.attend.splits);
  const int parts = kRotated ? p.parts : 1;  // of this block
  const int head = blockIdx.y / (p.parts / parts), part = blockIdx.y % (p.parts / parts);
  const int64_t floats = int64_t{p.attend.splits} * partial_floats(p.part_dim);
  const float* partial =
      p.attend.partial +
      (int64_t{blockIdx.x} * (a.cache.layout.num_kv_heads * p.parts) + head * p.parts + part) * floats;
  const int dim = parts * p.part_dim;
  for (int i = threadIdx.x; i < kColumns * dim / 4; i += kMergeThreads) {
    const int c = i / (dim / 4), d = 4 * (i % (dim / 4)), own = d / p.part_dim;
    const Joined j(partial + own * floats, used, p.part_dim, c, d % p.part_dim);
    if constexpr (kRotated) {
      float* out = &shared.out[c][d];
      out[0] = j.x.x, out[1] = j.x.y, out[2] = j.x.z, out[3] = j.x.w;
      if (d == 0) shared.top[c] = j.top, shared.sum[c] = j.sum;
    } else {
      write_outputs<false>(p.attend, tile, head, group, c, part * p.part_dim + d, j.x, j.top, j.sum);
    }
  }
  if constexpr (kRotated) {
    rotate_columns<kMergeThreads>(&shared.out[0][0], kMaxHeadDim + 1, a.cache.layout.head_dim_v);
    for (int i = threadIdx.x; i < kColumns * dim / 4; i += kMergeThreads) {
      const int c = i / (dim / 4), d = 4 * (i % (dim / 4));
      const float* out = &shared.out[c][d];
      write_outputs<true>(p.attend, tile, head, group, c, d, make_float4(out[0], out[1], out[2], out[3]), shared.top[c],
                          shared.sum[c]);
    }
  }
}

}  // namespace tq::gpu
