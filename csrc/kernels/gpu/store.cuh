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

// Sixteen codes in dimension order as words of nibbles; of 5-bit ones bit 4 of dimension 8g + i is bit 4i + g of high.
template <int kBits>
struct CodeWords {
  uint32_t w[2] = {};
  uint32_t high = 0;

  TQ_DEVICE explicit CodeWords(const uint32_t (&code)[16]) {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t c = code[nibble_dim<kBits>(g, i)];
        w[g] |= (kBits == 5 ? c & 15u : c) << (4 * i);
        if constexpr (kBits == 5) high |= (c >> 4) << (4 * i + g);
      }
    }
  }

  // Their offset levels; byte i of u[2 * g] and u[2 * g + 1] is nibble i of word g.
  TQ_DEVICE void levels(const DeviceBook& book, uint32_t (&u)[4]) const {
    levels_of_nibbles<kBits>(book, w[0], high, u[0], u[1]);
    levels_of_nibbles<kBits>(book, w[1], high >> 1, u[2], u[3]);
  }
};

TQ_DEVICE void store_u32_by_halves(uint8_t* p, uint32_t x) {
  auto* to = reinterpret_cast<uint16_t*>(p);
  to[0] = static_cast<uint16_t>(x), to[1] = static_cast<uint16_t>(x >> 16);
}

// Packs the codes of a unit into a row.
template <int kBits, int kLanes>
TQ_DEVICE void store_unit(uint8_t* row, int unit, int dim, const CodeWords<kBits>& codes, bool valid) {
  const uint32_t w0 = codes.w[0], w1 = codes.w[1];
  if constexpr (kBits == 4) {
    if (valid) *reinterpret_cast<uint2*>(row + 8 * unit) = make_uint2(w0, w1);
  } else {
    uint32_t high = codes.high;
    if constexpr (kBits == 3) high = ((w0 & 0x44444444u) >> 2) | ((w1 & 0x44444444u) >> 1);  // bit 4i + g
    uint32_t pair = high;
    if constexpr (kLanes > 1) {  // the even unit's lane takes the odd one's bits
      pair |= shuffle_down(high, 1) << 2;
    }
    if (!valid) return;
    if constexpr (kBits == 3) {
      store_u32_by_halves(row + 4 * unit, (w0 & 0x33333333u) | ((w1 & 0x33333333u) << 2));
    } else {
      store_u32_by_halves(row + 8 * unit, w0);
      store_u32_by_halves(row + 8 * unit + 4, w1);
    }
    if (unit & 1) return;
    uint8_t* plane = row + high_word_offset(kBits, dim, unit);
    if (16 * unit + 16 == dim) {
      *reinterpret_cast<uint16_t*>(plane) = static_cast<uint16_t>(gather_half_unit(high));
    } else {
      store_u32_by_halves(plane, pair);
    }
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
    uint32_t code = 0;
    // Each turn keeps half of the thresholds that are left; all places are known to the compiler.
    float left[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) left[i] = m[i];
#pragma unroll
    for (int count = kCount; count > 0; count /= 2) {
      const bool above = a >= left[count / 2];
      code = 2 * code + (above ? 1u : 0u);
#pragma unroll
      for (int i = 0; i < count / 2; ++i) left[i] = above ? left[count / 2 + 1 + i] : left[i];
    }
    return code ^ (negative ? kHalf - 1 : kHalf);
  }
};

// Rotates x, quantizes it to a codebook and stores it with its norm.
template <int kBits, NormRule kRule, int kLanes>
TQ_DEVICE void store_levels(const DeviceBook& book, float (&x)[16], int part, int dim, int block, uint8_t* row,
                            uint8_t* norm, bool valid) {
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
  const Thresholds<kBits> thresholds(book);
  uint32_t code[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    x[i] *= factor;
    code[i] = thresholds.code(x[i]);
  }
  const CodeWords<kBits> codes(code);
  uint32_t u[4];
  codes.levels(book, u);
  float stored;
  if constexpr (kRule == NormRule::kPreserving) {  // the chosen levels' own norm
    int level_squares = 0;
    if (16 * part < dim) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // sum of (u - 64)^2
        level_squares += dot4(u[i], u[i]) - 128 * dot4(u[i], 0x01010101u) + 4 * 4096;
      }
    }
    level_squares = reduce_row<kLanes>(level_squares, [](int a, int b) { return a + b; });
    stored =
        divide_approx(n, sqrt_approx(static_cast<float>(level_squares)) * book.unit * rsqrtf(static_cast<float>(dim)));
  } else {  // how far the levels go along x
    float along = 0.0f;
    if (16 * part < dim) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const auto level = static_cast<float>((u[2 * g + i / 4] >> (8 * (i % 4))) & 255u) - kLevelOffset;
          along = fmaf(x[nibble_dim<kBits>(g, i)], level, along);
        }
      }
    }
    along = reduce_row<kLanes>(along, [](float a, float b) { return a + b; });
    stored = along > 0.0f ? n * divide_approx(static_cast<float>(dim), along * book.unit) : 0.0f;
  }
  store_unit<kBits, kLanes>(row, part, dim, codes, valid);
  if (valid && part == 0) *reinterpret_cast<uint16_t*>(norm) = to_half_saturating(stored);
}

// a / b rounded to nearest, by a product with the rounded reciprocal of b and one correction (Markstein).
TQ_DEVICE float divide_rn(float a, float b, float inverse) {
  const float guess = a * inverse;
  return fmaf(fmaf(-guess, b, a), inverse, guess);
}

// Rotates a key and stores it as integers up to its largest element, with its norm.
template <int kLanes>
TQ_DEVICE void store_integers(float (&x)[16], int part, int dim, int block, uint8_t* row, uint8_t* norm, bool valid) {
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = make_finite(x[i], kLargestKey);
  hadamard_lanes<kLanes>(x, part, block);
  const float to_unit = rsqrtf(static_cast<float>(block));
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    x[i] *= to_unit;
    largest = fmaxf(largest, fabsf(x[i]));
  }
  largest = reduce_row<kLanes>(largest, [](float a, float b) { return fmaxf(a, b); });
  const float deviations = kIntegerScale * sqrt_approx(static_cast<float>(dim));
  const uint16_t half = to_half_saturating(largest * (deviations / kIntegerTop));
  const float step = unpack_half2(half).x / deviations;  // as it will be decoded
  const float inverse = step > 0.0f ? reciprocal_rn(step) : 0.0f;
  uint32_t w[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float level = fminf(fmaxf(divide_rn(x[i], step, inverse), -127.0f), 127.0f);
    w[i / 4] |= static_cast<uint32_t>(round_to_int(level) + kIntegerZero) << (8 * (i % 4));
  }
  if (valid) *reinterpret_cast<uint4*>(row + 16 * part) = make_uint4(w[0], w[1], w[2], w[3]);
  if (valid && part == 0) *reinterpret_cast<uint16_t*>(norm) = half;
}

template <class F, int kLanes>
TQ_DEVICE void store_key(const StoreArgs& p, float (&x)[16], int part, int dim, uint8_t* row, uint8_t* norm,
                         bool valid) {
  valid = valid && 16 * part < dim;
  if constexpr (!F::kRotatesKeys) {
    uint32_t w[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) w[i / 4] |= to_e4m3(x[i]) << (8 * (i % 4));
    if (valid) *reinterpret_cast<uint4*>(row + 16 * part) = make_uint4(w[0], w[1], w[2], w[3]);
  } else if constexpr (F::kIntegerKeys) {
    store_integers<kLanes>(x, part, dim, hadamard_block_of(part, dim), row, norm, valid);
  } else {
    store_levels<F::kKeyBits, F::kNormRule, kLanes>(p.key_book, x, part, dim, hadamard_block_of(part, dim), row, norm,
                                                    valid);
  }
}

// Uniform codes between the least and the largest element.
template <int kBits, int kLanes>
TQ_DEVICE void store_uniform(float (&x)[16], int part, int dim, uint8_t* row, uint8_t* scale, uint8_t* zero,
                             bool valid) {
  const bool holds = 16 * part < dim;
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
  constexpr int kTop = (1 << kBits) - 1;
  const float s = fmaxf((high - low) / static_cast<float>(kTop), 1e-8f);
  // Exact in this range. No clamp: x - low is at most kTop * s but for its rounding.
  const float inverse = reciprocal_rn(s);
  uint32_t code[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) code[i] = floor_bits(divide_rn(x[i] - low, s, inverse) + 0.5f) & kTop;
  store_unit<kBits, kLanes>(row, part, dim, CodeWords<kBits>(code), valid);
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
  if (is_key && s.key_offset != nullptr && 16 * part < dim) {
    float offset[16];
    load_16(offset, Dtype::kF32, s.key_offset, head * dim + 16 * part, false);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] -= offset[i];
  }
  let_next_grid_launch();
  const bool valid = slot >= 0 && slot < s.cache.num_blocks * layout.block_size;
  int offset = 0;
  const int64_t entry = valid ? divide_slot(slot, layout.block_size, offset) : 0;
  uint8_t* atom = s.cache.data + entry * s.cache.block_stride + layout.atom_offset(head, offset);
  const int row = offset % kAtomTokens;
  if (is_key) {
    store_key<F, kLanes>(p, x, part, dim, atom + layout.key_row_offset(row), atom + layout.key_norm_offset(row), valid);
  } else if constexpr (F::kRotatesValues) {
    store_levels<F::kValueBits, F::kNormRule, kLanes>(p.value_book, x, part, dim, hadamard_block_of(part, dim),
                                                      atom + layout.value_row_offset(row),
                                                      atom + layout.value_scale_offset(row), valid && 16 * part < dim);
  } else {
    store_uniform<F::kValueBits, kLanes>(x, part, dim, atom + layout.value_row_offset(row),
                                         atom + layout.value_scale_offset(row), atom + layout.value_zero_offset(row),
                                         valid && 16 * part < dim);
  }
}

}  // namespace tq::gpu
