// target.cuh - NVIDIA GPUs as a target of kernels.hip: what the HIP kernels do but for AMD's own instructions can be
// run on them. Waves of 32 lanes; the matrix operation has the operand layout of gfx12 and is made of shuffles.
#pragma once

#include "kernels/cuda/arch/target.cuh"

#undef TQ_KERNEL
#undef TQ_ARGUMENT
#define TQ_KERNEL(threads) TQ_DEVICE void
#define TQ_ARGUMENT(Args) const Args&
#define TQ_ENTRY(name, threads, Args) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args p)
#define TQ_CONSTANT(Type, name, value) extern "C" __device__ Type name = value
#define TQ_SHARED(Type, name) __shared__ Type name

namespace tq::gpu {

constexpr int kTargetWave = 32;

TQ_DEVICE int lane_index() { return threadIdx.x % 32; }
template <class T>
TQ_DEVICE T shuffle_from(T x, int lane) {
  return __shfl_sync(cuda::kFullMask, x, lane);
}
template <class T>
TQ_DEVICE T shuffle_up(T x, int distance) {
  return __shfl_up_sync(cuda::kFullMask, x, distance);
}
TQ_DEVICE int renew(int x) { return x; }
TQ_DEVICE void sync_wave() { __syncwarp(); }
TQ_DEVICE uint32_t multiply_half2(uint32_t a, uint32_t b) {
  const __half2 h = __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&h);
}

// As in hip/arch/matrix.h.
constexpr int kRun = 8, kResults = 8;
TQ_DEVICE int first_column(int lane) { return 8 * (lane / 16); }
TQ_DEVICE int result_row(int lane, int i) { return 8 * (lane / 16) + i; }

TQ_DEVICE void multiply(float (&d)[kResults], const uint32_t* a, const uint32_t* b) {
  const int half = lane_index() / 16;
  uint32_t row[2][kRun / 2];  // of B, whole
#pragma unroll
  for (int w = 0; w < kRun / 2; ++w) {
    const uint32_t other = shuffle_xor(b[w], 16);
    row[0][w] = half == 0 ? b[w] : other;
    row[1][w] = half == 0 ? other : b[w];
  }
#pragma unroll
  for (int i = 0; i < kResults; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int w = 0; w < kRun / 2; ++w) {
        const float2 x = unpack_half2(shuffle_from(a[w], 16 * h + result_row(lane_index(), i)));
        const float2 y = unpack_half2(row[h][w]);
        d[i] = fmaf(x.x, y.x, fmaf(x.y, y.y, d[i]));
      }
    }
  }
}

TQ_DEVICE void operand_of_results(const float (&d)[kResults], uint32_t (&b)[kRun / 2]) {
#pragma unroll
  for (int j = 0; j < kResults / 2; ++j) b[j] = pack_half2(d[2 * j], d[2 * j + 1]);
}

}  // namespace tq::gpu
