// key_tile.cuh - scores of 16 tokens (one atom) for NT x 8 query columns: S^T = K q, keys on the M side of the matrix
// product so that the few query columns of a decode step fill its N = 8.
//
// MMA row r is not token r: see token_row. The k order is that of a lane's own words, for keys and query alike, so that
// codes feed the matrix unit as they come out of memory.
#pragma once

#include "kernels/cuda/arch/mma.cuh"
#include "kernels/gpu/atom.cuh"
#include "kernels/gpu/codes.cuh"
#include "kernels/gpu/elements.cuh"

namespace tq::cuda {

// Token of the atom in MMA row r (upper = false) or r + 8. A lane's two tokens are a pair {2i, 2i + 1}, so that norm,
// scale and zero come with one load each; rows of one shared-memory phase alternate in parity, for keys (rows r, r + 1)
// and values (rows 2t of t = 0..3) alike, which keeps their bank conflicts low.
TQ_DEVICE int token_parity(int r) { return (r ^ (r >> 1)) & 1; }
TQ_DEVICE int token_row(int r, bool upper) { return 2 * r + (token_parity(r) ^ (upper ? 1 : 0)); }

// Query columns in shared memory, one row each: keys of levels take two planes of signed bytes, q = (hi + lo / 256) *
// unit, FP8 keys fp16. kDim elements, zero beyond the head dimension; the pitch avoids bank conflicts.
template <class F, int kDim>
struct QueryRow {
  static constexpr bool kIsInt8 = F::kRotatesKeys;
  static constexpr int kPlaneBytes = kDim;
  static constexpr int kBytes = 2 * kDim + 16;  // two byte planes or one of fp16, and padding
  // Position of dimension d within a plane.
  TQ_DEVICE static int position(int d) { return F::kKeyBits == 3 ? (d & ~15) + (d & 1) * 8 + ((d & 15) >> 1) : d; }
};

// What scales and centres the scores of a lane's two columns of each column tile.
template <int NT>
struct QueryScale {
  float unit[NT][2];  // times sum of (level * (256 hi + lo)) * norm / 256 = score in log2 units
  int bias[NT][2];    // takes off what the levels' offset adds to the sum
};

template <class F, int kDim, bool kExact>
struct KeyTile {
  using Shape = AtomShape<F, kDim, kExact>;
  static constexpr bool kIsInt8 = F::kRotatesKeys;
  static constexpr int kSteps = kIsInt8 ? kDim / 32 : kDim / 16;  // matrix steps
  static constexpr int kPlanes = kIsInt8 ? 2 : 1;
  static constexpr bool kPairedUnits = kExact && kDim % 128 == 0;  // 3 bits: a lane's units are neighbours
  static constexpr int kWordsPerLoad = F::kKeyBits == 8  ? 4
                                       : !kExact         ? 1
                                       : kDim % 128 == 0 ? 4
                                       : kDim % 64 == 0  ? 2
                                                         : 1;
  static constexpr int kWordsPerStep = F::kIntegerKeys ? 2 : 1;  // of a row and lane; integers come as they are
  static constexpr int kWords = kSteps * kWordsPerStep;
  static constexpr bool kSigned = F::kKeyBits == 5;  // two operands a step: signed_step
  // What the matrix unit's operands have more than the level: their sum, where there are two.
  static constexpr int kOffset = kSigned ? -1 : F::kKeyOffset;

  // Byte position, within a plane of the query row, of the first B register of a step; the second is next to it.
  TQ_DEVICE static int query_offset(int step, int t) {
    if constexpr (F::kKeyBits == 3) {
      const int j = step >> 1;
      const int unit = kPairedUnits ? 2 * (4 * (j >> 1) + t) + (j & 1) : 4 * j + t;
      return 16 * unit + 8 * (step & 1);
    } else {
      constexpr int kStepsPerLoad = kWordsPerLoad / kWordsPerStep;
      return 8 * ((step / kStepsPerLoad * 4 + t) * kStepsPerLoad + step % kStepsPerLoad);
    }
  }
  TQ_DEVICE static uint2 query_words(const uint8_t* row, int plane, int step, int t) {
    return *reinterpret_cast<const uint2*>(row + plane * QueryRow<F, kDim>::kPlaneBytes + query_offset(step, t));
  }

  // Where lane (r, t) begins to read in an atom: the row of its token, and its own words of it where they lie evenly.
  TQ_DEVICE static int offset(const Shape& shape, int r, int t, bool upper) {
    return token_row(r, upper) * shape.key_row_bytes() + (F::kKeyBits == 3 ? 0 : 4 * kWordsPerLoad * t);
  }

  // The packed words of one key row that lane t needs.
  TQ_DEVICE static void load(const Shape& shape, const uint8_t* row, int t, uint32_t (&w)[kWords]) {
    if constexpr (F::kKeyBits == 3) {
#pragma unroll
      for (int j = 0; j < kSteps / 2; ++j) {
        if constexpr (kPairedUnits) {
          if (j % 2 == 0) {
            const int unit = 2 * (4 * (j / 2) + t);
            const uint2 low = *reinterpret_cast<const uint2*>(row + 4 * unit);
            const uint32_t high = *reinterpret_cast<const uint32_t*>(row + kDim / 4 + 2 * unit);
            join_planes(low.x, high, w[2 * j], w[2 * j + 1]);
            join_planes(low.y, high >> 2, w[2 * j + 2], w[2 * j + 3]);
          }
        } else {
          load_unit<3, kExact>(row, 4 * j + t, shape.head_dim(), w[2 * j], w[2 * j + 1]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWords / kWordsPerLoad; ++j) {
        const uint8_t* p = row + j * 16 * kWordsPerLoad;
        if constexpr (kWordsPerLoad == 4) {
          const uint4 v = *reinterpret_cast<const uint4*>(p);
          w[4 * j] = v.x, w[4 * j + 1] = v.y, w[4 * j + 2] = v.z, w[4 * j + 3] = v.w;
        } else if constexpr (kWordsPerLoad == 2) {
          const uint2 v = *reinterpret_cast<const uint2*>(p);
          w[2 * j] = v.x, w[2 * j + 1] = v.y;
        } else if constexpr (F::kKeyBits == 5) {
          w[j] = load_u32_by_halves(p);
        } else {
          w[j] = *reinterpret_cast<const uint32_t*>(p);
        }
      }
    }
  }

  // 5 bits: the words of the second plane; bit 4i of high[k] is bit 4 of code i of word k of load().
  TQ_DEVICE static void load_high(const Shape& shape, const uint8_t* row, int t, uint32_t (&high)[kSteps]) {
    const uint8_t* plane = row - 4 * kWordsPerLoad * t + high_plane_offset(5, shape.head_dim());
    if constexpr (kExact && kWordsPerLoad == 4) {
#pragma unroll
      for (int j = 0; j < kSteps / 4; ++j) {
        const uint32_t word = reinterpret_cast<const uint32_t*>(plane)[4 * j + t];
#pragma unroll
        for (int i = 0; i < 4; ++i) high[4 * j + i] = word >> i;
      }
    } else if constexpr (kExact) {
      static_assert(kWordsPerLoad == 2 && kSteps == 2);
      const uint32_t word = reinterpret_cast<const uint32_t*>(plane)[t / 2] >> (2 * (t % 2));
      high[0] = word, high[1] = word >> 1;
    } else {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {  // 32 dimensions, of which the row may have half
        const uint8_t* p = plane + 4 * j;
        const bool half = 32 * j + 16 == shape.head_dim();
        high[j] = (half ? spread_half_unit(*reinterpret_cast<const uint16_t*>(p)) : load_u32_by_halves(p)) >> t;
      }
    }
  }

  // The matrix unit's operand of step k of one row: unsigned bytes, levels and F::kKeyOffset.
  TQ_DEVICE static void step_bytes(const DeviceBook& book, const uint32_t (&w)[kWords], int k, uint32_t& a,
                                   uint32_t& b) {
    if constexpr (F::kIntegerKeys) {
      a = w[2 * k], b = w[2 * k + 1];
    } else {
      levels_of_nibbles<F::kKeyBits>(book, w[k], 0u, a, b);
    }
  }

  // 5 bits: codes c and 31 - c have opposite levels. So one table of 16 magnitudes serves both halves of the book, and
  // flipping all bits of a byte makes -m - 1 of m where the level is negative. The matrix unit, which is idle most of
  // the time, evens that out: its second operand is -1 where the level is positive, so that the two add up to the level
  // and kOffset.
  TQ_DEVICE static void signed_step(const DeviceBook& book, uint32_t w, uint32_t high, uint32_t (&a)[2],
                                    uint32_t (&positive)[2]) {
    const uint32_t bits = high & 0x11111111u;
    const uint32_t x = w ^ (bits * 15u), y = x ^ 0x88888888u;  // 15 - code where it is positive
    uint32_t table[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) table[i] = 0x01010101u * kLevelOffset - book.bytes[i];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      positive[h] = byte_permute(0xFF00u, 0, h == 0 ? bits : high_half(bits));
      const uint32_t low = byte_permute(table[0], table[1], h == 0 ? x : high_half(x));
      a[h] = join_and_flip(low, byte_permute(table[2], table[3], h == 0 ? y : high_half(y)), positive[h]);
    }
  }

  // s[nt][0..3]: scores, in units of QueryScale::unit, of token_row(r, false) for columns 2t and 2t + 1 and of
  // token_row(r, true). lower, upper: the atom at this lane's offset(); norms: two of fp16, of this lane's tokens,
  // which the byte selector swap puts in order. query(nt, plane, step) gives the two B registers.
  template <int NT, class Query>
  TQ_DEVICE static void scores(const Shape& shape, const DeviceBook& book, const uint8_t* lower, const uint8_t* upper,
                               const uint8_t* norms, uint32_t swap, int t, const QueryScale<NT>& q, const Query& query,
                               float (&s)[NT][4]) {
    uint32_t w0[kWords], w1[kWords];
    load(shape, lower, t, w0);
    load(shape, upper, t, w1);
    if constexpr (kIsInt8) {
      uint32_t high0[kSteps] = {}, high1[kSteps] = {};
      if constexpr (F::kKeyBits == 5) {
        load_high(shape, lower, t, high0);
        load_high(shape, upper, t, high1);
      }
      int hi[NT][4], lo[NT][4];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int none[4] = {0, 0, 0, 0};
        auto multiply = [&](uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, bool first) {
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
            const int bias[4] = {q.bias[nt][0], q.bias[nt][1], q.bias[nt][0], q.bias[nt][1]};
            const uint2 b = query(nt, 0, k), c = query(nt, 1, k);
            mma_int8<kSigned>(hi[nt], a0, a1, a2, a3, b.x, b.y, first ? none : hi[nt]);
            mma_int8<kSigned>(lo[nt], a0, a1, a2, a3, c.x, c.y, first ? bias : lo[nt]);
          }
        };
        if constexpr (kSigned) {
          uint32_t a[2], b[2], positive_a[2], positive_b[2];
          signed_step(book, w0[k], high0[k], a, positive_a);
          signed_step(book, w1[k], high1[k], b, positive_b);
          multiply(a[0], b[0], a[1], b[1], k == 0);
          multiply(positive_a[0], positive_b[0], positive_a[1], positive_b[1], false);
        } else {
          uint32_t a0, a1, a2, a3;
          step_bytes(book, w0, k, a0, a2);
          step_bytes(book, w1, k, a1, a3);
          multiply(a0, a1, a2, a3, k == 0);
        }
      }
      uint32_t both = *reinterpret_cast<const uint32_t*>(norms);
      both = byte_permute(both, both, swap);
      const float2 norm = unpack_half2(both);
      const float2 factor = make_float2(norm.x * (1.0f / 256.0f), norm.y * (1.0f / 256.0f));
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          // Exact: levels and planes within 127 and 512 dimensions keep the sum below 2^31; what the offset adds may
          // go beyond it on the way.
          const uint32_t sum = 256u * static_cast<uint32_t>(hi[nt][j]) + static_cast<uint32_t>(lo[nt][j]);
          s[nt][j] = static_cast<float>(static_cast<int>(sum)) * (j < 2 ? factor.x : factor.y);
        }
      }
    } else {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int j = 0; j < 4; ++j) s[nt][j] = 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint32_t a0 = half2_of_fp8(byte_permute(w0[k], 0, 0x1404)),
                       a2 = half2_of_fp8(byte_permute(w0[k], 0, 0x3424));
        const uint32_t a1 = half2_of_fp8(byte_permute(w1[k], 0, 0x1404)),
                       a3 = half2_of_fp8(byte_permute(w1[k], 0, 0x3424));
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint2 b = query(nt, 0, k);
          mma_f16(s[nt], a0, a1, a2, a3, b.x, b.y);
        }
      }
    }
  }
};

}  // namespace tq::cuda
