// units.cuh - one unit (16 dimensions of one token's row) in registers: loaded packed, decoded later.
#pragma once

#include "kernels/gpu/codes.cuh"
#include "kernels/gpu/elements.cuh"
#include "kernels/kernels.h"

namespace tq::gpu {

// The atom that holds a token of a sequence. A block that does not exist must not become a wild read.
TQ_DEVICE const uint8_t* token_atom(const PagedCache& cache, const int32_t* table, int head, int token) {
  const PageLayout& layout = cache.layout;
  const int entry = token / layout.block_size;
  const int64_t block = min(max(int64_t{table[entry]}, int64_t{0}), cache.num_blocks - 1);
  return cache.data + block * cache.block_stride + layout.atom_offset(head, token - entry * layout.block_size);
}

TQ_DEVICE float load_half(const uint8_t* p) { return half_value(*reinterpret_cast<const Half*>(p)); }

// bits: 3, 4, 5 or 8. Units beyond a row's end load as zeros.
template <int kBits>
struct RawUnit {
  // 3 and 5 bits: low plane, then the high plane's word with bit 4i + g in place.
  uint32_t w[kBits == 8 ? 4 : kBits == 5 ? 3 : 2];

  TQ_DEVICE void load(const uint8_t* row, int unit, int dim) {
#pragma unroll
    for (uint32_t& x : w) x = 0;
    if (16 * unit >= dim) return;
    if constexpr (kBits == 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(row + 16 * unit);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else if constexpr (kBits == 4) {
      const uint2 v = *reinterpret_cast<const uint2*>(row + 8 * unit);
      w[0] = v.x, w[1] = v.y;
    } else {
      uint32_t& high = w[kBits == 5 ? 2 : 1];
      if constexpr (kBits == 3) {
        w[0] = load_u32_by_halves(row + 4 * unit);
      } else {
        w[0] = load_u32_by_halves(row + 8 * unit), w[1] = load_u32_by_halves(row + 8 * unit + 4);
      }
      const uint8_t* plane = row + high_word_offset(kBits, dim, unit);
      if (16 * unit + 16 == dim && (unit & 1) == 0) {
        high = spread_half_unit(*reinterpret_cast<const uint16_t*>(plane));
      } else {
        high = load_u32_by_halves(plane) >> (2 * (unit & 1));
      }
    }
  }

  // Codes 2i and 2i + 1 of the unit as a pair of bytes for i = 0..7; F maps words of nibbles, and of 5-bit codes'
  // other bits, to bytes.
  template <class Bytes>
  TQ_DEVICE void byte_pairs(const Bytes& bytes, uint32_t (&pairs)[8]) const {
    if constexpr (kBits != 3) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        uint32_t lo, hi;
        bytes(w[g], kBits == 5 ? w[kBits == 5 ? 2 : 1] >> g : 0u, lo, hi);
        pairs[4 * g] = lo & 0xFFFFu, pairs[4 * g + 1] = lo >> 16;
        pairs[4 * g + 2] = hi & 0xFFFFu, pairs[4 * g + 3] = hi >> 16;
      }
    } else {
      uint32_t even, odd, e[2], o[2];
      join_planes(w[0], w[1], even, odd);
      bytes(even, 0u, e[0], e[1]);
      bytes(odd, 0u, o[0], o[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t lo = byte_permute(e[i], o[i], 0x5140), hi = byte_permute(e[i], o[i], 0x7362);
        pairs[4 * i] = lo & 0xFFFFu, pairs[4 * i + 1] = lo >> 16;
        pairs[4 * i + 2] = hi & 0xFFFFu, pairs[4 * i + 3] = hi >> 16;
      }
    }
  }

  // Levels of a codebook as eight pairs of fp16.
  TQ_DEVICE void level_halves(const DeviceBook& book, uint32_t (&h)[8]) const {
    uint32_t pairs[8];
    byte_pairs([&book](uint32_t x, uint32_t high, uint32_t& lo,
                       uint32_t& hi) { levels_of_nibbles<kBits>(book, x, high, lo, hi); },
               pairs);
    const uint32_t offset = pair_of_half(1024.0f + kLevelOffset);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      h[i] = subtract_half2(byte_permute(pairs[i], 0x64u, 0x4140), offset);  // fp16 1024 + byte
    }
  }

  // Keys of format F as eight pairs of fp16: levels, or numbers / kFp8Scale.
  template <class F>
  TQ_DEVICE void key_halves(const DeviceBook& book, uint32_t (&h)[8]) const {
    if constexpr (F::kIntegerKeys) {
      const uint32_t offset = pair_of_half(1024.0f + kIntegerZero);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        h[2 * i] = subtract_half2(byte_permute(w[i], 0x64u, 0x4140), offset);
        h[2 * i + 1] = subtract_half2(byte_permute(w[i], 0x64u, 0x4342), offset);
      }
    } else if constexpr (!F::kRotatesKeys) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        h[2 * i] = half2_of_fp8(byte_permute(w[i], 0, 0x1404));
        h[2 * i + 1] = half2_of_fp8(byte_permute(w[i], 0, 0x3424));
      }
    } else {
      level_halves(book, h);
    }
  }

  template <class F>
  TQ_DEVICE void key_floats(const DeviceBook& book, float (&x)[16]) const {
    uint32_t h[8];
    key_halves<F>(book, h);
    widen_halves(h, x);
  }

  TQ_DEVICE static void widen_halves(const uint32_t (&h)[8], float (&x)[16]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 f = unpack_half2(h[i]);
      x[2 * i] = f.x;
      x[2 * i + 1] = f.y;
    }
  }

  // Values of format F, still rotated where they are. zero: of uniform codes; of levels scale is what one is worth.
  template <class F>
  TQ_DEVICE void value_floats(const DeviceBook& book, float scale, float zero, float (&x)[16]) const {
    if constexpr (F::kRotatesValues) {
      uint32_t h[8];
      level_halves(book, h);
      widen_halves(h, x);
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] *= scale;
    } else {
      uniform_floats(scale, zero, x);
    }
  }
  template <class F>
  TQ_DEVICE void value_halves(const DeviceBook& book, float scale, float zero, uint32_t (&h)[8]) const {
    float x[16];
    value_floats<F>(book, scale, zero, x);
    // scale and zero are fp16, but their sum may round up past its range.
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i] = pack_half2(fminf(x[2 * i], 65504.0f), fminf(x[2 * i + 1], 65504.0f));
  }

 private:
  TQ_DEVICE void uniform_floats(float scale, float zero, float (&x)[16]) const {
    uint32_t pairs[8];
    byte_pairs(
        [](uint32_t nibbles, uint32_t, uint32_t& lo, uint32_t& hi) {
          const uint32_t even = nibbles & 0x0F0F0F0Fu, odd = (nibbles >> 4) & 0x0F0F0F0Fu;
          lo = byte_permute(even, odd, 0x5140);
          hi = byte_permute(even, odd, 0x7362);
        },
        pairs);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[2 * i] = fmaf(static_cast<float>(pairs[i] & 255u), scale, zero);
      x[2 * i + 1] = fmaf(static_cast<float>(pairs[i] >> 8), scale, zero);
    }
  }
};

}  // namespace tq::gpu
