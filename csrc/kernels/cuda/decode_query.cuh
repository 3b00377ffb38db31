// decode_query.cuh - the query columns of a row as the matrix unit takes them: rotated, quantized to two planes of
// signed bytes (FP8 keys: fp16), in shared memory.
//
// The rows that a CTA starts with are prepared by all its warps together, a vector for every few lanes, because the
// first tile waits for them; a warp that comes to a later row prepares that itself.
#pragma once

#include "kernels/cuda/decode_memory.h"
#include "kernels/cuda/key_tile.cuh"
#include "kernels/cuda/schedule.cuh"
#include "kernels/gpu/scores.cuh"

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
  static constexpr int kQueryLanes = kDim / 16;           // that a query vector lies in while it is rotated
  static constexpr int kQueryVectors = 32 / kQueryLanes;  // that a warp rotates at once
  static constexpr int kQueryBytes = kColumns * QueryRow<F, kDim>::kBytes;
  static constexpr int kAreaBytes = kQueryBytes + kColumns * 8;  // with a unit and a bias of each column
  TQ_HOST_DEVICE static constexpr DecodeTraits traits() {
    return {kColumns, kAtoms, kWarps, kDumpPitch, kAreaBytes, kQueryVectors};
  }
};

// One prepared row in shared memory.
template <class C>
struct QueryArea {
  static constexpr int kRowBytes = QueryRow<typename C::F, C::kDim>::kBytes;
  uint8_t* data;

  TQ_DEVICE uint8_t* row(int n) const { return data + n * kRowBytes; }
  // Of QueryScale.
  TQ_DEVICE float& unit(int n) const { return reinterpret_cast<float*>(data + C::kQueryBytes)[n]; }
  TQ_DEVICE int& bias(int n) const { return reinterpret_cast<int*>(data + C::kQueryBytes)[C::kColumns + n]; }
};

// Column n of the row at the cursor; a lane takes 16 dimensions. Apart from prepare_query, so that the load can be
// under way while other things are done.
template <class C>
TQ_DEVICE void load_query(const DecodeParams& p, const Cursor& c, int n, int lane, float (&x)[16]) {
  const AttendParams& a = p.attend;
  const int group = static_cast<int>(p.group.value);
  const int column = p.kv_heads.divide(c.row) * C::kColumns + n;
  const int part = lane % C::kQueryLanes;
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = 0.0f;
  if (column < c.q.q_len * group && 16 * part < a.cache.layout.head_dim) {
    const int token = c.q.q_start + p.group.divide(column);
    const int head = p.kv_heads.rest(c.row) * group + p.group.rest(column);
    const int64_t at = token * a.query_token_stride + head * a.query_head_stride;
    load_16(x, a.dtype, a.query, at + 16 * part, p.vector_query);
  }
}

template <class C>
TQ_DEVICE void prepare_query(const DecodeParams& p, const QueryArea<C>& area, int n, int lane, float (&x)[16]) {
  using Row = QueryRow<typename C::F, C::kDim>;
  constexpr int kLanes = C::kQueryLanes;
  const AttendParams& a = p.attend;
  const int part = lane % kLanes;
  const int dim = C::kExact ? C::kDim : a.cache.layout.head_dim;
  if constexpr (Row::kIsInt8) {
    const int block = C::kExact ? C::kDim : hadamard_block_of(part, dim);
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
  float unit = fabsf(a.scale) * kLog2e;
  if constexpr (Row::kIsInt8) {
    const float to_int = finite && largest > 0.0f ? 127.0f / largest : 0.0f;
    uint32_t hi[4] = {}, lo[4] = {};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float v = x[i] * to_int;
      const int h = __float2int_rn(v);
      const int l = min(127, __float2int_rn((v - static_cast<float>(h)) * 256.0f));
      const int at = Row::position(i);
      hi[at >> 2] |= (h & 255u) << (8 * (at & 3));
      lo[at >> 2] |= (l & 255u) << (8 * (at & 3));
      sum += 256 * h + l;
    }
    *reinterpret_cast<uint4*>(area.row(n) + 16 * part) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    *reinterpret_cast<uint4*>(area.row(n) + C::kDim + 16 * part) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
    sum = reduce_row<kLanes>(sum, [](int u, int v) { return u + v; });
    unit *= largest * (1.0f / 127.0f) * p.key_book.unit * rsqrtf(static_cast<float>(dim));
    if (part == 0) area.bias(n) = -KeyTile<typename C::F, C::kDim, C::kExact>::kOffset * sum;
  } else {
    const float to_one = finite && largest > 0.0f ? 1.0f / largest : 0.0f;
    uint32_t h[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i] = pack_half2(x[2 * i] * to_one, x[2 * i + 1] * to_one);
    auto* to = reinterpret_cast<uint4*>(area.row(n) + 32 * part);
    to[0] = make_uint4(h[0], h[1], h[2], h[3]);
    to[1] = make_uint4(h[4], h[5], h[6], h[7]);
    unit *= largest * kFp8Scale;
  }
  // A positive unit lets a masked score stay the lowest; a query that is not finite makes its own row NaN.
  if (part == 0) area.unit(n) = finite ? fmaxf(unit, 1e-12f) : __int_as_float(0x7fc00000);
}

// A whole row by one warp.
template <class C>
TQ_DEVICE void prepare_row(const DecodeParams& p, const Cursor& c, const QueryArea<C>& area, int lane) {
  __syncwarp();
#pragma unroll 1
  for (int n = lane / C::kQueryLanes; n < C::kColumns; n += C::kQueryVectors) {
    float x[16];
    load_query<C>(p, c, n, lane, x);
    prepare_query<C>(p, area, n, lane, x);
  }
  __syncwarp();
}

}  // namespace tq::cuda
