// mma.cuh - matrix products of one warp, with PTX's fragment layouts (lane = 4 * r + t).
//
//   A 16 x k: a0 holds row r, a1 row r + 8, a2 and a3 the same rows k/2 further; within a register the lane's k are
//   consecutive, from 4t (8-bit) or 2t (16-bit).   B k x 8: column r, k like A.   C 16 x 8: c0, c1 row r, columns 2t
//   and 2t + 1; c2, c3 row r + 8.
#pragma once

#include "kernels/cuda/arch/ptx.cuh"

namespace tq::cuda {

// The name that PTX has for the bytes of A.
template <bool kSigned>
struct Int8Type {
  static constexpr char kName[] = {kSigned ? 's' : 'u', '8', 0};
};

// d = A(u8 or s8) * B(s8) + c, k = 32. c apart from d, so that a sum can start from registers that are kept.
template <bool kSigned>
TQ_DEVICE void mma_int8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                        const int* c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.%14.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]),
        "C"(Int8Type<kSigned>::kName));
#else  // Turing has 8 x 8 x 16 only
  auto step = [](int& d0, int& d1, uint32_t a, uint32_t b, int c0, int c1) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.%6.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
        : "=r"(d0), "=r"(d1)
        : "r"(a), "r"(b), "r"(c0), "r"(c1), "C"(Int8Type<kSigned>::kName));
  };
  step(d[0], d[1], a0, b0, c[0], c[1]);
  step(d[0], d[1], a2, b1, d[0], d[1]);
  step(d[2], d[3], a1, b0, c[2], c[3]);
  step(d[2], d[3], a3, b1, d[2], d[3]);
#endif
}

// c += A(f16) * B(f16), k = 16, accumulated in float.
TQ_DEVICE void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // Turing has k = 8
  auto step = [&c](uint32_t x0, uint32_t x1, uint32_t y) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(x0), "r"(x1), "r"(y));
  };
  step(a0, a1, b0);
  step(a2, a3, b1);
#endif
}

// Transposes an 8 x 8 matrix of 16-bit elements: lane (r, t) gives row r, columns 2t and 2t + 1, and gets the same of
// the transpose.
TQ_DEVICE uint32_t transpose_8x8(uint32_t a) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
TQ_DEVICE void load_matrix_x4(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
TQ_DEVICE void load_matrix_x4_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace tq::cuda
