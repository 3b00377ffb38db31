// value_tile.cuh - O^T += V^T P^T for 16 tokens (one atom): value codes on the M side, weights on the N side.
//
// A code c enters the matrix unit as the subnormal fp16 number c * 2^-24 or 16c * 2^-24, an AND away from its packed
// bits, and its accumulator is scaled back at the end. (1024 + c, an OR away, would be as cheap, but its sums are so
// much larger than what remains of them that the matrix unit's truncation shows: 30 % error over 1,000 flat tokens a
// warp.) Scale and zero are factored into the weights.
//
// Codes of a codebook are looked up first, and their levels, with an offset that makes them positive, enter as such
// subnormal numbers too: level + 64 is to them what a code is to uniform values, with a zero of -64 scales.
#pragma once

#include "kernels/cuda/arch/mma.cuh"
#include "kernels/gpu/atom.cuh"
#include "kernels/gpu/codes.cuh"
#include "kernels/cuda/key_tile.cuh"

namespace tq::cuda {

constexpr float kCodeUnits = 16777216.0f;  // 1 / the smallest fp16

template <class F, int kDim, bool kExact>
struct ValueTile {
  using Shape = AtomShape<F, kDim, kExact>;
  static constexpr int kTiles = kDim / 16;  // of 16 dimensions; a lane holds rows r and r + 8 of each
  static constexpr bool kHalfUnits = F::kValueBits == 3 && kDim == 64;  // 3 bits: 8 lanes share 4 units
  static constexpr int kWordsPerLoad = kExact && kDim % 128 == 0 ? 2 : 1;

  // What the second one's accumulators count more than the first one's: uniform codes stay where they are in a byte.
  static constexpr float kOddUnits = F::kRotatesValues ? 1.0f : 16.0f;

  // Dimensions of rows r and r + 8 of tile i.
  TQ_DEVICE static int2 dims(int i, int r) {
    if constexpr (F::kValueBits == 4) {
      const int word = i >> 2;
      const int index = (word / kWordsPerLoad * 8 + r) * kWordsPerLoad + word % kWordsPerLoad;
      const int d = 8 * index + 2 * (i & 3);
      return make_int2(d, d + 1);
    } else if constexpr (kHalfUnits) {
      const int d = 16 * (r >> 1) + 2 * (4 * (r & 1) + 2 * (i & 1)) + (i >> 1);
      return make_int2(d, d + 2);
    } else {
      const int d = 16 * ((i >> 3) * 8 + r) + 2 * (2 * (i & 3)) + ((i >> 2) & 1);
      return make_int2(d, d + 2);
    }
  }

  // Two tiles from 4 nibbles of 4 tokens: x holds those of MMA columns 2t and 2t + 1, y those of 2t + 8 and 2t + 9.
  template <int NT>
  TQ_DEVICE static void two_tiles(float (&o)[NT][kTiles][4], int i, uint32_t x, uint32_t y,
                                  const uint32_t (&p)[NT][2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t a0 = x & 0x000F000Fu, a1 = x & 0x00F000F0u, a2 = y & 0x000F000Fu, a3 = y & 0x00F000F0u;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) mma_f16(o[nt][i + e], a0, a1, a2, a3, p[nt][0], p[nt][1]);
      x >>= 8;
      y >>= 8;
    }
  }

  // Four tiles from the 8 nibbles of each of 4 tokens, in the order of the MMA's columns.
  template <int NT>
  TQ_DEVICE static void four_tiles_of_levels(const DeviceBook& book, float (&o)[NT][kTiles][4], int i,
                                             const uint32_t (&u)[4], const uint32_t (&p)[NT][2]) {
    uint32_t level[4][2];
#pragma unroll
    for (int token = 0; token < 4; ++token) {
      levels_of_nibbles<F::kValueBits>(book, u[token], 0u, level[token][0], level[token][1]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      // Bytes 0 and 4 of two tokens as 16-bit numbers, or 1 and 5, 2 and 6, 3 and 7: the others are signs, which are 0.
      const uint32_t even = e % 2 == 0 ? 0xC480 : 0xE6A2, odd = even + 0x1111;
      const uint32_t a0 = byte_permute(level[0][h], level[1][h], even),
                     a2 = byte_permute(level[2][h], level[3][h], even);
      const uint32_t a1 = byte_permute(level[0][h], level[1][h], odd), a3 = byte_permute(level[2][h], level[3][h], odd);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) mma_f16(o[nt][i + e], a0, a1, a2, a3, p[nt][0], p[nt][1]);
    }
  }

  // Tokens of MMA columns 2t, 2t + 1, 2t + 8, 2t + 9 are the token_row of those rows: rows 4t + {0, 3, 1, 2} or, for
  // odd t, 4t + {1, 2, 0, 3}. Where lane (r, t) begins to read: in the first of them, and in the third, rows 2 apart
  // from those of the others; and at its own words where they lie evenly.
  TQ_DEVICE static int offset(const Shape& shape, int r, int t, bool third) {
    const int row = 4 * t + ((t & 1) ^ (third ? 1 : 0));
    return row * shape.value_row_bytes() + (F::kValueBits == 4 ? 4 * kWordsPerLoad * r : 0);
  }

  // p[nt]: weights as B fragments. first, third: the values of an atom at this lane's offset().
  template <int NT>
  TQ_DEVICE static void accumulate(const Shape& shape, const DeviceBook& book, const uint8_t* first,
                                   const uint8_t* third, int r, const uint32_t (&p)[NT][2], float (&o)[NT][kTiles][4]) {
    const int two_rows = 2 * shape.value_row_bytes();
    const uint8_t* row[4] = {first, third + two_rows, third, first + two_rows};
    if constexpr (F::kValueBits == 4) {
#pragma unroll
      for (int j = 0; j < kDim / 64 / kWordsPerLoad; ++j) {
        uint32_t u[4][kWordsPerLoad];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint8_t* at = row[i] + j * 32 * kWordsPerLoad;
          if constexpr (kWordsPerLoad == 2) {
            const uint2 v = *reinterpret_cast<const uint2*>(at);
            u[i][0] = v.x, u[i][1] = v.y;
          } else {
            u[i][0] = *reinterpret_cast<const uint32_t*>(at);
          }
        }
#pragma unroll
        for (int w = 0; w < kWordsPerLoad; ++w) {
          const int i = (j * kWordsPerLoad + w) * 4;
          if constexpr (F::kRotatesValues) {
            four_tiles_of_levels<NT>(book, o, i, {u[0][w], u[1][w], u[2][w], u[3][w]}, p);
            continue;
          }
          two_tiles<NT>(o, i, byte_permute(u[0][w], u[1][w], 0x5410), byte_permute(u[2][w], u[3][w], 0x5410), p);
          two_tiles<NT>(o, i + 2, byte_permute(u[0][w], u[1][w], 0x7632), byte_permute(u[2][w], u[3][w], 0x7632), p);
        }
      }
    } else {
      const uint32_t half = (r & 1) ? 0x7632 : 0x5410;
#pragma unroll
      for (int j = 0; j < (kHalfUnits ? 1 : kDim / 128); ++j) {
        uint32_t u[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          load_unit<3, kExact>(row[i], kHalfUnits ? r >> 1 : j * 8 + r, shape.head_dim_v(), u[i][0], u[i][1]);
        }
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          if constexpr (kHalfUnits) {
            two_tiles<NT>(o, 2 * g, byte_permute(u[0][g], u[1][g], half), byte_permute(u[2][g], u[3][g], half), p);
          } else {
            const int i = j * 8 + g * 4;
            two_tiles<NT>(o, i, byte_permute(u[0][g], u[1][g], 0x5410), byte_permute(u[2][g], u[3][g], 0x5410), p);
            two_tiles<NT>(o, i + 2, byte_permute(u[0][g], u[1][g], 0x7632), byte_permute(u[2][g], u[3][g], 0x7632), p);
          }
        }
      }
    }
  }
};

}  // namespace tq::cuda
