// store.cuh - compresses K and V of new tokens into pages: rotate, normalise, quantize, pack and scatter in one launch.
//
// A vector lies in kLanes lanes, 16 dimensions each (row_lanes.cuh), so a warp holds 32 / kLanes of them: one KV head
// of as many tokens. The same arithmetic as codec/reference.cc in float; codes differ from it at ties only.
#pragma once

#include "kernels/cuda/codes.cuh"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/row_lanes.cuh"

namespace tq::cuda {

struct StoreArgs {
  StoreParams store;
  DeviceBook book;
  bool vector_key, vector_value;
};

constexpr int kStoreThreads = 128;
constexpr float kLargestKey = 1e15f;  // its square times 512 is finite in float
constexpr float kLargestHalf = 65504.0f;

TQ_DEVICE float make_finite(float x, float limit) { return x != x ? 0.0f : fminf(fmaxf(x, -limit), limit); }
TQ_DEVICE uint16_t to_half_saturating(float x) { return __half_as_ushort(__float2half_rn(fminf(x, kLargestHalf))); }

// Round to nearest even, saturate to 448, NaN to 0: in integers, the same on every device. (codec/float_bits.cc)
TQ_DEVICE uint32_t to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  if (x != x) return 0;
  const float a = fminf(fabsf(x), 448.0f);
  if (a < 0.015625f) {  // below the smallest normal, 2^-6: steps of 2^-9
    return sign | static_cast<uint32_t>(__float2int_rn(a * 512.0f));
  }
  uint32_t m = __float_as_uint(a);
  m += 0x7FFFFu + ((m >> 20) & 1u);  // 3 bits of mantissa stay
  return sign | ((m >> 20) - (120u << 3));
}

// Packs 16 codes of a unit, given as two words of nibbles (load_unit's order), into a row.
template <int kBits, int kLanes>
TQ_DEVICE void store_unit(uint8_t* row, int unit, int dim, uint32_t w0, uint32_t w1, bool valid) {
  if constexpr (kBits == 4) {
    if (valid) *reinterpret_cast<uint2*>(row + 8 * unit) = make_uint2(w0, w1);
  } else {
    const uint32_t low = (w0 & 0x33333333u) | ((w1 & 0x33333333u) << 2);
    const uint32_t high = ((w0 & 0x44444444u) >> 2) | ((w1 & 0x44444444u) >> 1);  // bit 4i + g
    uint32_t pair = high;
    if constexpr (kLanes > 1) {  // the even unit's lane takes the odd one's bits
      pair |= __shfl_down_sync(kFullMask, high, 1) << 2;
    }
    if (!valid) return;
    auto* to = reinterpret_cast<uint16_t*>(row + 4 * unit);
    to[0] = static_cast<uint16_t>(low), to[1] = static_cast<uint16_t>(low >> 16);
    if (unit & 1) return;
    auto* plane = reinterpret_cast<uint16_t*>(row + dim / 4 + 2 * unit);
    if (16 * unit + 16 == dim) {
      plane[0] = static_cast<uint16_t>(gather_high(high));
    } else {
      plane[0] = static_cast<uint16_t>(pair), plane[1] = static_cast<uint16_t>(pair >> 16);
    }
  }
}

// Sixteen codes in dimension order to two words of nibbles.
template <int kBits>
TQ_DEVICE void nibble_words(const uint32_t (&code)[16], uint32_t& w0, uint32_t& w1) {
  w0 = w1 = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    w0 |= code[nibble_dim<kBits>(0, i)] << (4 * i);
    w1 |= code[nibble_dim<kBits>(1, i)] << (4 * i);
  }
}

template <class F, int kLanes>
TQ_DEVICE void store_key(const StoreArgs& p, float (&x)[16], int part, int dim, int block, uint8_t* row, uint8_t* norm,
                         bool valid) {
  valid = valid && 16 * part < dim;
  if constexpr (F::kKeyBits == 8) {
    uint32_t w[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) w[i / 4] |= to_e4m3(x[i]) << (8 * (i % 4));
    if (valid) *reinterpret_cast<uint4*>(row + 16 * part) = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      x[i] = make_finite(x[i], kLargestKey);
      squares = fmaf(x[i], x[i], squares);
    }
    squares = reduce_row<kLanes>(squares, [](float a, float b) { return a + b; });
    const float n = sqrtf(squares);
    hadamard_lanes<kLanes>(x, part, block);
    const float factor = sqrtf(static_cast<float>(dim) / static_cast<float>(block)) / (n + 1e-8f);
    constexpr int kHalf = 1 << (F::kKeyBits - 1);
    uint32_t code[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float v = x[i] * factor;
      int m = 0;  // thresholds at or below |v|; on the negative side a tie goes up, towards zero
#pragma unroll
      for (int k = 0; k < kHalf - 1; ++k) m += v >= 0.0f ? v >= p.book.midpoints[k] : -v > p.book.midpoints[k];
      code[i] = v >= 0.0f ? kHalf + m : kHalf - 1 - m;
    }
    uint32_t w0, w1;
    nibble_words<F::kKeyBits>(code, w0, w1);
    // The norm correction: what the chosen levels' own norm is.
    int level_squares = 0;
    if (16 * part < dim) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        uint32_t u[2];
        levels_of_nibbles<F::kKeyBits>(p.book, g == 0 ? w0 : w1, u[0], u[1]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // sum of (u - 64)^2
          level_squares += __dp4a(u[i], u[i], 0u) - 128 * static_cast<int>(__dp4a(u[i], 0x01010101u, 0u)) + 4 * 4096;
        }
      }
    }
    level_squares = reduce_row<kLanes>(level_squares, [](int a, int b) { return a + b; });
    store_unit<F::kKeyBits, kLanes>(row, part, dim, w0, w1, valid);
    if (valid && part == 0) {
      const float level_norm = sqrtf(static_cast<float>(level_squares)) * p.book.unit * rsqrtf(static_cast<float>(dim));
      *reinterpret_cast<uint16_t*>(norm) = to_half_saturating(n / level_norm);
    }
  }
}

template <class F, int kLanes>
TQ_DEVICE void store_value(float (&x)[16], int part, int dim, uint8_t* row, uint8_t* scale, uint8_t* zero, bool valid) {
  const bool holds = 16 * part < dim;
  valid = valid && holds;
  float low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    x[i] = make_finite(x[i], kLargestHalf);
    if (holds) {
      low = fminf(low, x[i]);
      high = fmaxf(high, x[i]);
    }
  }
  low = reduce_row<kLanes>(low, [](float a, float b) { return fminf(a, b); });
  high = reduce_row<kLanes>(high, [](float a, float b) { return fmaxf(a, b); });
  constexpr int kTop = (1 << F::kValueBits) - 1;
  const float s = fmaxf((high - low) / static_cast<float>(kTop), 1e-8f);
  uint32_t code[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int c = static_cast<int>(__fdiv_rn(x[i] - low, s) + 0.5f);
    code[i] = static_cast<uint32_t>(min(max(c, 0), kTop));
  }
  uint32_t w0, w1;
  nibble_words<F::kValueBits>(code, w0, w1);
  store_unit<F::kValueBits, kLanes>(row, part, dim, w0, w1, valid);
  if (valid && part == 0) {
    *reinterpret_cast<uint16_t*>(scale) = to_half_saturating(s);
    *reinterpret_cast<uint16_t*>(zero) = to_half_saturating(low);
  }
}

// Grid: warps over (token group, KV head), heads fastest.
template <class F, int kLanes>
__global__ void __launch_bounds__(kStoreThreads) store_kernel(const __grid_constant__ StoreArgs p) {
  constexpr int kVectors = 32 / kLanes;
  const StoreParams& s = p.store;
  const PageLayout& layout = s.cache.layout;
  const int lane = threadIdx.x % 32, part = lane % kLanes;
  const int64_t warp = int64_t{blockIdx.x} * (kStoreThreads / 32) + threadIdx.x / 32;
  const int64_t group = warp / layout.num_kv_heads;
  const int head = static_cast<int>(warp - group * layout.num_kv_heads);
  const int64_t token = group * kVectors + lane / kLanes;
  if (group * kVectors >= s.num_tokens) return;
  int64_t slot = token < s.num_tokens ? s.slot_mapping[token] : -1;
  if (slot >= s.cache.num_blocks * layout.block_size) slot = -1;
  const bool valid = slot >= 0;
  const int64_t entry = valid ? slot / layout.block_size : 0;
  const int offset = static_cast<int>(valid ? slot - entry * layout.block_size : 0);
  uint8_t* atom = s.cache.data + entry * s.cache.block_stride + layout.atom_offset(head, offset);
  const int row = offset % kAtomTokens;
  float key[16], value[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) key[i] = value[i] = 0.0f;
  if (valid && 16 * part < layout.head_dim) {
    load_16(key, s.dtype, s.key, token * s.key_token_stride + head * s.key_head_stride + 16 * part, p.vector_key);
  }
  if (valid && 16 * part < layout.head_dim_v) {
    load_16(value, s.dtype, s.value, token * s.value_token_stride + head * s.value_head_stride + 16 * part,
            p.vector_value);
  }
  store_key<F, kLanes>(p, key, part, layout.head_dim, hadamard_block_of(part, layout.head_dim),
                       atom + layout.key_row_offset(row), atom + layout.key_norm_offset(row), valid);
  store_value<F, kLanes>(value, part, layout.head_dim_v, atom + layout.value_row_offset(row),
                         atom + layout.value_scale_offset(row), atom + layout.value_zero_offset(row), valid);
}

}  // namespace tq::cuda
