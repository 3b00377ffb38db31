// value_tile-inl.h - weighted sums of a chunk's compressed values.
//
// Four tokens' packed rows are interleaved byte by byte, so that a 32-bit lane holds the same byte of four tokens;
// masking out one code then gives an operand for dot4 whose other side is the four tokens' weights. Rows that are
// shorter than a vector share it: kParts groups of four tokens lie side by side, and their sums are added at the very
// end. Position (operand, lane) of the accumulator belongs to dimension value_dim(). Lloyd-Max codes become levels + 64
// on the way, and their norms scales; softmax_row takes the 64 back.
#if defined(TQ_CPU_VALUE_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TQ_CPU_VALUE_TILE_INL_H_
#undef TQ_CPU_VALUE_TILE_INL_H_
#else
#define TQ_CPU_VALUE_TILE_INL_H_
#endif

#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/arch/dot4-inl.h"
#include "kernels/cpu/arch/key_tile-inl.h"
#include "kernels/cpu/arch/rows-inl.h"
#include "kernels/cpu/attend_task.h"

HWY_BEFORE_NAMESPACE();
namespace tq {
namespace HWY_NAMESPACE {

constexpr int kVectorBytes = 4 * kLanes;

// How rows of one format and dimension fall into operands.
struct ValueShape {
  int bits;
  int dim;
  int code_bytes;  // of a row's first plane: every byte of it holds codes_per_byte codes (their low bits)
  int codes_per_byte;
  int part_bytes;  // of a vector for one group of four tokens
  int parts;       // groups of four tokens in a vector
  int vectors;     // interleaved vectors per parts * 4 tokens, before codes are taken apart
  int operands;    // = vectors * codes_per_byte
};

HWY_INLINE HWY_ATTR ValueShape value_shape(int bits, int dim) {
  ValueShape v;
  v.bits = bits;
  v.dim = dim;
  v.codes_per_byte = bits == 4 ? 2 : 4;
  v.code_bytes = dim / v.codes_per_byte;
  v.part_bytes = 16;
  while (v.part_bytes < v.code_bytes && v.part_bytes < kVectorBytes) v.part_bytes *= 2;
  v.parts = kVectorBytes / v.part_bytes;
  v.vectors = (v.code_bytes + v.part_bytes - 1) / v.part_bytes * 4;
  v.operands = v.vectors * v.codes_per_byte;
  return v;
}

// The dimension of lane l of operand o, or -1 for padding.
HWY_INLINE int value_dim(const ValueShape& v, int o, int l) {
  const int vector = o / v.codes_per_byte;
  const int block = l / 4 % (v.part_bytes / 16);
  const int byte = vector / 4 * v.part_bytes + 16 * block + vector % 4 * 4 + l % 4;
  const int d = byte * v.codes_per_byte + o % v.codes_per_byte;
  return d < v.dim ? d : -1;
}

// Third bits of 3-bit rows, moved to the places of the low plane's bytes: byte j gets its unit's byte j % 4, shifted so
// that the bits of codes 0..3 of that byte are bits 0, 1, 4, 5. words: the row's second plane.
HWY_INLINE HWY_ATTR void spread_high_plane(const uint8_t* plane, int dim, uint8_t* HWY_RESTRICT out) {
  for (int unit = 0; unit < (dim + 31) / 32; ++unit) {
    uint32_t word = 0;
    if (32 * unit + 32 <= dim) {
      std::memcpy(&word, plane + 4 * unit, 4);
    } else {
      uint16_t natural;
      std::memcpy(&natural, plane + 4 * unit, 2);
      word = tq::spread_half_unit(natural);
    }
    const uint64_t both = word | static_cast<uint64_t>(word >> 2) << 32;
    std::memcpy(out + 8 * unit, &both, 8);
  }
}

// Four token vectors -> four vectors of interleaved bytes.
HWY_INLINE HWY_ATTR void interleave4(const VU8* in, VU8* out) {
  const DU8 d8;
  const hn::RepartitionToWide<DU8> d16;
  const auto a = hn::BitCast(d16, hn::InterleaveLower(d8, in[0], in[1]));
  const auto b = hn::BitCast(d16, hn::InterleaveLower(d8, in[2], in[3]));
  const auto c = hn::BitCast(d16, hn::InterleaveUpper(d8, in[0], in[1]));
  const auto e = hn::BitCast(d16, hn::InterleaveUpper(d8, in[2], in[3]));
  out[0] = hn::BitCast(d8, hn::InterleaveLower(d16, a, b));
  out[1] = hn::BitCast(d8, hn::InterleaveUpper(d16, a, b));
  out[2] = hn::BitCast(d8, hn::InterleaveLower(d16, c, e));
  out[3] = hn::BitCast(d8, hn::InterleaveUpper(d16, c, e));
}

// tile[operand][kVectorBytes] <- operands of the parts * 4 tokens whose rows begin at rows: codes, or where there is a
// table what it has for them.
template <int kParts, bool kTable>
HWY_ATTR void expand_values_4bit(const ValueShape& v, const uint8_t* rows, int stride, VU8 table,
                                 uint8_t* HWY_RESTRICT tile) {
  const DU8 d8;
  const hn::RepartitionToWide<DU8> d16;
  const auto nibble = hn::Set(d8, uint8_t{0x0f});
  for (int n = 0; n < v.vectors; n += 4) {
    VU8 token[4];
    VU8 mixed[4];
    for (int i = 0; i < 4; ++i)
      token[i] = load_side_by_side<kParts>(rows + i * stride + n / 4 * v.part_bytes, int64_t{4} * stride);
    interleave4(token, mixed);
    for (int i = 0; i < 4; ++i) {
      uint8_t* out = tile + (n + i) * 2 * kVectorBytes;
      auto even = hn::And(mixed[i], nibble);
      auto odd = hn::And(hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, mixed[i]))), nibble);
      if constexpr (kTable) even = hn::TableLookupBytes(table, even), odd = hn::TableLookupBytes(table, odd);
      hn::StoreU(even, d8, out);
      hn::StoreU(odd, d8, out + kVectorBytes);
    }
  }
}

template <int kParts>
HWY_ATTR void expand_values_3bit(const ValueShape& v, const uint8_t* rows, int stride, uint8_t* HWY_RESTRICT tile) {
  const DU8 d8;
  const hn::RepartitionToWide<DU8> d16;
  constexpr int kPlane = kMaxHeadDim / 4 + kVectorPad;
  HWY_ALIGN uint8_t high[kAtomTokens * kPlane];
  for (int t = 0; t < 4 * kParts; ++t)
    spread_high_plane(rows + t * stride + high_plane_offset(3, v.dim), v.dim, high + t * kPlane);
  auto field = [&](VU8 x, int shift, uint8_t mask) HWY_ATTR {
    return hn::And(hn::BitCast(d8, hn::ShiftRightSame(hn::BitCast(d16, x), shift)), hn::Set(d8, mask));
  };
  for (int n = 0; n < v.vectors; n += 4) {
    VU8 token[4];
    VU8 low[4];
    VU8 third[4];
    for (int i = 0; i < 4; ++i)
      token[i] = load_side_by_side<kParts>(rows + i * stride + n / 4 * v.part_bytes, int64_t{4} * stride);
    interleave4(token, low);
    for (int i = 0; i < 4; ++i)
      token[i] = load_side_by_side<kParts>(high + i * kPlane + n / 4 * v.part_bytes, 4 * kPlane);
    interleave4(token, third);
    for (int i = 0; i < 4; ++i) {
      uint8_t* out = tile + (n + i) * 4 * kVectorBytes;
      for (int g = 0; g < 4; ++g) {
        const auto bit = hn::BitCast(d8, hn::ShiftLeft<2>(hn::BitCast(d16, field(third[i], 4 * (g / 2) + g % 2, 1))));
        hn::StoreU(hn::Or(field(low[i], 2 * g, 3), bit), d8, out + g * kVectorBytes);
      }
    }
  }
}

// acc[r][operand][lane] += weight_scale[r] * sum over tokens of weight * code, for kRows rows and kOperands operands.
// weights8: [rows][high, low][kChunkTokens].
template <int kRows, int kOperands, int kParts>
HWY_ATTR void weigh_codes(const ValueShape& v, const int8_t* HWY_RESTRICT weights8,
                          const float* HWY_RESTRICT weight_scale, const uint8_t* HWY_RESTRICT tile, int tokens,
                          int acc_stride, float* HWY_RESTRICT acc) {
  const DF df;
  const DI d32;
  const DU8 d8;
  VI high[kRows][kOperands];
  VI low[kRows][kOperands];
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kOperands; ++o) high[r][o] = low[r][o] = hn::Zero(d32);
  }
  // Part p of a vector belongs to tokens 4p .. 4p + 3 of a step, whose four weights fill every lane of the part.
  constexpr int kStep = 4 * kParts;
  for (int t = 0; t < tokens; t += kStep) {
    const uint8_t* from = tile + t / kStep * v.operands * kVectorBytes;
    VU8 code[kOperands];
    for (int o = 0; o < kOperands; ++o) code[o] = hn::LoadU(d8, from + o * kVectorBytes);
    for (int r = 0; r < kRows; ++r) {
      const auto w_high = set_side_by_side<kParts>(weights8 + 2 * r * kChunkTokens + t);
      const auto w_low = set_side_by_side<kParts>(weights8 + (2 * r + 1) * kChunkTokens + t);
      for (int o = 0; o < kOperands; ++o) {
        high[r][o] = dot4(high[r][o], code[o], w_high);
        low[r][o] = dot4(low[r][o], code[o], w_low);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const auto scale = hn::Set(df, weight_scale[r]);
    for (int o = 0; o < kOperands; ++o) {
      float* out = acc + r * acc_stride + o * kLanes;
      const auto sum = hn::ConvertTo(df, hn::Add(hn::ShiftLeft<8>(high[r][o]), low[r][o]));
      hn::StoreU(hn::MulAdd(scale, sum, hn::LoadU(df, out)), df, out);
    }
  }
}

// Float values (raw_f32): acc[r][d] += sum over tokens of weight * value.
template <int kRows, int kColumns>
HWY_ATTR void weigh_floats(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT tile, int tokens, int dim,
                           int acc_stride, float* HWY_RESTRICT acc) {
  const DF df;
  VF sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c] = hn::LoadU(df, acc + r * acc_stride + c * kLanes);
  }
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      const auto w = hn::Set(df, weights[r * kChunkTokens + t]);
      for (int c = 0; c < kColumns; ++c) {
        sum[r][c] = hn::MulAdd(w, hn::LoadU(df, tile + t * dim + c * kLanes), sum[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) hn::StoreU(sum[r][c], df, acc + r * acc_stride + c * kLanes);
  }
}

// Expands one atom's coded values into the chunk's tile (from token `first` on) and their scales and zeros. Tokens from
// valid on count as zero: their bytes may be anything, and 0 * NaN is NaN.
template <int kParts>
HWY_ATTR void load_coded_values(const PagedCache& cache, const ValueShape& v, const uint8_t* atom, int first, int valid,
                                const AttendScratch& s) {
  const PageLayout& layout = cache.layout;
  const DF df;
  const hn::Rebind<hwy::float16_t, DF> df16;
  const hn::Rebind<uint16_t, DF> du16;
  const int stride = layout.value_row_bytes();
  const Codebook* book = cache.value_book;
  const auto table = book != nullptr ? level_tables(*book).low : hn::Zero(DU8());
  constexpr int kStep = 4 * kParts;
  for (int t = 0; t < kAtomTokens; t += kStep) {
    const uint8_t* rows = atom + layout.value_row_offset(t);
    uint8_t* tile = static_cast<uint8_t*>(s.value_tile) + (first + t) / kStep * v.operands * kVectorBytes;
    if (book != nullptr) {
      expand_values_4bit<kParts, true>(v, rows, stride, table, tile);
    } else if (v.bits == 4) {
      expand_values_4bit<kParts, false>(v, rows, stride, table, tile);
    } else {
      expand_values_3bit<kParts>(v, rows, stride, tile);
    }
  }
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(atom + layout.value_scale_offset(0));
  const uint16_t* zeros = reinterpret_cast<const uint16_t*>(atom + layout.value_zero_offset(0));
  const float unit = book != nullptr ? 1.0f / (book->scale * std::sqrt(static_cast<float>(v.dim))) : 1.0f;
  for (int t = 0; t < kAtomTokens; t += kLanes) {
    const auto scale = hn::Mul(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, scales + t))), hn::Set(df, unit));
    hn::StoreU(scale, df, s.value_scale + first + t);
    if (book != nullptr) continue;
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, zeros + t))), df, s.value_zero + first + t);
  }
  std::fill(s.value_scale + first + valid, s.value_scale + first + kAtomTokens, 0.0f);
  std::fill(s.value_zero + first + valid, s.value_zero + first + kAtomTokens, 0.0f);
}

// acc += weights * values of the chunk, for kRows rows of coded values.
template <int kRows, int kParts>
HWY_ATTR void weigh_coded_rows(const ValueShape& v, const AttendScratch& s, int r, int tokens) {
  const uint8_t* tile = static_cast<const uint8_t*>(s.value_tile);
  for (int o = 0; o < v.operands; o += 2) {  // operands is a multiple of 8
    weigh_codes<kRows, 2, kParts>(v, s.weights8 + 2 * r * kChunkTokens, s.weight_scale + r, tile + o * kVectorBytes,
                                  tokens, s.acc_stride, s.acc + r * s.acc_stride + o * kLanes);
  }
}

// The same for float values.
template <int kRows>
HWY_ATTR void weigh_float_rows(int dim, const AttendScratch& s, int r, int tokens) {
  float* acc = s.acc + r * s.acc_stride;
  const float* tile = static_cast<const float*>(s.value_tile);
  int d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
    weigh_floats<kRows, 4>(s.scores + r * kChunkTokens, tile + d, tokens, dim, s.acc_stride, acc + d);
  }
  for (; d < dim; d += kLanes) {
    weigh_floats<kRows, 1>(s.scores + r * kChunkTokens, tile + d, tokens, dim, s.acc_stride, acc + d);
  }
}

// Calls f with the compile-time number of parts.
template <class F>
HWY_INLINE HWY_ATTR void with_parts(int parts, F&& f) {
  switch (parts) {
    case 1:
      return f(std::integral_constant<int, 1>());
#if HWY_MAX_BYTES >= 32
    case 2:
      return f(std::integral_constant<int, 2>());
#endif
#if HWY_MAX_BYTES >= 64
    case 4:
      return f(std::integral_constant<int, 4>());
#endif
  }
}

// All rows: acc += weights * values of the chunk.
HWY_ATTR void weigh_values(const PagedCache& cache, const AttendScratch& s, int rows, int tokens) {
  // Rows whose accumulators stay in registers: 4 rows x 2 operands x 2 planes fit in 32 registers, 2 in 16.
  constexpr int kRows = kLanes == 16 ? 4 : 2;
  const int dim = cache.layout.head_dim_v;
  int r = 0;
  if (cache.format.has_value_scale()) {
    const ValueShape v = value_shape(cache.layout.value_bits, dim);
    with_parts(v.parts, [&](auto parts) HWY_ATTR {
      for (; r + kRows <= rows; r += kRows) weigh_coded_rows<kRows, parts()>(v, s, r, tokens);
      for (; r < rows; ++r) weigh_coded_rows<1, parts()>(v, s, r, tokens);
    });
    return;
  }
  for (; r + kRows <= rows; r += kRows) weigh_float_rows<kRows>(dim, s, r, tokens);
  for (; r < rows; ++r) weigh_float_rows<1>(dim, s, r, tokens);
}

}  // namespace HWY_NAMESPACE
}  // namespace tq
HWY_AFTER_NAMESPACE();

#endif
