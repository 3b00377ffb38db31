// codes.cuh - from packed codes to numbers, 8 or 16 at a time. A "unit" is 16 consecutive dimensions of a row.
//
//   4 bits  two words; nibble i of word w is dimension 8w + i. 5 bits: the same, and a word of the second plane has bit
//           4 of that code at bit 4i + w (of the first unit of two; 2 higher of the second).
//   3 bits  after unpacking the planes two words too, but nibble i of word g is dimension 2i + g (page_layout.h).
#pragma once

#include "kernels/gpu/target.h"
#include "kernels/gpu/device_book.h"
#include "layout/page_layout.h"

namespace tq::gpu {

// Eight codes to eight offset levels, nibbles 0-3 in lo, 4-7 in hi. 3-bit codes leave a nibble's top bit clear; of
// 5-bit ones bit 4i of high is bit 4 of the code whose other bits are nibble i.
template <int kBits>
TQ_DEVICE void levels_of_nibbles(const DeviceBook& book, uint32_t w, uint32_t high, uint32_t& lo, uint32_t& hi) {
  if constexpr (kBits != 5) return lookup_nibbles<kBits>(book.bytes, w, lo, hi);
  uint32_t l[2], u[2];
  lookup_nibbles<4>(book.bytes, w, l[0], l[1]);
  lookup_nibbles<4>(book.upper, w, u[0], u[1]);
  const uint32_t even = (high & 0x01010101u) * 255u, odd = ((high >> 4) & 0x01010101u) * 255u;
  const uint32_t first = byte_permute(even, odd, 0x5140), second = byte_permute(even, odd, 0x7362);
  lo = (l[0] & ~first) | (u[0] & first);
  hi = (l[1] & ~second) | (u[1] & second);
}

// 3 bits: 16 codes of the low plane and the unit's high bits, high = bit 4i + g, to nibbles of even and odd dimensions.
TQ_DEVICE void join_planes(uint32_t low, uint32_t high, uint32_t& even, uint32_t& odd) {
  even = (low & 0x33333333u) | ((high << 2) & 0x44444444u);
  odd = ((low >> 2) & 0x33333333u) | ((high << 1) & 0x44444444u);
}

// Where 3-bit rows of odd multiples of 16 lie, only 2-byte loads are aligned.
TQ_DEVICE uint32_t load_u32_by_halves(const uint8_t* p) {
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
  return h[0] | uint32_t{h[1]} << 16;
}

// The two words of nibbles of a unit of a row of dim dimensions. kAligned: dim is a multiple of 32, so rows are words.
template <int kBits, bool kAligned>
TQ_DEVICE void load_unit(const uint8_t* row, int unit, int dim, uint32_t& w0, uint32_t& w1) {
  if constexpr (kBits == 4) {
    const uint32_t* p = reinterpret_cast<const uint32_t*>(row + 8 * unit);
    w0 = p[0];
    w1 = p[1];
  } else {
    const uint8_t* plane = row + high_word_offset(kBits, dim, unit);
    uint32_t low, high;
    if constexpr (kAligned) {
      low = *reinterpret_cast<const uint32_t*>(row + 4 * unit);
      high = *reinterpret_cast<const uint32_t*>(plane) >> (2 * (unit & 1));
      return join_planes(low, high, w0, w1);
    }
    low = load_u32_by_halves(row + 4 * unit);
    if (16 * unit + 16 == dim && (unit & 1) == 0) {
      high = spread_half_unit(*reinterpret_cast<const uint16_t*>(plane));
    } else {
      high = load_u32_by_halves(plane) >> (2 * (unit & 1));
    }
    join_planes(low, high, w0, w1);
  }
}

// Dimension within its unit of nibble i of word w.
template <int kBits>
TQ_DEVICE constexpr int nibble_dim(int w, int i) {
  return kBits == 3 ? 2 * i + w : 8 * w + i;
}

// Two e4m3 bytes, each in the upper half of a 16-bit lane, to two fp16 numbers of 1/256 their value: exponent and
// mantissa move down by one bit, and e4m3's bias is 8 less than fp16's. Exact, subnormals too; the same on every
// device.
constexpr float kFp8Scale = 256.0f;
TQ_DEVICE uint32_t half2_of_fp8(uint32_t upper) { return ((upper >> 1) & 0x3F803F80u) | (upper & 0x80008000u); }

}  // namespace tq::gpu
