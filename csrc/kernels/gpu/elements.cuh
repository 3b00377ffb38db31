// elements.cuh - reading and writing the caller's float32, float16 and bfloat16 tensors.
#pragma once

#include "kernels/gpu/target.h"
#include "kernels/kernels.h"

namespace tq::gpu {

// 16 elements of a 16-bit dtype, as eight words, to floats.
TQ_DEVICE void widen_16(float (&x)[16], Dtype dtype, const uint32_t (&w)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 f = dtype == Dtype::kF16 ? unpack_half2(w[j]) : unpack_bfloat2(w[j]);
    x[2 * j] = f.x;
    x[2 * j + 1] = f.y;
  }
}

// The eight words of 16 elements of a 16-bit dtype, by two 16-byte loads.
TQ_DEVICE void load_words(uint32_t (&w)[8], const uint16_t* p) {
  const uint4 a = *reinterpret_cast<const uint4*>(p);
  const uint4 b = *reinterpret_cast<const uint4*>(p + 8);
  w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
}

// 16 elements from element i of base. vector: base and i are such that 16-byte loads are aligned.
TQ_DEVICE void load_16(float (&x)[16], Dtype dtype, const void* base, int64_t i, bool vector) {
  if (dtype == Dtype::kF32) {
    const float* p = static_cast<const float*>(base) + i;
#pragma unroll
    for (int j = 0; j < 16; ++j) x[j] = p[j];
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(base) + i;
  uint32_t w[8];
  if (vector) {
    load_words(w, p);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = p[2 * j] | uint32_t{p[2 * j + 1]} << 16;
  }
  widen_16(x, dtype, w);
}

TQ_DEVICE void store_element(Dtype dtype, void* base, int64_t i, float x) {
  if (dtype == Dtype::kF32) {
    static_cast<float*>(base)[i] = x;
  } else if (dtype == Dtype::kF16) {
    static_cast<uint16_t*>(base)[i] = half_bits(x);
  } else {
    static_cast<uint16_t*>(base)[i] = bfloat_bits(x);
  }
}

// Four elements from element i of base. vector: the address is aligned to four elements.
TQ_DEVICE void store_4(Dtype dtype, void* base, int64_t i, float4 x, bool vector) {
  if (dtype == Dtype::kF32) {
    float* p = static_cast<float*>(base) + i;
    p[0] = x.x, p[1] = x.y, p[2] = x.z, p[3] = x.w;
    return;
  }
  const bool half = dtype == Dtype::kF16;
  const uint32_t lo = half ? pack_half2(x.x, x.y) : pack_bfloat2(x.x, x.y);
  const uint32_t hi = half ? pack_half2(x.z, x.w) : pack_bfloat2(x.z, x.w);
  uint16_t* p = static_cast<uint16_t*>(base) + i;
  if (vector) {
    *reinterpret_cast<uint2*>(p) = make_uint2(lo, hi);
  } else {
    p[0] = static_cast<uint16_t>(lo), p[1] = static_cast<uint16_t>(lo >> 16);
    p[2] = static_cast<uint16_t>(hi), p[3] = static_cast<uint16_t>(hi >> 16);
  }
}

}  // namespace tq::gpu
