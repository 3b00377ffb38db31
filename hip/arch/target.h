// target.h - AMD GPUs as a target of the shared kernel bodies (kernels/gpu/target.h). Only builtins of clang, each one
// instruction: what is not found here is in words.h. The model of the tests (tests/simt) compiles this same file with
// these builtins as functions.
#pragma once

#include <stdint.h>

namespace tq::gpu {

// gfx9 (CDNA) runs waves of 64 lanes; gfx11 and gfx12 (RDNA) are compiled for 32.
#if defined(__GFX9__)
constexpr int kTargetWave = 64;
#else
constexpr int kTargetWave = 32;
#endif

TQ_DEVICE int lane_index() {
#if defined(__GFX9__)
  return static_cast<int>(__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)));
#else
  return static_cast<int>(__builtin_amdgcn_mbcnt_lo(~0u, 0));
#endif
}

// All lanes of a wave take part in a shuffle.
template <class T>
TQ_DEVICE T shuffle_from(T x, int lane) {
  static_assert(sizeof(T) == 4);
  return __builtin_bit_cast(T, __builtin_amdgcn_ds_bpermute(4 * lane, __builtin_bit_cast(int, x)));
}
template <class T>
TQ_DEVICE T shuffle_xor(T x, int mask) {
  return shuffle_from(x, lane_index() ^ mask);
}
// The value of the lane `distance` further; in the last lanes, where there is none, some lane's.
template <class T>
TQ_DEVICE T shuffle_down(T x, int distance) {
  return shuffle_from(x, (lane_index() + distance) & (kTargetWave - 1));
}
template <class T>
TQ_DEVICE T shuffle_up(T x, int distance) {
  return shuffle_from(x, (lane_index() - distance) & (kTargetWave - 1));
}

// What the lanes of a wave wrote to shared memory is visible to its other lanes.
TQ_DEVICE void sync_wave() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

// CUDA's programmatic launches have no counterpart.
TQ_DEVICE void wait_for_previous_grid() {}
TQ_DEVICE void let_next_grid_launch() {}
TQ_DEVICE float opaque_float(float x) { return x; }

// x, computed anew: what depends on it is not kept from one turn of a loop to the next. Each comparison with a lane's
// number that is kept takes two scalar registers, of which there are about a hundred.
TQ_DEVICE int renew(int x) {
#if defined(__AMDGCN__)
  asm volatile("" : "+v"(x));
#endif
  return x;
}

using Half = _Float16;
TQ_DEVICE uint16_t half_bits(float x) { return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x)); }
TQ_DEVICE float half_value(Half x) { return static_cast<float>(x); }
TQ_DEVICE uint16_t bfloat_bits(float x) {  // round to nearest even; a NaN stays one
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  return static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
TQ_DEVICE uint32_t pack_half2(float a, float b) { return half_bits(a) | static_cast<uint32_t>(half_bits(b)) << 16; }
TQ_DEVICE float2 unpack_half2(uint32_t u) {
  return {half_value(__builtin_bit_cast(_Float16, static_cast<uint16_t>(u))),
          half_value(__builtin_bit_cast(_Float16, static_cast<uint16_t>(u >> 16)))};
}
TQ_DEVICE uint32_t pack_bfloat2(float a, float b) {
  return bfloat_bits(a) | static_cast<uint32_t>(bfloat_bits(b)) << 16;
}
TQ_DEVICE float2 unpack_bfloat2(uint32_t u) {
  return {__builtin_bit_cast(float, u << 16), __builtin_bit_cast(float, u & 0xFFFF0000u)};
}
TQ_DEVICE uint32_t pair_of_half(float x) { return half_bits(x) * 0x10001u; }
typedef _Float16 Half2 __attribute__((vector_size(4)));
TQ_DEVICE uint32_t subtract_half2(uint32_t a, uint32_t b) {
  return __builtin_bit_cast(uint32_t, __builtin_bit_cast(Half2, a) - __builtin_bit_cast(Half2, b));
}
TQ_DEVICE uint32_t multiply_half2(uint32_t a, uint32_t b) {
  return __builtin_bit_cast(uint32_t, __builtin_bit_cast(Half2, a) * __builtin_bit_cast(Half2, b));
}

TQ_DEVICE float exp2_approx(float x) { return __builtin_amdgcn_exp2f(x); }
TQ_DEVICE float sqrt_approx(float x) { return __builtin_sqrtf(x); }
TQ_DEVICE float divide_approx(float a, float b) { return a / b; }
TQ_DEVICE float reciprocal_rn(float x) { return 1.0f / x; }
TQ_DEVICE int round_to_int(float x) { return static_cast<int>(__builtin_rintf(x)); }
// The low bits of the largest integer <= x, x in [0, 2^22).
TQ_DEVICE uint32_t floor_bits(float x) { return static_cast<uint32_t>(x); }

// Sum of the products of the four unsigned bytes.
TQ_DEVICE int dot4(uint32_t a, uint32_t b) { return static_cast<int>(__builtin_amdgcn_udot4(a, b, 0, false)); }

// v_perm_b32 numbers the bytes of its second operand 0-3 and those of its first 4-7, and takes a selector of bytes;
// ours takes one of nibbles, each < 8, as CUDA's prmt.
TQ_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t s) {
  return __builtin_amdgcn_perm(b, a, (s & 0xFu) | (s & 0xF0u) << 4 | (s & 0xF00u) << 8 | (s & 0xF000u) << 12);
}

// Bytes 0-15 (kBits 4) or 0-7 (3) of a table at the eight nibbles of w. A permute has eight bytes to choose from, so a
// table of 16 is looked up by halves, and bit 3 of each selector byte, spread over it, takes the one or the other.
template <int kBits>
TQ_DEVICE uint32_t lookup_bytes(const uint32_t (&table)[4], uint32_t selector) {
  if constexpr (kBits == 3) return __builtin_amdgcn_perm(table[1], table[0], selector);
  const uint32_t low = selector & 0x07070707u, upper = ((selector >> 3) & 0x01010101u) * 255u;
  return (__builtin_amdgcn_perm(table[1], table[0], low) & ~upper) |
         (__builtin_amdgcn_perm(table[3], table[2], low) & upper);
}
template <int kBits>
TQ_DEVICE void lookup_nibbles(const uint32_t (&table)[4], uint32_t w, uint32_t& lo, uint32_t& hi) {
  const uint32_t even = lookup_bytes<kBits>(table, w & 0x0F0F0F0Fu);
  const uint32_t odd = lookup_bytes<kBits>(table, (w >> 4) & 0x0F0F0F0Fu);
  lo = byte_permute(even, odd, 0x5140);
  hi = byte_permute(even, odd, 0x7362);
}

}  // namespace tq::gpu

#include "hip/arch/matrix.h"
