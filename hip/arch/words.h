// words.h - CUDA's words for clang's AMDGPU target, so that no header and no device library of ROCm is needed: builtins
// that lower to instructions, and nothing else.
#pragma once

#include <stdint.h>

#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __launch_bounds__(n) __attribute__((launch_bounds(n), amdgpu_flat_work_group_size(n, n)))
#define TQ_DEVICE __device__ inline __attribute__((always_inline))

// An entry point has C's name, so that the host can ask for it; a body is called by it.
#define TQ_ENTRY(name, threads, Args) extern "C" __global__ void __launch_bounds__(threads) name(const Args p)
#define TQ_CONSTANT(Type, name, value) extern "C" __device__ __attribute__((used)) const Type name = value
#define TQ_KERNEL(threads) TQ_DEVICE void
#define TQ_ARGUMENT(Args) const Args&
#define TQ_SHARED(Type, name) __shared__ Type name

struct TqThreadIndex {
  __declspec(property(get = get_x)) unsigned x;
  __device__ unsigned get_x() const { return __builtin_amdgcn_workitem_id_x(); }
};
struct TqBlockIndex {
  __declspec(property(get = get_x)) unsigned x;
  __declspec(property(get = get_y)) unsigned y;
  __declspec(property(get = get_z)) unsigned z;
  __device__ unsigned get_x() const { return __builtin_amdgcn_workgroup_id_x(); }
  __device__ unsigned get_y() const { return __builtin_amdgcn_workgroup_id_y(); }
  __device__ unsigned get_z() const { return __builtin_amdgcn_workgroup_id_z(); }
};
struct TqBlockSize {
  __declspec(property(get = get_x)) unsigned x;
  __device__ unsigned get_x() const { return __builtin_amdgcn_workgroup_size_x(); }
};
struct TqGridSize {  // in blocks; a block is one row of threads
  __declspec(property(get = get_y)) unsigned y;
  __device__ unsigned get_y() const { return __builtin_amdgcn_grid_size_y(); }
};
static constexpr __device__ TqThreadIndex threadIdx = {};
static constexpr __device__ TqBlockIndex blockIdx = {};
static constexpr __device__ TqBlockSize blockDim = {};
static constexpr __device__ TqGridSize gridDim = {};

TQ_DEVICE void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

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
TQ_DEVICE uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
TQ_DEVICE uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
TQ_DEVICE float2 make_float2(float x, float y) { return {x, y}; }
TQ_DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
TQ_DEVICE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
TQ_DEVICE T max(T a, T b) {
  return a < b ? b : a;
}
TQ_DEVICE float fminf(float a, float b) { return __builtin_fminf(a, b); }
TQ_DEVICE float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
TQ_DEVICE float fabsf(float x) { return __builtin_fabsf(x); }
TQ_DEVICE float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TQ_DEVICE float log2f(float x) { return __builtin_log2f(x); }
TQ_DEVICE float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
TQ_DEVICE int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
TQ_DEVICE uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
TQ_DEVICE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
TQ_DEVICE float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif
