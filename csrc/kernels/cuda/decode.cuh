// decode.cuh - attention of a few query tokens per sequence (decode, multi-token verify) over compressed pages.
//
// One CTA per multiprocessor, warps that work alone: each copies its own stretch of atoms into its own ring in shared
// memory, scores them, and keeps its own running softmax and output; only what crosses a border is merged
// (decode_merge.cuh). No barrier is inside the loop, and a page of 16 tokens costs what a page of 128 does.
#pragma once

#include "kernels/cuda/decode_merge.cuh"
#include "kernels/cuda/key_tile.cuh"
#include "kernels/cuda/schedule.cuh"
#include "kernels/cuda/scores.cuh"
#include "kernels/cuda/value_tile.cuh"

namespace tq::cuda {

// One instance. NT: tiles of 8 query columns; kAtoms: atoms per tile of the schedule; kWarps: at most.
template <class F_, int kDim_, bool kExact_, int NT_, int kAtoms_, int kWarps_>
struct DecodeConfig {
  using F = F_;
  static constexpr int kDim = kDim_, NT = NT_, kAtoms = kAtoms_, kWarps = kWarps_;
  static constexpr bool kExact = kExact_;
  static constexpr int kColumns = 8 * NT;
  static constexpr int kTileTokens = 16 * kAtoms;
  static constexpr int kDumpPitch = kDim + 4;  // floats of one column of a dump, with its maximum and sum
  static constexpr bool kQueryInRegisters = kDim * NT <= 256;
  static constexpr int kQueryBytes = kColumns * QueryRow<F, kDim>::kBytes;
};

// Bytes of shared memory of one warp, ring apart.
template <class C>
__host__ __device__ constexpr int decode_warp_bytes() {
  return C::kQueryBytes + C::kColumns * 16;  // unit and two biases of a column
}

// Running state of a warp over one row: maxima, sums, outputs of a lane's two columns of each column tile.
template <class C>
struct Running {
  float o[C::NT][C::kDim / 16][4];
  float ones[C::NT][4];
  float sum[C::NT][2], zero[C::NT][2];
  float minus_ref[C::NT][2];  // weights are exp2(score + minus_ref)

  TQ_DEVICE void clear() {
#pragma unroll
    for (int nt = 0; nt < C::NT; ++nt) {
#pragma unroll
      for (int i = 0; i < C::kDim / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) o[nt][i][j] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) ones[nt][j] = 0.0f;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum[nt][e] = zero[nt][e] = 0.0f;
        minus_ref[nt][e] = 1e25f;  // above any score: the first tile sets it
      }
    }
  }
};

// What a lane knows of its columns.
template <int NT>
struct Columns {
  int position[NT][2];
  float slope[NT][2];
};

template <class C>
struct DecodeWarp {
  using F = typename C::F;
  using Key = KeyTile<F, C::kDim, C::kExact>;
  using Value = ValueTile<F, C::kDim, C::kExact>;
  using Shape = AtomShape<F, C::kDim, C::kExact>;
  static constexpr int NT = C::NT;
  static constexpr int kQueryRegisters = C::kQueryInRegisters ? NT * Key::kPlanes * Key::kSteps : 1;

  const DecodeParams& p;
  const Shape shape;
  const int lane, r, t;
  uint8_t* query_smem;  // [kColumns][QueryRow::kBytes]
  float* column_unit;   // [kColumns]
  int* column_bias;     // [kColumns][2]
  uint2 query[kQueryRegisters];
  QueryScale<NT> scale;
  Columns<NT> columns;
  Running<C> run;
  int full_begin, full_end;  // tokens that every column sees

  TQ_DEVICE DecodeWarp(const DecodeParams& params, uint8_t* smem, int lane_)
      : p(params), shape(params.attend.cache.layout), lane(lane_), r(lane_ >> 2), t(lane_ & 3), query_smem(smem) {
    column_unit = reinterpret_cast<float*>(smem + C::kQueryBytes);
    column_bias = reinterpret_cast<int*>(column_unit + C::kColumns);
  }

  // Rotates and quantizes the query columns of a row into shared memory, then takes this lane's fragments of them.
  TQ_DEVICE void load_query(const Cursor& c) {
    constexpr int kLanes = C::kDim / 16;
    const AttendParams& a = p.attend;
    const int kv_heads = a.cache.layout.num_kv_heads, group = a.num_heads / kv_heads;
    const int head = c.row % kv_heads, first_column = c.row / kv_heads * C::kColumns;
    const int num_columns = c.q.q_len * group;
    const int part = lane % kLanes;
    const int dim = shape.head_dim();
    const int block = hadamard_block_of(part, dim);
    __syncwarp();
#pragma unroll 1
    for (int n = lane / kLanes; n < C::kColumns; n += 32 / kLanes) {
      const int column = first_column + n;
      float x[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = 0.0f;
      if (column < num_columns && 16 * part < dim) {
        const int token = c.q.q_start + column / group;
        const int64_t at = token * a.query_token_stride + (head * group + column % group) * a.query_head_stride;
        load_16(x, a.dtype, a.query, at + 16 * part, p.vector_query);
      }
      if constexpr (Key::kIsInt8) {
        hadamard_lanes<kLanes>(x, part, block);
        const float norm = rsqrtf(static_cast<float>(block));
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] *= norm;
      }
      float largest = 0.0f;
      bool finite = true;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (a.scale < 0.0f) x[i] = -x[i];
        largest = fmaxf(largest, fabsf(x[i]));
        finite = finite && fabsf(x[i]) <= 3e38f;
      }
      largest = reduce_row<kLanes>(largest, [](float u, float v) { return fmaxf(u, v); });
      finite = reduce_row<kLanes>(finite ? 1 : 0, [](int u, int v) { return u & v; }) != 0;
      uint8_t* row = query_smem + n * QueryRow<F, C::kDim>::kBytes;
      float unit = fabsf(a.scale) * kLog2e;
      if constexpr (Key::kIsInt8) {
        const float to_int = finite && largest > 0.0f ? 127.0f / largest : 0.0f;
        uint32_t hi[4] = {}, lo[4] = {};
        int sum_hi = 0, sum_lo = 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const float v = x[i] * to_int;
          const int h = __float2int_rn(v);
          const int l = min(127, __float2int_rn((v - static_cast<float>(h)) * 256.0f));
          const int at = QueryRow<F, C::kDim>::position(i);
          hi[at >> 2] |= (h & 255u) << (8 * (at & 3));
          lo[at >> 2] |= (l & 255u) << (8 * (at & 3));
          sum_hi += h;
          sum_lo += l;
        }
        *reinterpret_cast<uint4*>(row + 16 * part) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
        *reinterpret_cast<uint4*>(row + C::kDim + 16 * part) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
        sum_hi = reduce_row<kLanes>(sum_hi, [](int u, int v) { return u + v; });
        sum_lo = reduce_row<kLanes>(sum_lo, [](int u, int v) { return u + v; });
        unit *= largest * (1.0f / 127.0f) * p.book.unit * rsqrtf(static_cast<float>(dim));
        if (part == 0) {
          column_bias[2 * n] = kFloatMagicBits - kLevelOffset * sum_hi;
          column_bias[2 * n + 1] = kFloatMagicBits - kLevelOffset * sum_lo;
        }
      } else {
        const float to_one = finite && largest > 0.0f ? 1.0f / largest : 0.0f;
        uint32_t h[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) h[i] = pack_half2(x[2 * i] * to_one, x[2 * i + 1] * to_one);
        uint4* to = reinterpret_cast<uint4*>(row + 32 * part);
        to[0] = make_uint4(h[0], h[1], h[2], h[3]);
        to[1] = make_uint4(h[4], h[5], h[6], h[7]);
        unit *= largest * kFp8Scale;
      }
      // A positive unit lets a masked score stay the lowest; a query that is not finite makes its own row NaN.
      if (part == 0) column_unit[n] = finite ? fmaxf(unit, 1e-12f) : __int_as_float(0x7fc00000);
    }
    __syncwarp();
    full_begin = 0;
    full_end = c.q.len;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if constexpr (C::kQueryInRegisters) {
#pragma unroll
        for (int i = 0; i < Key::kPlanes * Key::kSteps; ++i) {
          query[nt * Key::kPlanes * Key::kSteps + i] = query_words(nt, i / Key::kSteps, i % Key::kSteps);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = nt * 8 + 2 * t + e;
        scale.unit[nt][e] = column_unit[n];
        scale.bias[nt][0][e] = column_bias[2 * n];
        scale.bias[nt][1][e] = column_bias[2 * n + 1];
        const int column = min(first_column + n, num_columns - 1);
        columns.position[nt][e] = c.q.len - c.q.q_len + column / group;
        columns.slope[nt][e] = a.alibi_slopes != nullptr ? a.alibi_slopes[head * group + column % group] : 0.0f;
      }
    }
    // Bounds of the tokens that need no mask; the first and last valid columns have the extreme positions.
    const int low = c.q.len - c.q.q_len + first_column / group;
    const int high = c.q.len - c.q.q_len + min(first_column + C::kColumns - 1, num_columns - 1) / group;
    if (a.causal) full_end = min(full_end, low + 1);
    if (a.sliding_window > 0) full_begin = max(0, high - a.sliding_window + 1);
  }

  TQ_DEVICE uint2 query_words(int nt, int plane, int step) const {
    return Key::query_words(query_smem + (nt * 8 + r) * QueryRow<F, C::kDim>::kBytes, plane, step, t);
  }

  // Masks, soft cap and ALiBi, for the tiles and layers that need them. s stays in units of scale.unit.
  TQ_DEVICE void modify(const Cursor& c, int token0, float (&s)[C::kAtoms][NT][4], uint32_t (&scales)[C::kAtoms],
                        uint32_t (&zeros)[C::kAtoms]) {
    const AttendParams& a = p.attend;
    const int32_t* spans = a.spans == nullptr ? nullptr : a.spans + int64_t{c.seq} * a.max_spans * 2;
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = token0 + 16 * i + token_row(r, h == 1);
        const bool in_sequence = token < c.q.len;
        if (!in_sequence) {  // whatever bytes are there may be NaN
          scales[i] &= h == 0 ? 0xFFFF0000u : 0x0000FFFFu;
          zeros[i] &= h == 0 ? 0xFFFF0000u : 0x0000FFFFu;
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[i][nt][2 * h + e];
            const int position = columns.position[nt][e];
            if (a.soft_cap > 0.0f || a.alibi_slopes != nullptr) {
              x = modify_score(x * scale.unit[nt][e], a.soft_cap, columns.slope[nt][e], token - position) /
                  scale.unit[nt][e];
            }
            if (!in_sequence || !visible(position, token, a.causal, a.sliding_window, spans, a.max_spans)) x = kMasked;
          }
        }
      }
    }
  }

  TQ_DEVICE void tile(const Cursor& c, const uint8_t* atoms, uint32_t magic) {
    float s[C::kAtoms][NT][4];
    uint32_t scales[C::kAtoms], zeros[C::kAtoms];
    const uint32_t swap = token_parity(r) ? 0x1032 : 0x3210;
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) {
      const uint8_t* atom = atoms + i * shape.atom_bytes();
      Key::template scores<NT>(
          shape, p.book, atom, r, t, scale,
          [this](int nt, int plane, int step) {
            if constexpr (C::kQueryInRegisters) {
              return query[(nt * Key::kPlanes + plane) * Key::kSteps + step];
            } else {
              return query_words(nt, plane, step);
            }
          },
          s[i]);
      scales[i] = *reinterpret_cast<const uint32_t*>(atom + shape.scale_offset() + 4 * r);
      zeros[i] = *reinterpret_cast<const uint32_t*>(atom + shape.zero_offset() + 4 * r);
      scales[i] = byte_permute(scales[i], scales[i], swap);
      zeros[i] = byte_permute(zeros[i], zeros[i], swap);
    }
    const AttendParams& a = p.attend;
    const int token0 = c.q.first + c.tile * C::kTileTokens;
    if (token0 < full_begin || token0 + C::kTileTokens > full_end || a.soft_cap > 0.0f || a.alibi_slopes != nullptr) {
      modify(c, token0, s, scales, zeros);
    }

    // Weights p = exp2(score - ref) enter the sum; w = p * scale goes into the matrix unit as fp16 and must fit, so w
    // decides when ref moves. A scale of 0 counts as the smallest that fp16 has: then p stays bounded too.
    float weight[C::kAtoms][NT][4], scaled[C::kAtoms][NT][4];
    float2 scale_of[C::kAtoms];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) {
      scale_of[i] = unpack_half2(scales[i]);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float w = exp2_approx(fmaf(s[i][nt][j], scale.unit[nt][j & 1], run.minus_ref[nt][j & 1]));
          weight[i][nt][j] = w;
          scaled[i][nt][j] = w * (j < 2 ? scale_of[i].x : scale_of[i].y);
          largest = fmaxf(largest, fmaxf(scaled[i][nt][j], w * 6e-8f));
        }
      }
    }
    if (__any_sync(kFullMask, largest > 16384.0f)) {
      raise_reference(s, scale_of);
#pragma unroll
      for (int i = 0; i < C::kAtoms; ++i) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float w = exp2_approx(fmaf(s[i][nt][j], scale.unit[nt][j & 1], run.minus_ref[nt][j & 1]));
            weight[i][nt][j] = w;
            scaled[i][nt][j] = w * (j < 2 ? scale_of[i].x : scale_of[i].y);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) {
      const float2 zero = unpack_half2(zeros[i]);
      uint32_t fragment[NT][2];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const float (&w)[4] = weight[i][nt];
        const float (&v)[4] = scaled[i][nt];
        run.sum[nt][0] += w[0] + w[2];
        run.sum[nt][1] += w[1] + w[3];
        run.zero[nt][0] = fmaf(w[0], zero.x, fmaf(w[2], zero.y, run.zero[nt][0]));
        run.zero[nt][1] = fmaf(w[1], zero.x, fmaf(w[3], zero.y, run.zero[nt][1]));
        fragment[nt][0] = transpose_8x8(pack_half2(v[0], v[1]));
        fragment[nt][1] = transpose_8x8(pack_half2(v[2], v[3]));
      }
      Value::template accumulate<NT>(shape, atoms + i * shape.atom_bytes(), r, t, fragment, magic, run.o, run.ones);
    }
  }

  TQ_DEVICE void raise_reference(const float (&s)[C::kAtoms][NT][4], const float2 (&scale_of)[C::kAtoms]) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float top = kMasked;
#pragma unroll
        for (int i = 0; i < C::kAtoms; ++i) {
          top = fmaxf(top, fmaf(s[i][nt][e], scale.unit[nt][e], log2_approx(fmaxf(scale_of[i].x, 6e-8f))));
          top = fmaxf(top, fmaf(s[i][nt][2 + e], scale.unit[nt][e], log2_approx(fmaxf(scale_of[i].y, 6e-8f))));
        }
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, o));
        const float now = fminf(run.minus_ref[nt][e], 4.0f - top);
        const float f = exp2_approx(now - run.minus_ref[nt][e]);
        run.minus_ref[nt][e] = now;
        run.sum[nt][e] *= f;
        run.zero[nt][e] *= f;
        run.ones[nt][e] *= f;
        run.ones[nt][2 + e] *= f;
#pragma unroll
        for (int i = 0; i < C::kDim / 16; ++i) {
          run.o[nt][i][e] *= f;
          run.o[nt][i][2 + e] *= f;
        }
      }
    }
  }

  // Writes the state as plain floats: column n has its unnormalised output, then reference and sum at kDim, kDim + 1.
  TQ_DEVICE void dump(float* to) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = run.sum[nt][e], zero = run.zero[nt][e];
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) {
          sum += __shfl_xor_sync(kFullMask, sum, o);
          zero += __shfl_xor_sync(kFullMask, zero, o);
        }
        float* column = to + (nt * 8 + 2 * t + e) * C::kDumpPitch;
        const float ones = run.ones[nt][e];
#pragma unroll
        for (int i = 0; i < C::kDim / 16; ++i) {
          const int2 d = Value::dims(i, r);
          column[d.x] = run.o[nt][i][e] - ones + zero;
          column[d.y] = (run.o[nt][i][2 + e] - ones) * 0.0625f + zero;
        }
        if (r == 0) {
          column[C::kDim] = -run.minus_ref[nt][e];
          column[C::kDim + 1] = sum;
        }
      }
    }
  }
};

// The stream of atoms of one warp: addresses of up to 32 atoms in the lanes, and the next 32 on their way.
template <class C>
struct AtomStream {
  using S = Schedule<C::kTileTokens, C::kColumns>;
  const DecodeParams& p;
  const int lane;
  Cursor* cursor;                           // in shared memory: touched once in 32 atoms
  int left;                                 // tiles not yet addressed
  int used = 0, count = 0, next_count = 0;  // in tiles
  const uint8_t* address = nullptr;
  int next_block = 0;
  int64_t next_offset = 0;

  TQ_DEVICE AtomStream(const DecodeParams& params, Cursor* c, int tiles, int lane_)
      : p(params), lane(lane_), cursor(c), left(tiles) {
    prefetch();
  }

  TQ_DEVICE void prefetch() {
    next_count = 0;
    if (left == 0) return;
    const AttendParams& a = p.attend;
    Cursor c = *cursor;
    if (c.tile == c.q.tiles) S::next_row(p, c);
    next_count = min(min(32 / C::kAtoms, c.q.tiles - c.tile), left);
    // Beyond the sequence's last atom that one is read again, and masked.
    const int last = max(c.q.first, (c.q.len - 1) & ~15);
    const int token = min(c.q.first + (c.tile * C::kAtoms + lane) * 16, last);
    const PageLayout& layout = a.cache.layout;
    const int entry = token / layout.block_size;
    const int head = c.row % layout.num_kv_heads;
    next_block = a.block_table[c.seq * a.block_table_stride + entry];
    next_offset = layout.atom_offset(head, token - entry * layout.block_size);
    c.tile += next_count;
    left -= next_count;
    __syncwarp();
    if (lane == 0) *cursor = c;
    __syncwarp();
  }

  // Makes the address of the next tile's atoms available: atom i is in lane `at() + i`.
  TQ_DEVICE bool advance() {
    if (used == count) {
      if (next_count == 0) return false;
      // A block that does not exist is a caller's error that a GPU cannot report; it must not become a wild read.
      const int64_t block = min(max(int64_t{next_block}, int64_t{0}), p.attend.cache.num_blocks - 1);
      address = p.attend.cache.data + block * p.attend.cache.block_stride + next_offset;
      count = next_count;
      used = 0;
      prefetch();
    }
    ++used;
    return true;
  }
  TQ_DEVICE int at() const { return (used - 1) * C::kAtoms; }
};

template <class C>
struct Ring {
  uint8_t* data;
  uint64_t* barriers;
  const int slots, slot_bytes, atom_bytes, lane;
  int head = 0, tail = 0;  // next slot to fill, next to read
  uint32_t parity = 0;

  TQ_DEVICE void fill(const AtomStream<C>& stream) {
    uint8_t* to = data + head * slot_bytes;
#if TQ_HAS_BULK_COPY
    if (lane == 0) ring_expect(barriers + head, C::kAtoms * atom_bytes);
    const int i = lane - stream.at();
    if (i >= 0 && i < C::kAtoms) ring_copy(to + i * atom_bytes, stream.address, atom_bytes, barriers + head);
#else
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) {
      const auto address = reinterpret_cast<uint64_t>(stream.address);
      const uint32_t lo = __shfl_sync(kFullMask, static_cast<uint32_t>(address), stream.at() + i);
      const uint32_t hi = __shfl_sync(kFullMask, static_cast<uint32_t>(address >> 32), stream.at() + i);
      const auto* from = reinterpret_cast<const uint8_t*>(uint64_t{hi} << 32 | lo);
      for (int b = 16 * lane; b < atom_bytes; b += 512) async_copy_16(to + i * atom_bytes + b, from + b);
    }
    async_copy_commit();
#endif
    if (++head == slots) head = 0;
  }
  // The data of the oldest filled slot. Without bulk copies `slots` groups of copies are under way, the oldest of which
  // must have landed; there are at most 3 slots then.
  TQ_DEVICE const uint8_t* wait() {
#if TQ_HAS_BULK_COPY
    ring_wait(barriers + tail, parity);
#else
    if (slots > 2) {
      async_copy_wait<2>();
    } else {
      async_copy_wait<1>();
    }
    __syncwarp();
#endif
    return data + tail * slot_bytes;
  }
  TQ_DEVICE void release() {
    __syncwarp();
    if (++tail == slots) {
      tail = 0;
      parity ^= 1;
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kWarps * 32, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  using S = Schedule<C::kTileTokens, C::kColumns>;
  using Warp = DecodeWarp<C>;
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ Fragment fragments[C::kWarps];
  __shared__ Cursor cursors[C::kWarps];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const typename Warp::Shape shape(p.attend.cache.layout);
  const int slot_bytes = C::kAtoms * shape.atom_bytes();
  const int ring_bytes = ring_size<C>(p.slots, shape.atom_bytes());
  uint8_t* ring_data = smem + warp * ring_bytes;
  uint8_t* warp_data = smem + warps * ring_bytes + warp * decode_warp_bytes<C>();
  auto* barriers = reinterpret_cast<uint64_t*>(smem + warps * (ring_bytes + decode_warp_bytes<C>())) + warp * p.slots;

  const int total = S::total(p, lane);
  const int quota = max((total + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x), p.min_tiles);
  const int cta_begin = min(static_cast<int>(blockIdx.x) * quota, total), cta_end = min(cta_begin + quota, total);
  if (cta_begin == cta_end) return;
  const int share = (cta_end - cta_begin) / warps, rest = (cta_end - cta_begin) % warps;
  const int begin = cta_begin + warp * share + min(warp, rest);
  const int end = begin + share + (warp < rest ? 1 : 0);

  Fragment& own = fragments[warp];
  if (lane == 0) own.first = own.last = -1;
  if (begin < end) {
#if TQ_HAS_BULK_COPY
    if (lane < p.slots) ring_init(barriers + lane);
    ring_init_done();
    __syncwarp();
#endif
    Cursor c = S::find(p, begin, lane);
    if (lane == 0) cursors[warp] = c;
    __syncwarp();
    AtomStream<C> stream(p, &cursors[warp], end - begin, lane);
    Ring<C> ring{ring_data, barriers, p.slots, slot_bytes, shape.atom_bytes(), lane};
    for (int i = 0; i < p.slots; ++i) {
      if (stream.advance()) {
        ring.fill(stream);
      } else {
        async_copy_commit();
      }
    }
    Warp work(p, warp_data, lane);
    const uint32_t magic = opaque(kHalfMagic);
    for (int at = begin; at < end;) {
      const int row_begin = at - c.tile;
      const bool from_start = c.tile == 0;
      work.load_query(c);
      work.run.clear();
      const int stop = min(row_begin + c.q.tiles, end);
      for (; at < stop; ++at, ++c.tile) {
        const uint8_t* atoms = ring.wait();
        work.tile(c, atoms, magic);
        ring.release();
        if (stream.advance()) {
          ring.fill(stream);
        } else {
          async_copy_commit();
        }
      }
      const bool complete = from_start && c.tile == c.q.tiles;
      if (at == end) {  // the ring is free now
        work.dump(reinterpret_cast<float*>(ring_data));
        if (lane == 0) {
          own.last = row_begin;
          own.last_end = row_begin + c.q.tiles;
          own.last_row = output_row(p, c, C::kColumns);
        }
      } else {
        // A whole row is finished at once; it must not overwrite the row that began earlier, which waits for the merge.
        float* to = first_dump<C>(p, warps, warp) + (complete ? C::kColumns * C::kDumpPitch : 0);
        work.dump(to);
        __syncwarp();
        if (complete) {
          const OutputRow row = output_row(p, c, C::kColumns);
          for (int n = 0; n < row.columns; ++n) {
            Combined<C> column;
            column.template gather<false>(1, lane, [&](int) { return to + n * C::kDumpPitch; });
            column.finish(p, row, n, lane);
          }
          __syncwarp();
        } else if (lane == 0) {
          own.first = row_begin;
          own.first_end = at;
          own.first_row = output_row(p, c, C::kColumns);
        }
        S::next_row(p, c);
      }
    }
  }
  __syncthreads();
  merge_cta<C>(p, fragments, smem, ring_bytes, cta_begin, cta_end, quota, warp, warps, lane);
}

}  // namespace tq::cuda
