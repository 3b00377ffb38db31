// target.cuh - NVIDIA GPUs as a target of the shared kernel bodies (kernels/gpu/target.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/arch/ptx.cuh"

#define TQ_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define TQ_ARGUMENT(Args) const __grid_constant__ Args

namespace tq::gpu {

using cuda::byte_permute;
using cuda::exp2_approx;
using cuda::let_next_grid_launch;
using cuda::log2_approx;
using cuda::opaque_float;
using cuda::sqrt_approx;
using cuda::wait_for_previous_grid;

// All lanes of a warp take part in a shuffle.
template <class T>
TQ_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(cuda::kFullMask, x, mask);
}
template <class T>
TQ_DEVICE T shuffle_down(T x, int distance) {
  return __shfl_down_sync(cuda::kFullMask, x, distance);
}

using Half = __half;
TQ_DEVICE uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
TQ_DEVICE float half_value(Half x) { return __half2float(x); }
TQ_DEVICE uint16_t bfloat_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
TQ_DEVICE uint32_t pack_half2(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
TQ_DEVICE float2 unpack_half2(uint32_t u) { return __half22float2(*reinterpret_cast<const __half2*>(&u)); }
TQ_DEVICE uint32_t pack_bfloat2(float a, float b) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
TQ_DEVICE float2 unpack_bfloat2(uint32_t u) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&u)); }
TQ_DEVICE uint32_t pair_of_half(float x) {
  const __half2 h = __float2half2_rn(x);
  return *reinterpret_cast<const uint32_t*>(&h);
}
TQ_DEVICE uint32_t subtract_half2(uint32_t a, uint32_t b) {
  const __half2 h = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&h);
}

TQ_DEVICE float divide_approx(float a, float b) { return __fdividef(a, b); }
TQ_DEVICE float reciprocal_rn(float x) { return __frcp_rn(x); }
TQ_DEVICE int round_to_int(float x) { return __float2int_rn(x); }
// The low bits of the largest integer <= x, x in [0, 2^22): an addition that rounds down at 2^23, where floats are
// integers.
TQ_DEVICE uint32_t floor_bits(float x) { return __float_as_uint(__fadd_rd(x, 8388608.0f)); }

// Sum of the products of the four unsigned bytes.
TQ_DEVICE int dot4(uint32_t a, uint32_t b) { return static_cast<int>(__dp4a(a, b, 0u)); }

// Permutes, shifts and logic share one unit, which a lookup would keep busy alone. So the high half comes down by a dot
// product, and words without a common bit are joined by a multiply-add: both belong to the unit of float arithmetic.
// The factor is 1 in every launch (device.h), which the compiler does not know; it would go back to an OR.
TQ_DEVICE uint32_t high_half(uint32_t x) { return __dp2a_lo(x, 0x0100u, 0u); }
TQ_DEVICE uint32_t join_bits(uint32_t a, uint32_t b) { return a * blockDim.z + b; }

// Bytes 0-15 (kBits 4) or 0-7 (3) of a table, each < 128, at the eight nibbles of w. With a nibble's top bit set a byte
// permute gives the sign of a table byte, which is 0; so the two halves of a 16-entry table can be looked up apart and
// joined.
template <int kBits>
TQ_DEVICE void lookup_nibbles(const uint32_t (&table)[4], uint32_t w, uint32_t& lo, uint32_t& hi) {
  if constexpr (kBits == 4) {
    const uint32_t x = w ^ 0x88888888u;
    lo = join_bits(byte_permute(table[0], table[1], w), byte_permute(table[2], table[3], x));
    hi = join_bits(byte_permute(table[0], table[1], high_half(w)), byte_permute(table[2], table[3], high_half(x)));
  } else {
    lo = byte_permute(table[0], table[1], w);
    hi = byte_permute(table[0], table[1], high_half(w));
  }
}

}  // namespace tq::gpu

namespace tq::cuda {
using namespace tq::gpu;  // the kernels for NVIDIA alone are built from the shared parts too
}
