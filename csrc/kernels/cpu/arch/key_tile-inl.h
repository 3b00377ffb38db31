// key_tile-inl.h - scores of a tile of queries against 16 tokens' compressed keys.
//
// Lloyd-Max keys: the packed rows of the tokens are transposed as 32-bit words, so that a lane is a token; a word's
// codes then become four codebook bytes per lane by one table lookup, and dot4 with a broadcast query needs no sum
// across lanes. Byte b of operand o of a row belongs to dimension operand_dim(). Levels are stored with 64 added (dot4
// wants unsigned bytes), which 64 * sum(query) takes back. Integer keys are such bytes as they are, with 128 added.
#if defined(TQ_CPU_KEY_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TQ_CPU_KEY_TILE_INL_H_
#undef TQ_CPU_KEY_TILE_INL_H_
#else
#define TQ_CPU_KEY_TILE_INL_H_
#endif

#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/arch/dot4-inl.h"
#include "kernels/cpu/arch/rows-inl.h"
#include "kernels/cpu/attend_task.h"

HWY_BEFORE_NAMESPACE();
namespace tq {
namespace HWY_NAMESPACE {

constexpr int kLevelOffset = 64;
constexpr int level_offset(int bits) { return bits == 8 ? kIntegerZero : kLevelOffset; }
// Query rows whose accumulators stay in registers, two planes each.
constexpr int kQueryRows = 4;

// Which dimension byte b of operand o holds. 4 and 5 bits: word w has 8 codes, operand 2w the low nibbles. 3 bits: word
// w of the low plane has 16 codes, operand 4w + g those at bit 2g of each byte.
inline int operand_dim(int bits, int o, int b) {
  switch (bits) {
    case 3:
      return o / 4 * 16 + 4 * b + o % 4;
    case 8:
      return 4 * o + b;
    default:
      return o / 2 * 8 + 2 * b + o % 2;
  }
}

// A codebook as bytes for table lookups, levels + 64.
struct LevelTables {
  VU8 low, high;  // codes 0 to 15, and 16 to 31 of a 5-bit book
};
HWY_INLINE HWY_ATTR LevelTables level_tables(const Codebook& book) {
  HWY_ALIGN uint8_t levels[32] = {};
  for (int i = 0; i < book.num_levels; ++i) levels[i] = static_cast<uint8_t>(book.levels[i] + kLevelOffset);
  return {hn::LoadDup128(DU8(), levels), hn::LoadDup128(DU8(), levels + 16)};
}

// Four vectors of words, lane = token: out[i] holds word i of the 16 bytes at rows + t * stride, t in [0, kLanes).
HWY_INLINE HWY_ATTR void transpose_words(const uint8_t* rows, int stride, VI* out) {
  const DI d32;
  const hn::RepartitionToWide<DI> d64;
  // Vector r holds 16 bytes of tokens r, 4 + r, 8 + r ..., one 128-bit block each.
  VI v[4];
  for (int r = 0; r < 4; ++r) {
    v[r] = hn::BitCast(d32, load_side_by_side<kLanes / 4>(rows + r * stride, int64_t{4} * stride));
  }
  const auto a = hn::BitCast(d64, hn::InterleaveLower(d32, v[0], v[1]));
  const auto b = hn::BitCast(d64, hn::InterleaveLower(d32, v[2], v[3]));
  const auto c = hn::BitCast(d64, hn::InterleaveUpper(d32, v[0], v[1]));
  const auto e = hn::BitCast(d64, hn::InterleaveUpper(d32, v[2], v[3]));
  out[0] = hn::BitCast(d32, hn::InterleaveLower(d64, a, b));
  out[1] = hn::BitCast(d32, hn::InterleaveUpper(d64, a, b));
  out[2] = hn::BitCast(d32, hn::InterleaveLower(d64, c, e));
  out[3] = hn::BitCast(d32, hn::InterleaveUpper(d64, c, e));
}

// 16 natural-order bits in each lane to the places they have in a full unit's word: bit 4p + g to byte p, bits 0, 1,
// 4, 5.
HWY_INLINE HWY_ATTR VI spread_half_unit(VI natural) {
  const DI d;
  auto x = hn::And(natural, hn::Set(d, 0xffff));
  x = hn::And(hn::Or(x, hn::ShiftLeft<8>(x)), hn::Set(d, 0x00ff00ff));
  x = hn::Or(x, hn::ShiftLeft<4>(x));
  return hn::Or(hn::And(x, hn::Set(d, 0x03030303)), hn::ShiftLeft<2>(hn::And(x, hn::Set(d, 0x0c0c0c0c))));
}

// Codes of one low-plane word and its third bits, at shift kShift of high, to codebook bytes.
template <int kGroup, int kShift>
HWY_INLINE HWY_ATTR VU8 codes_3bit(VI low, VI high) {
  const DI d;
  const auto low_bits = hn::And(hn::ShiftRight<2 * kGroup>(low), hn::Set(d, 0x03030303));
  const auto high_bit = hn::And(hn::ShiftRight<kShift>(high), hn::Set(d, 0x01010101));
  return hn::BitCast(DU8(), hn::Or(low_bits, hn::ShiftLeft<2>(high_bit)));
}

// tile[o][kLanes * 4] <- operands of kLanes tokens, from the first token's packed row.
HWY_ATTR void expand_keys_4bit(const uint8_t* rows, int stride, int dim, VU8 table, uint8_t* HWY_RESTRICT tile) {
  const DU8 d8;
  const hn::RepartitionToWide<DU8> d16;
  const auto nibble = hn::Set(d8, uint8_t{0x0f});
  const int words = dim / 8;
  for (int w = 0; w < words; w += 4) {
    VI word[4];
    transpose_words(rows + 4 * w, stride, word);
    for (int i = 0; i < 4 && w + i < words; ++i) {
      const auto bytes = hn::BitCast(d8, word[i]);
      const auto high = hn::And(hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, bytes))), nibble);
      uint8_t* out = tile + (w + i) * 8 * kLanes;
      hn::StoreU(hn::TableLookupBytes(table, hn::And(bytes, nibble)), d8, out);
      hn::StoreU(hn::TableLookupBytes(table, high), d8, out + 4 * kLanes);
    }
  }
}

HWY_ATTR void expand_keys_3bit(const uint8_t* rows, int stride, int dim, VU8 table, uint8_t* HWY_RESTRICT tile) {
  const DU8 d8;
  const int words = dim / 16;  // of the low plane
  for (int w = 0; w < words; w += 8) {
    VI high[4];  // words of the second plane: one for two of the first
    transpose_words(rows + high_word_offset(3, dim, w), stride, high);
    for (int v = w; v < w + 8 && v < words; v += 4) {
      VI low[4];
      transpose_words(rows + 4 * v, stride, low);
      for (int i = 0; i < 4 && v + i < words; ++i) {
        const int word = v + i;
        auto bits = high[(word - w) / 2];
        if (word % 2 == 1) bits = hn::ShiftRight<2>(bits);
        if (word == words - 1 && words % 2 == 1) bits = spread_half_unit(bits);
        uint8_t* out = tile + word * 16 * kLanes;
        hn::StoreU(hn::TableLookupBytes(table, codes_3bit<0, 0>(low[i], bits)), d8, out);
        hn::StoreU(hn::TableLookupBytes(table, codes_3bit<1, 1>(low[i], bits)), d8, out + 4 * kLanes);
        hn::StoreU(hn::TableLookupBytes(table, codes_3bit<2, 4>(low[i], bits)), d8, out + 8 * kLanes);
        hn::StoreU(hn::TableLookupBytes(table, codes_3bit<3, 5>(low[i], bits)), d8, out + 12 * kLanes);
      }
    }
  }
}

// Levels of four codes a lane: nibbles, and bit kShift of each byte of high chooses the table.
template <int kShift>
HWY_INLINE HWY_ATTR VU8 levels_5bit(const LevelTables& tables, VU8 nibbles, VI high) {
  const DU8 d8;
  const auto bit = hn::BitCast(d8, hn::And(hn::ShiftRight<kShift>(high), hn::Set(DI(), 0x01010101)));
  return hn::IfThenElse(hn::Eq(bit, hn::Zero(d8)), hn::TableLookupBytes(tables.low, nibbles),
                        hn::TableLookupBytes(tables.high, nibbles));
}

HWY_ATTR void expand_keys_5bit(const uint8_t* rows, int stride, int dim, const LevelTables& tables,
                               uint8_t* HWY_RESTRICT tile) {
  const DU8 d8;
  const hn::RepartitionToWide<DU8> d16;
  const auto nibble = hn::Set(d8, uint8_t{0x0f});
  const int words = dim / 8;  // of the low plane
  for (int w = 0; w < words; w += 16) {
    VI high[4];  // words of the second plane: one for four of the first
    transpose_words(rows + high_word_offset(5, dim, w / 2), stride, high);
    for (int v = w; v < w + 16 && v < words; v += 4) {
      VI low[4];
      transpose_words(rows + 4 * v, stride, low);
      auto bits = high[(v - w) / 4];
      if (v + 4 > words) bits = spread_half_unit(bits);
      for (int i = 0; i < 4 && v + i < words; ++i) {
        const auto bytes = hn::BitCast(d8, low[i]);
        const auto second = hn::And(hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, bytes))), nibble);
        uint8_t* out = tile + (v + i) * 8 * kLanes;
        hn::StoreU(levels_5bit<0>(tables, hn::And(bytes, nibble), bits), d8, out);
        hn::StoreU(levels_5bit<4>(tables, second, bits), d8, out + 4 * kLanes);
        bits = hn::ShiftRight<1>(bits);  // word 2h + g of the four has its bits at 2h + g of each nibble
      }
    }
  }
}

HWY_ATTR void expand_keys_8bit(const uint8_t* rows, int stride, int dim, uint8_t* HWY_RESTRICT tile) {
  for (int w = 0; w < dim / 4; w += 4) {
    VI word[4];
    transpose_words(rows + 4 * w, stride, word);
    for (int i = 0; i < 4; ++i) hn::StoreU(hn::BitCast(DU8(), word[i]), DU8(), tile + (w + i) * 4 * kLanes);
  }
}

// scores[r][0..kLanes) for kRows rows of byte-plane queries [rows][dim / 4][high, low][4]. kWide: the tile has bytes
// above 127.
template <int kRows, bool kWide>
HWY_ATTR void dot_codes(const int8_t* HWY_RESTRICT query, const int32_t* HWY_RESTRICT bias,
                        const uint8_t* HWY_RESTRICT tile, int dim, int32_t* HWY_RESTRICT scores) {
  const DI d32;
  const DU8 d8;
  VI high[kRows];
  VI low[kRows];
  for (int r = 0; r < kRows; ++r) {
    high[r] = hn::Zero(d32);
    low[r] = hn::Set(d32, bias[r]);
  }
  for (int o = 0; o < dim / 4; ++o) {
    const auto k = hn::LoadU(d8, tile + o * 4 * kLanes);
    for (int r = 0; r < kRows; ++r) {
      int32_t planes[2];
      std::memcpy(planes, query + 2 * (r * dim + 4 * o), sizeof(planes));
      high[r] = kWide ? dot4_wide(high[r], k, hn::Set(d32, planes[0])) : dot4(high[r], k, hn::Set(d32, planes[0]));
      low[r] = kWide ? dot4_wide(low[r], k, hn::Set(d32, planes[1])) : dot4(low[r], k, hn::Set(d32, planes[1]));
    }
  }
  // A plane's sum with the offset in it may wrap around, the whole sum without it does not: 32639 * 127 * 512 < 2^31.
  for (int r = 0; r < kRows; ++r) {
    hn::StoreU(hn::Add(hn::ShiftLeft<8>(high[r]), low[r]), d32, scores + r * kChunkTokens);
  }
}

// Rotated query -> 16-bit integers, in planes and operand order. Returns what an integer product is worth; *bias takes
// back the level offset.
HWY_ATTR float quantize_query(const float* HWY_RESTRICT x, int bits, int dim, int8_t* HWY_RESTRICT planes,
                              int32_t* bias) {
  const DF df;
  auto largest = hn::Zero(df);
  auto finite = hn::Set(df, 0.0f);
  for (int i = 0; i < dim; i += kLanes) {
    const auto v = hn::LoadU(df, x + i);
    largest = hn::Max(largest, hn::Abs(v));
    finite = hn::Add(finite, hn::Mul(v, hn::Zero(df)));  // NaN if any element is NaN or infinite
  }
  const float poison = hn::GetLane(hn::SumOfLanes(df, finite));
  const float max_abs = hn::GetLane(hn::MaxOfLanes(df, largest));
  const bool usable = poison == 0 && max_abs > 0;
  const float inverse = usable ? static_cast<float>(kPlaneLimit) / max_abs : 0.0f;
  int64_t sum = 0;
  for (int i = 0; i < dim; ++i) {
    const int o = i / 4;
    const int b = i % 4;
    const float v = usable ? x[operand_dim(bits, o, b)] * inverse : 0.0f;
    const int q = static_cast<int>(std::lrintf(std::min(std::max(v, -1.0f * kPlaneLimit), 1.0f * kPlaneLimit)));
    sum += q;
    split_planes(q, planes + 8 * o + b, planes + 8 * o + 4 + b);
  }
  *bias = static_cast<int32_t>(-level_offset(bits) * sum);
  return poison == 0 ? max_abs / static_cast<float>(kPlaneLimit) : std::numeric_limits<float>::quiet_NaN();
}

// scores[r][0..16) of all rows against one atom of coded keys, as integers.
HWY_ATTR void score_coded_keys(const PagedCache& cache, const uint8_t* atom, int rows, const AttendScratch& s,
                               float* scores) {
  const PageLayout& layout = cache.layout;
  const int dim = layout.head_dim;
  const int stride = layout.key_row_bytes();
  const bool wide = layout.key_bits == 8;
  const LevelTables tables = wide ? LevelTables{hn::Zero(DU8()), hn::Zero(DU8())} : level_tables(*cache.key_book);
  uint8_t* tile = static_cast<uint8_t*>(s.key_tile);
  int32_t* out = reinterpret_cast<int32_t*>(scores);
  for (int t = 0; t < kAtomTokens; t += kLanes) {
    const uint8_t* first = atom + layout.key_row_offset(t);
    if (layout.key_bits == 8) expand_keys_8bit(first, stride, dim, tile);
    if (layout.key_bits == 5) expand_keys_5bit(first, stride, dim, tables, tile);
    if (layout.key_bits == 4) expand_keys_4bit(first, stride, dim, tables.low, tile);
    if (layout.key_bits == 3) expand_keys_3bit(first, stride, dim, tables.low, tile);
    auto dot = wide ? &dot_codes<kQueryRows, true> : &dot_codes<kQueryRows, false>;
    int r = 0;
    for (; r + kQueryRows <= rows; r += kQueryRows) {
      dot(s.query8 + 2 * r * dim, s.query_bias + r, tile, dim, out + r * kChunkTokens + t);
    }
    dot = wide ? &dot_codes<1, true> : &dot_codes<1, false>;
    for (; r < rows; ++r) dot(s.query8 + 2 * r * dim, s.query_bias + r, tile, dim, out + r * kChunkTokens + t);
  }
}

// Lane-wise sums of four vectors: [sum(a), sum(b), sum(c), sum(e)] to out[4].
HWY_INLINE HWY_ATTR void store_four_sums(VF a, VF b, VF c, VF e, float* HWY_RESTRICT out) {
  const DF d;
  const hn::RepartitionToWide<DF> dw;
  const auto ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const auto ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto low = hn::BitCast(d, hn::InterleaveLower(dw, hn::BitCast(dw, ab), hn::BitCast(dw, ce)));
  const auto high = hn::BitCast(d, hn::InterleaveUpper(dw, hn::BitCast(dw, ab), hn::BitCast(dw, ce)));
  HWY_ALIGN float blocks[kLanes];  // each 128-bit block holds four partial sums
  hn::Store(hn::Add(low, high), d, blocks);
  const hn::CappedTag<float, 4> d4;
  auto sum = hn::Load(d4, blocks);
  for (int i = 4; i < kLanes; i += 4) sum = hn::Add(sum, hn::Load(d4, blocks + i));
  hn::StoreU(sum, d4, out);
}

template <int kRows>
HWY_ATTR void dot_floats(const float* HWY_RESTRICT query, const float* HWY_RESTRICT key, int dim,
                         float* HWY_RESTRICT scores) {
  const DF df;
  for (int t = 0; t < kAtomTokens; t += 4) {
    VF sum[kRows][4];
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 4; ++j) sum[r][j] = hn::Zero(df);
    }
    for (int i = 0; i < dim; i += kLanes) {
      VF k[4];
      for (int j = 0; j < 4; ++j) k[j] = hn::LoadU(df, key + (t + j) * dim + i);
      for (int r = 0; r < kRows; ++r) {
        const auto q = hn::LoadU(df, query + r * dim + i);
        for (int j = 0; j < 4; ++j) sum[r][j] = hn::MulAdd(q, k[j], sum[r][j]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store_four_sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kChunkTokens + t);
    }
  }
}

// scores[r][0..16) of all rows against one atom of float keys.
HWY_ATTR void score_float_keys(const float* query, const float* key, int dim, int rows, float* scores) {
  constexpr int kRows = kLanes == 16 ? 4 : 2;
  int r = 0;
  for (; r + kRows <= rows; r += kRows) dot_floats<kRows>(query + r * dim, key, dim, scores + r * kChunkTokens);
  for (; r < rows; ++r) dot_floats<1>(query + r * dim, key, dim, scores + r * kChunkTokens);
}

}  // namespace HWY_NAMESPACE
}  // namespace tq
HWY_AFTER_NAMESPACE();

#endif
