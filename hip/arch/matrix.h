// matrix.h - D[16][16] += A[16][16] B[16][16]^T in fp16 with float sums, by one wave: who holds what, and the
// instruction.
//
// A lane holds part of one row of A and of one row of B, both row lane % 16, kRun consecutive columns of each from
// first_column(lane); and of D column lane % 16 (B's row), at rows result_row(lane, i). Layouts as AMD publishes them:
// "AMD Instinct MI200 / CDNA3 Instruction Set Architecture" (V_MFMA_F32_16X16X16_F16), "RDNA3 / RDNA4 Instruction Set
// Architecture" (V_WMMA_F32_16X16X16_F16).
#pragma once

#include <stdint.h>

namespace tq::gpu {

#if defined(__GFX9__)
// Four groups of 16 lanes, four columns each; D: four consecutive rows.
constexpr int kRun = 4, kResults = 4;
TQ_DEVICE int first_column(int lane) { return 4 * (lane / 16); }
TQ_DEVICE int result_row(int lane, int i) { return 4 * (lane / 16) + i; }
#elif defined(__GFX11__)
// Both half waves hold all columns; D: even rows in the lower half, odd ones in the upper.
constexpr int kRun = 16, kResults = 8;
TQ_DEVICE int first_column(int) { return 0; }
TQ_DEVICE int result_row(int lane, int i) { return 2 * i + lane / 16; }
#else
// gfx12: half the columns in each half wave; D: eight consecutive rows.
constexpr int kRun = 8, kResults = 8;
TQ_DEVICE int first_column(int lane) { return 8 * (lane / 16); }
TQ_DEVICE int result_row(int lane, int i) { return 8 * (lane / 16) + i; }
#endif

typedef _Float16 MatrixOperand __attribute__((vector_size(2 * kRun)));
typedef float MatrixResult __attribute__((vector_size(4 * kResults)));
struct OperandWords {
  uint32_t w[kRun / 2];
};

TQ_DEVICE void multiply(float (&d)[kResults], const uint32_t* a, const uint32_t* b) {
  OperandWords x, y;
#pragma unroll
  for (int i = 0; i < kRun / 2; ++i) x.w[i] = a[i], y.w[i] = b[i];
  const auto u = __builtin_bit_cast(MatrixOperand, x), v = __builtin_bit_cast(MatrixOperand, y);
  MatrixResult c;
#pragma unroll
  for (int i = 0; i < kResults; ++i) c[i] = d[i];
#if defined(__GFX9__)
  c = __builtin_amdgcn_mfma_f32_16x16x16f16(u, v, c, 0, 0, 0);
#elif defined(__GFX11__)
  c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(u, v, c);
#else
  c = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(u, v, c);
#endif
#pragma unroll
  for (int i = 0; i < kResults; ++i) d[i] = c[i];
}

// A product's results, rounded to fp16, as the operand B of the next: row lane % 16, D's rows as columns.
TQ_DEVICE void operand_of_results(const float (&d)[kResults], uint32_t (&b)[kRun / 2]) {
#if defined(__GFX11__)
  // The other half wave has every second column.
  const bool upper = lane_index() >= 16;
#pragma unroll
  for (int j = 0; j < kResults / 2; ++j) {
    const uint32_t mine = pack_half2(d[2 * j], d[2 * j + 1]), other = shuffle_xor(mine, 16);
    const uint32_t even = upper ? other : mine, odd = upper ? mine : other;
    b[2 * j] = byte_permute(even, odd, 0x5410);
    b[2 * j + 1] = byte_permute(even, odd, 0x7632);
  }
#else
#pragma unroll
  for (int j = 0; j < kResults / 2; ++j) b[j] = pack_half2(d[2 * j], d[2 * j + 1]);
#endif
}

}  // namespace tq::gpu
