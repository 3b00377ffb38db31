// amdgpu.h - the builtins of hip/arch, as functions that do what AMD's published instruction sets say. Written from
// those documents and not from hip/arch, which compiles against it unchanged:
//   "AMD Instinct MI200 Instruction Set Architecture", 2022; "AMD Instinct MI300 Instruction Set Architecture", 2023;
//   "RDNA3 Instruction Set Architecture", 2023; "RDNA4 Instruction Set Architecture", 2025; register layouts of matrix
//   operands as the amd_matrix_instruction_calculator prints them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simt/simt.h"

namespace simt {

typedef _Float16 Half4 __attribute__((vector_size(8)));
typedef _Float16 Half8 __attribute__((vector_size(16)));
typedef _Float16 Half16 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef float Float8 __attribute__((vector_size(32)));

// V_MBCNT_LO/HI_U32_B32: bits of the mask below this lane, in its lower and upper half.
inline uint32_t mbcnt_lo(uint32_t mask, uint32_t base) {
  const uint32_t below = lane() >= 32 ? ~0u : (1u << lane()) - 1;
  return base + static_cast<uint32_t>(__builtin_popcount(mask & below));
}
inline uint32_t mbcnt_hi(uint32_t mask, uint32_t base) {
  const uint32_t below = lane() >= 32 ? (lane() == 32 ? 0 : (1u << (lane() - 32)) - 1) : 0;
  return base + static_cast<uint32_t>(__builtin_popcount(mask & below));
}

// DS_BPERMUTE_B32: what the lane at the byte address / 4, modulo the wave, gave.
inline int ds_bpermute(int address, int value) {
  const Exchange all("ds_bpermute", &value, sizeof(value));
  int out;
  std::memcpy(&out, all.slot(static_cast<int>(static_cast<uint32_t>(address) / 4)), sizeof(out));
  return out;
}

inline void wave_barrier() {
  const int nothing = 0;
  const Exchange all("wave_barrier", &nothing, sizeof(nothing));
}

// V_PERM_B32: bytes 0-3 are those of the second source, 4-7 of the first; 8-11 the signs of bytes 1, 3, 5, 7; 12 is
// 0x00, above 0xFF.
inline uint32_t perm(uint32_t first, uint32_t second, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(first) << 32 | second;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (8 * i) & 0xFF;
    uint32_t byte;
    if (s >= 13) {
      byte = 0xFF;
    } else if (s == 12) {
      byte = 0;
    } else if (s >= 8) {
      byte = (bytes >> (16 * (s - 8) + 15) & 1) != 0 ? 0xFF : 0;
    } else {
      byte = static_cast<uint32_t>(bytes >> (8 * s)) & 0xFF;
    }
    out |= byte << (8 * i);
  }
  return out;
}

// V_DOT4_U32_U8.
inline uint32_t udot4(uint32_t a, uint32_t b, uint32_t c, bool) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 0xFF) * (b >> (8 * i) & 0xFF);
  return c;
}

// V_EXP_F32: results that are not normal are 0.
inline float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}

// gfx90a's matrix unit takes fp16 numbers that are not normal for 0.
inline float operand(_Float16 x) {
  const auto f = static_cast<float>(x);
#if defined(__GFX9__)
  return std::fabs(f) < 6.103515625e-5f ? 0.0f : f;
#else
  return f;
#endif
}

// One element of D: A's row m times B's column n. where(row or column, k, lane, element): who holds it.
template <class Operand, class Where>
float dot(const Exchange& all, int m, int n, float c, Where where) {
  double sum = c;
  for (int k = 0; k < 16; ++k) {
    Operand pair[2];
    int lane, element;
    where(m, k, lane, element);
    std::memcpy(pair, all.slot(lane), sizeof(pair));
    const float a = operand(pair[0][element]);
    where(n, k, lane, element);
    std::memcpy(pair, all.slot(lane), sizeof(pair));
    sum += static_cast<double>(a) * operand(pair[1][element]);
  }
  return static_cast<float>(sum);
}

// V_MFMA_F32_16X16X16_F16. A[i][k] and B[k][j]: lane i (j) + 16 * (k / 4), half k % 4. D[i][j]: lane j + 16 * (i / 4),
// register i % 4.
inline Float4 mfma_f32_16x16x16f16(Half4 a, Half4 b, Float4 c, int, int, int) {
  const Half4 mine[2] = {a, b};
  const Exchange all("mfma_f32_16x16x16f16", mine, sizeof(mine));
  const auto where = [](int row, int k, int& lane, int& element) { lane = row + 16 * (k / 4), element = k % 4; };
  for (int r = 0; r < 4; ++r) c[r] = dot<Half4>(all, 4 * (lane() / 16) + r, lane() % 16, c[r], where);
  return c;
}

// V_WMMA_F32_16X16X16_F16 of RDNA3, wave32. A[i][k] and B[k][j]: lanes i (j) and i + 16, which must agree, half k.
// D[i][j]: lane j + 16 * (i % 2), register i / 2. A slot has no room for both operands: two exchanges.
inline Float8 wmma_f32_16x16x16_f16_w32(Half16 a, Half16 b, Float8 c) {
  Half16 rows[2][32];
  for (int operand = 0; operand < 2; ++operand) {
    const Half16& mine = operand == 0 ? a : b;
    const Exchange all("wmma_f32_16x16x16_f16_w32", &mine, sizeof(mine));
    for (int l = 0; l < 32; ++l) std::memcpy(&rows[operand][l], all.slot(l), sizeof(Half16));
    for (int l = 0; l < 16; ++l) {
      if (std::memcmp(&rows[operand][l], &rows[operand][l + 16], sizeof(Half16)) != 0) {
        std::fprintf(stderr, "simt: operand %d of a WMMA is not the same in both half waves\n", operand);
        std::abort();
      }
    }
  }
  for (int r = 0; r < 8; ++r) {
    double sum = c[r];
    for (int k = 0; k < 16; ++k) {
      sum += static_cast<double>(operand(rows[0][2 * r + lane() / 16][k])) * operand(rows[1][lane() % 16][k]);
    }
    c[r] = static_cast<float>(sum);
  }
  return c;
}

// V_WMMA_F32_16X16X16_F16 of RDNA4, wave32. A[i][k] and B[k][j]: lane i (j) + 16 * (k / 8), half k % 8. D[i][j]: lane
// j + 16 * (i / 8), register i % 8.
inline Float8 wmma_f32_16x16x16_f16_w32_gfx12(Half8 a, Half8 b, Float8 c) {
  const Half8 mine[2] = {a, b};
  const Exchange all("wmma_f32_16x16x16_f16_w32_gfx12", mine, sizeof(mine));
  const auto where = [](int row, int k, int& lane, int& element) { lane = row + 16 * (k / 8), element = k % 8; };
  for (int r = 0; r < 8; ++r) c[r] = dot<Half8>(all, 8 * (lane() / 16) + r, lane() % 16, c[r], where);
  return c;
}

}  // namespace simt

#define __builtin_amdgcn_mbcnt_lo ::simt::mbcnt_lo
#define __builtin_amdgcn_mbcnt_hi ::simt::mbcnt_hi
#define __builtin_amdgcn_ds_bpermute ::simt::ds_bpermute
#define __builtin_amdgcn_wave_barrier ::simt::wave_barrier
#define __builtin_amdgcn_fence(order, scope) static_cast<void>(0)
#define __builtin_amdgcn_perm ::simt::perm
#define __builtin_amdgcn_udot4 ::simt::udot4
#define __builtin_amdgcn_exp2f ::simt::exp2_flushed
#define __builtin_amdgcn_mfma_f32_16x16x16f16 ::simt::mfma_f32_16x16x16f16
#define __builtin_amdgcn_wmma_f32_16x16x16_f16_w32 ::simt::wmma_f32_16x16x16_f16_w32
#define __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12 ::simt::wmma_f32_16x16x16_f16_w32_gfx12
