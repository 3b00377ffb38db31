// store.cuh - compresses K and V of new tokens into pages: rotate, normalise, quantize, pack and scatter in one launch.
//
// A vector lies in kLanes lanes, 16 dimensions each (row_lanes.cuh), so a warp of kWave lanes holds kWave / kLanes of
// them: one KV head of as many tokens, keys or values: a step of one token is as long as one warp's chain of
// instructions. The same arithmetic as codec/reference.cc in float; codes differ from it at ties only.
#pragma once

#include "kernels/gpu/arguments.h"
#include "kernels/gpu/codes.cuh"
#include "kernels/gpu/elements.cuh"
#include "kernels/gpu/row_lanes.cuh"

namespace tq::gpu {

constexpr float kLargestKey = 1e15f;  // its square times 512 is finite in float
constexpr float kLargestHalf = 65504.0f;

TQ_DEVICE float make_finite(float x, float limit) { return x != x ? 0.0f : fminf(fmaxf(x, -limit), limit); }
TQ_DEVICE uint16_t to_half_saturating(float x) { return half_bits(fminf(x, kLargestHalf)); }

// Round to nearest even, saturate to 448, NaN to 0: in integers, the same on every device. (codec/float_bits.cc)
TQ_DEVICE uint32_t to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  if (x != x) return 0;
  const float a = fminf(fabsf(x), 448.0f);
  if (a < 0.015625f) {  // below the smallest normal, 2^-6: steps of 2^-9
    return sign | static_cast<uint32_t>(round_to_int(a * 512.0f));
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
      pair |= shuffle_down(high, 1) << 2;
    }
    if (!valid) return;
    auto* to = reinterpret_cast<uint16_t*>(row + 4 * unit);
    to[0] = static_cast<uint16_t>(low), to[1] = static_cast<uint16_t>(low >> 16);
    if (unit & 1) return;
    auto* plane = reinterpret_cast<uint16_t*>(row + high_word_offset(dim, unit));
    if (16 * unit + 16 == dim) {
      plane[0] = static_cast<uint16_t>(gather_half_unit(high));
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

// The thresholds of the codebook's positive half, in registers: as constants the compiler would index them by what a
// comparison gave, which is a load.
template <int kBits>
struct Thresholds {
  static constexpr int kCount = (1 << (kBits - 1)) - 1;
  float m[kCount];

  TQ_DEVICE explicit Thresholds(const DeviceBook& book) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) m[i] = opaque_float(book.midpoints[i]);
  }

  // The codebook entry next to x, in standard deviations, by binary search. A tie goes up: on the negative side towards
  // zero, so there |x| must exceed a threshold, which is what the float below |x| must reach.
  TQ_DEVICE uint32_t code(float x) const {
    constexpr uint32_t kHalf = 1u << (kBits - 1);
    const bool negative = x < 0.0f;
    const float a = __int_as_float(__float_as_int(fabsf(x)) - (negative ? 1 : 0));
    uint32_t code;
    if constexpr (kBits == 4) {
      const bool b2 = a >= m[3];
      const float low = b2 ? m[4] : m[0], middle = b2 ? m[5] : m[1], high = b2 ? m[6] : m[2];
      const bool b1 = a >= middle;
      const bool b0 = a >= (b1 ? high : low);
      code = (b2 ? 4u : 0u) | (b1 ? 2u : 0u) | (b0 ? 1u : 0u);
    } else {
      const bool b1 = a >= m[1];
      const bool b0 = a >= (b1 ? m[2] : m[0]);
      code = (b1 ? 2u : 0u) | (b0 ? 1u : 0u);
    }
    return code ^ (negative ? kHalf - 1 : kHalf);
  }
};

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
    const float n = sqrt_approx(squares);
    hadamard_lanes<kLanes>(x, part, block);
    const float factor =
        divide_approx(sqrt_approx(divide_approx(static_cast<float>(dim), static_cast<float>(block))), n + 1e-8f);
    const Thresholds<F::kKeyBits> thresholds(p.book);
    uint32_t code[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) code[i] = thresholds.code(x[i] * factor);
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
          level_squares += dot4(u[i], u[i]) - 128 * dot4(u[i], 0x01010101u) + 4 * 4096;
        }
      }
    }
    level_squares = reduce_row<kLanes>(level_squares, [](int a, int b) { return a + b; });
    store_unit<F::kKeyBits, kLanes>(row, part, dim, w0, w1, valid);
    if (valid && part == 0) {
      const float level_norm =
          sqrt_approx(static_cast<float>(level_squares)) * p.book.unit * rsqrtf(static_cast<float>(dim));
      *reinterpret_cast<uint16_t*>(norm) = to_half_saturating(divide_approx(n, level_norm));
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
  // (x - low) / s rounded to nearest: a product with the rounded reciprocal and one correction, exact in this range
  // (Markstein). No clamp: x - low is at most kTop * s but for its rounding.
  const float inverse = reciprocal_rn(s);
  uint32_t code[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float d = x[i] - low, guess = d * inverse;
    const float quotient = fmaf(fmaf(-guess, s, d), inverse, guess);
    code[i] = floor_bits(quotient + 0.5f) & kTop;
  }
  uint32_t w0, w1;
  nibble_words<F::kValueBits>(code, w0, w1);
  store_unit<F::kValueBits, kLanes>(row, part, dim, w0, w1, valid);
  if (valid && part == 0) {
    *reinterpret_cast<uint16_t*>(scale) = to_half_saturating(s);
    *reinterpret_cast<uint16_t*>(zero) = to_half_saturating(low);
  }
}

// slot / block_size and the rest; slots rarely need 64 bits, whose division costs as much as the rest of the address.
TQ_DEVICE int64_t divide_slot(int64_t slot, int block_size, int& rest) {
  if (slot >> 32 == 0) {
    const auto low = static_cast<uint32_t>(slot);
    const uint32_t entry = low / static_cast<uint32_t>(block_size);
    rest = static_cast<int>(low - entry * block_size);
    return entry;
  }
  const int64_t entry = slot / block_size;
  rest = static_cast<int>(slot - entry * block_size);
  return entry;
}

// Grid: warps over (token group, KV head, keys or values), the last fastest.
template <class F, int kLanes, int kWave>
TQ_KERNEL(kStoreThreads)
store_kernel(TQ_ARGUMENT(StoreArgs) p) {
  constexpr uint32_t kVectors = kWave / kLanes;
  const StoreParams& s = p.store;
  const PageLayout& layout = s.cache.layout;
  const int lane = threadIdx.x % kWave, part = lane % kLanes;
  const uint32_t warp = blockIdx.x * (kStoreThreads / kWave) + threadIdx.x / kWave;
  const bool is_key = warp % 2 == 0;
  const uint32_t group = warp / 2 / layout.num_kv_heads;
  const int head = static_cast<int>(warp / 2 - group * layout.num_kv_heads);
  if (int64_t{group} * kVectors >= s.num_tokens) return;
  const int64_t token = int64_t{group} * kVectors + lane / kLanes;
  const int dim = is_key ? layout.head_dim : layout.head_dim_v;
  wait_for_previous_grid();
  // The slot and the vector come at the same time; a vector without a slot is not stored.
  const bool exists = token < s.num_tokens;
  const int64_t slot = exists ? s.slot_mapping[token] : -1;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = 0.0f;
  if (exists && 16 * part < dim) {
    const int64_t at = is_key ? token * s.key_token_stride + head * s.key_head_stride
                              : token * s.value_token_stride + head * s.value_head_stride;
    load_16(x, s.dtype, is_key ? s.key : s.value, at + 16 * part, is_key ? p.vector_key : p.vector_value);
  }
  let_next_grid_launch();
  const bool valid = slot >= 0 && slot < s.cache.num_blocks * layout.block_size;
  int offset = 0;
  const int64_t entry = valid ? divide_slot(slot, layout.block_size, offset) : 0;
  uint8_t* atom = s.cache.data + entry * s.cache.block_stride + layout.atom_offset(head, offset);
  const int row = offset % kAtomTokens;
  if (is_key) {
    store_key<F, kLanes>(p, x, part, dim, hadamard_block_of(part, dim), atom + layout.key_row_offset(row),
                         atom + layout.key_norm_offset(row), valid);
  } else {
    store_value<F, kLanes>(x, part, dim, atom + layout.value_row_offset(row), atom + layout.value_scale_offset(row),
                           atom + layout.value_zero_offset(row), valid);
  }
}

}  // namespace tq::gpu
