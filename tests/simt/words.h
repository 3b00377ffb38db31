// words.h - CUDA's words, as hip/arch/words.h has them, for kernels that the host compiler compiles: a thread is a
// fiber of simt.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/simt.h"

#define __device__
#define __host__
#define __launch_bounds__(n)
#define TQ_DEVICE inline __attribute__((always_inline))
#define TQ_ENTRY(name, threads, Args) extern "C" __attribute__((visibility("default"))) void name(const Args& p)
#define TQ_CONSTANT(Type, name, value)                               \
  extern "C" __attribute__((visibility("default"))) const Type name; \
  const Type name = value
#define TQ_KERNEL(threads) inline void
#define TQ_ARGUMENT(Args) const Args&
#define TQ_SHARED(Type, name) Type& name = *static_cast<Type*>(simt::shared_memory(sizeof(Type)))

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())
inline void __syncthreads() { simt::block_barrier(); }

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
