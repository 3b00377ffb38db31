// attend_task.cc - the CPU attention kernel: one tile of queries against compressed pages.
//
// Per chunk of 64 tokens: unpack 16 key rows to 16-bit codebook levels, multiply-accumulate them with 16-bit queries (exact
// in 32-bit integers: 32767 * 63 * 512 < 2^31), online softmax in float, then 16-bit weights times 4-bit value codes the same
// way. The float formats (FP8 keys, raw_f32) share everything but the inner product. Nothing larger than a chunk is ever
// decoded. Reference: layout/reference_page.h decoded in double (tests/cpp/attend_cpu_test.cc).
#include "kernels/cpu/attend_task.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/arch/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/arch/attend_task.cc"
// Highway re-includes this file once per instruction set.
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
#include "kernels/cpu/arch/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tq {
namespace HWY_NAMESPACE {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
// Rows of accumulators kept in registers: 4 x 4 vectors fit in 32 registers, 2 x 4 in 16.
constexpr int kRowBlock = kLanes == 16 ? 4 : 2;

inline int pad16(int dim) { return (dim + 31) / 32 * 32; }

// Lane-wise sums of four vectors: [sum(a), sum(b), sum(c), sum(d)] to out[4].
template <class D, class V, class T>
HWY_ATTR void store_four_sums(D d, V a, V b, V c, V e, T* HWY_RESTRICT out) {
  const hn::RepartitionToWide<D> dw;
  const auto ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const auto ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto low = hn::BitCast(d, hn::InterleaveLower(dw, hn::BitCast(dw, ab), hn::BitCast(dw, ce)));
  const auto high = hn::BitCast(d, hn::InterleaveUpper(dw, hn::BitCast(dw, ab), hn::BitCast(dw, ce)));
  const auto blocks = hn::Add(low, high);  // each 128-bit block holds four partial sums
  const hn::CappedTag<T, 4> d4;
  if constexpr (hn::MaxLanes(D()) == 4) {
    hn::StoreU(blocks, d, out);
  } else {
    HWY_ALIGN T lanes[hn::MaxLanes(D())];
    hn::Store(blocks, d, lanes);
    auto sum = hn::Load(d4, lanes);
    for (size_t i = 4; i < hn::MaxLanes(D()); i += 4) sum = hn::Add(sum, hn::Load(d4, lanes + i));
    hn::StoreU(sum, d4, out);
  }
}

// scores[r][0..16) = query row r . key tile row t, for kRows rows; 16-bit integers, exact.
template <int kRows>
HWY_ATTR void dot_tile(const int16_t* HWY_RESTRICT query, const int16_t* HWY_RESTRICT key, int dim,
                       int32_t* HWY_RESTRICT scores) {
  const DI d32;
  const hn::Repartition<int16_t, DI> d16;
  for (int t = 0; t < kAtomTokens; t += 4) {
    hn::Vec<DI> sum[kRows][4];
    hn::Vec<DI> odd[kRows][4];  // stays zero on x86
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 4; ++j) sum[r][j] = odd[r][j] = hn::Zero(d32);
    }
    for (int i = 0; i < dim; i += 2 * kLanes) {
      hn::Vec<decltype(d16)> k[4];
      for (int j = 0; j < 4; ++j) k[j] = hn::LoadU(d16, key + (t + j) * dim + i);
      for (int r = 0; r < kRows; ++r) {
        const auto q = hn::LoadU(d16, query + r * dim + i);
        for (int j = 0; j < 4; ++j) sum[r][j] = hn::ReorderWidenMulAccumulate(d32, q, k[j], sum[r][j], odd[r][j]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 4; ++j) sum[r][j] = hn::Add(sum[r][j], odd[r][j]);
      store_four_sums(d32, sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kChunkTokens + t);
    }
  }
}

template <int kRows>
HWY_ATTR void dot_tile(const float* HWY_RESTRICT query, const float* HWY_RESTRICT key, int dim, float* HWY_RESTRICT scores) {
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
      store_four_sums(df, sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kChunkTokens + t);
    }
  }
}

template <class T, class S>
HWY_ATTR void dot_rows(const T* query, const T* key, int dim, int rows, S* scores) {
  int r = 0;
  for (; r + kRowBlock <= rows; r += kRowBlock) dot_tile<kRowBlock>(query + r * dim, key, dim, scores + r * kChunkTokens);
  for (; r < rows; ++r) dot_tile<1>(query + r * dim, key, dim, scores + r * kChunkTokens);
}

// acc[r][d..] += weight_scale[r] * sum over token pairs of weights16 * codes, for kRows rows and kColumns vectors.
template <int kRows, int kColumns>
HWY_ATTR void weigh_codes(const int16_t* HWY_RESTRICT weights, const float* HWY_RESTRICT weight_scale,
                          const int16_t* HWY_RESTRICT tile, int pairs, int dim, float* HWY_RESTRICT acc) {
  const DF df;
  const DI d32;
  const hn::Repartition<int16_t, DI> d16;
  hn::Vec<DI> sum[kRows][kColumns];
  hn::Vec<DI> odd[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c] = odd[r][c] = hn::Zero(d32);
  }
  for (int k = 0; k < pairs; ++k) {
    hn::Vec<decltype(d16)> v[kColumns];
    for (int c = 0; c < kColumns; ++c) v[c] = hn::LoadU(d16, tile + 2 * (k * dim + c * kLanes));
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, weights + r * kChunkTokens + 2 * k, sizeof(pair));
      const auto w = hn::BitCast(d16, hn::Set(d32, pair));
      for (int c = 0; c < kColumns; ++c) sum[r][c] = hn::ReorderWidenMulAccumulate(d32, w, v[c], sum[r][c], odd[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const auto scale = hn::Set(df, weight_scale[r]);
    for (int c = 0; c < kColumns; ++c) {
      float* out = acc + r * dim + c * kLanes;
      const auto x = hn::ConvertTo(df, hn::Add(sum[r][c], odd[r][c]));
      hn::StoreU(hn::MulAdd(scale, x, hn::LoadU(df, out)), df, out);
    }
  }
}

template <int kRows, int kColumns>
HWY_ATTR void weigh_floats(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT tile, int tokens, int dim,
                           float* HWY_RESTRICT acc) {
  const DF df;
  VF sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c] = hn::LoadU(df, acc + r * dim + c * kLanes);
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
    for (int c = 0; c < kColumns; ++c) hn::StoreU(sum[r][c], df, acc + r * dim + c * kLanes);
  }
}

template <int kRows>
HWY_ATTR void weigh_rows(const AttendScratch& s, int r, bool coded, int tokens, int dim) {
  float* acc = s.acc + r * dim;
  const int16_t* w16 = s.weights16 + r * kChunkTokens;
  const float* w = s.scores + r * kChunkTokens;
  int i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    if (coded) {
      weigh_codes<kRows, 4>(w16, s.weight_scale + r, static_cast<int16_t*>(s.value_tile) + 2 * i, (tokens + 1) / 2, dim,
                            acc + i);
    } else {
      weigh_floats<kRows, 4>(w, static_cast<float*>(s.value_tile) + i, tokens, dim, acc + i);
    }
  }
  for (; i < dim; i += kLanes) {
    if (coded) {
      weigh_codes<kRows, 1>(w16, s.weight_scale + r, static_cast<int16_t*>(s.value_tile) + 2 * i, (tokens + 1) / 2, dim,
                            acc + i);
    } else {
      weigh_floats<kRows, 1>(w, static_cast<float*>(s.value_tile) + i, tokens, dim, acc + i);
    }
  }
}

// Loads, rotates and (for coded keys) quantizes the tile's queries; sets query_scale.
HWY_ATTR void load_queries(const AttendTask& task, const AttendScratch& s) {
  const AttendParams& p = *task.params;
  const Format& format = p.cache.format;
  const int dim = p.cache.layout.head_dim;
  const int group = p.num_heads / p.cache.layout.num_kv_heads;
  const int64_t first_token = p.query_start_loc[task.seq] + task.first_query;
  const DF df;
  for (int r = 0; r < task.num_queries * group; ++r) {
    const int head = task.kv_head * group + r % group;
    const int64_t index = (first_token + r / group) * p.query_token_stride + head * p.query_head_stride;
    if (!format.rotates_keys()) {
      load_row(p.dtype, p.query, index, dim, s.query + r * dim);
      s.query_scale[r] = p.scale;
      continue;
    }
    load_row(p.dtype, p.query, index, dim, s.row);
    rotate_simd(s.row, dim);
    auto largest = hn::Zero(df);
    for (int i = 0; i < dim; i += kLanes) largest = hn::Max(largest, hn::Abs(hn::LoadU(df, s.row + i)));
    float max_abs = hn::GetLane(hn::MaxOfLanes(df, largest));
    for (int i = 0; i < dim; ++i) {
      if (!(std::fabs(s.row[i]) <= std::numeric_limits<float>::max())) max_abs = std::numeric_limits<float>::quiet_NaN();
    }
    // A level is in units of scale * sqrt(head_dim) of the key's norm.
    const float level_unit = p.cache.codebook->scale * std::sqrt(static_cast<float>(dim));
    s.query_scale[r] = max_abs / 32767.0f / level_unit * p.scale;
    const float inverse = max_abs > 0 ? 32767.0f / max_abs : 0.0f;
    int16_t* out = s.query16 + r * pad16(dim);
    for (int i = 0; i < dim; ++i) {
      const float x = s.row[group_order_dim(format.key_bits, dim, i)] * inverse;
      out[i] = static_cast<int16_t>(std::lrintf(std::clamp(x, -32767.0f, 32767.0f)));
    }
    std::fill(out + dim, out + pad16(dim), int16_t{0});  // meets whatever the key tile's padding holds
  }
}

// Decodes one atom's keys into the key tile and its norms into key_norm[16]; tokens from valid on get norm 0.
HWY_ATTR void load_keys(const PagedCache& cache, const uint8_t* atom, int valid, const AttendScratch& s, float* key_norm) {
  const PageLayout& layout = cache.layout;
  const int dim = layout.head_dim;
  const DF df;
  const hn::Rebind<hwy::float16_t, DF> df16;
  const hn::Rebind<uint16_t, DF> du16;
  if (cache.format.key_codec == KeyCodec::kLloydMax) {
    const hn::CappedTag<int16_t, 32> d16;
    const hn::Rebind<int8_t, decltype(d16)> half;
    const hn::CappedTag<int8_t, 64> d8;
    const hn::RebindToUnsigned<decltype(d8)> du8;
    HWY_ALIGN int8_t levels[16] = {};
    std::copy(cache.codebook->levels, cache.codebook->levels + cache.codebook->num_levels, levels);
    const auto table = hn::LoadDup128(d8, levels);
    HWY_ALIGN int8_t row[kMaxHeadDim + kVectorPad];
    const int padded = pad16(dim);
    int16_t* tile = static_cast<int16_t*>(s.key_tile);
    for (int t = 0; t < kAtomTokens; ++t) {
      unpack_row(layout.key_bits, atom + layout.key_row_offset(t), dim, s.codes);
      for (int i = 0; i < padded; i += static_cast<int>(hn::Lanes(d8))) {
        hn::Store(hn::TableLookupBytes(table, hn::BitCast(d8, hn::LoadU(du8, s.codes + i))), d8, row + i);
      }
      for (int i = 0; i < padded; i += static_cast<int>(hn::Lanes(d16))) {
        hn::StoreU(hn::PromoteTo(d16, hn::Load(half, row + i)), d16, tile + t * padded + i);
      }
    }
    const uint16_t* norms = reinterpret_cast<const uint16_t*>(atom + layout.key_norm_offset(0));
    for (int t = 0; t < kAtomTokens; t += kLanes) {
      hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, norms + t))), df, key_norm + t);
    }
    std::fill(key_norm + valid, key_norm + kAtomTokens, 0.0f);
    return;
  }
  float* tile = static_cast<float*>(s.key_tile);
  for (int t = 0; t < kAtomTokens; ++t) {
    const uint8_t* row = atom + layout.key_row_offset(t);
    if (cache.format.key_codec == KeyCodec::kFp8E4M3) {
      decode_e4m3(row, dim, tile + t * dim);
    } else {
      std::memcpy(tile + t * dim, row, sizeof(float) * dim);
    }
  }
  std::fill(key_norm, key_norm + kAtomTokens, 1.0f);
}

// Decodes one atom's values into rows [first, first + 16) of the value tile. Tokens from valid on count as zero: their bytes
// may be anything, and 0 * NaN is NaN.
HWY_ATTR void load_values(const PagedCache& cache, const uint8_t* atom, int first, int valid, const AttendScratch& s) {
  const PageLayout& layout = cache.layout;
  const int dim = layout.head_dim_v;
  const DF df;
  const hn::Rebind<hwy::float16_t, DF> df16;
  const hn::Rebind<uint16_t, DF> du16;
  if (cache.format.value_codec == ValueCodec::kF32) {
    float* tile = static_cast<float*>(s.value_tile) + first * dim;
    std::memset(tile, 0, sizeof(float) * kAtomTokens * dim);
    for (int t = 0; t < valid; ++t) {
      std::memcpy(tile + t * dim, atom + layout.value_row_offset(t), sizeof(float) * dim);
    }
    return;
  }
  const DI d32;
  const hn::Rebind<uint8_t, DI> du8;
  const hn::Repartition<int16_t, DI> d16;
  int16_t* tile = static_cast<int16_t*>(s.value_tile) + first * dim;
  uint8_t* even = s.codes;
  uint8_t* odd = s.codes + kMaxHeadDim + kVectorPad;
  for (int t = 0; t < kAtomTokens; t += 2) {
    unpack_row(layout.value_bits, atom + layout.value_row_offset(t), dim, even);
    unpack_row(layout.value_bits, atom + layout.value_row_offset(t + 1), dim, odd);
    for (int i = 0; i < dim; i += kLanes) {
      const auto a = hn::PromoteTo(d32, hn::LoadU(du8, even + i));
      const auto b = hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(du8, odd + i)));
      hn::StoreU(hn::BitCast(d16, hn::Or(a, b)), d16, tile + t * dim + 2 * i);
    }
  }
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(atom + layout.value_scale_offset(0));
  const uint16_t* zeros = reinterpret_cast<const uint16_t*>(atom + layout.value_zero_offset(0));
  for (int t = 0; t < kAtomTokens; t += kLanes) {
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, scales + t))), df, s.value_scale + first + t);
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, zeros + t))), df, s.value_zero + first + t);
  }
  std::fill(s.value_scale + first + valid, s.value_scale + first + kAtomTokens, 0.0f);
  std::fill(s.value_zero + first + valid, s.value_zero + first + kAtomTokens, 0.0f);
}

// Scores of row r (raw products on entry) to weights: scale, soft cap, ALiBi, masks, online softmax. Leaves p (float values)
// or the quantized p * value_scale (coded values).
HWY_ATTR void softmax_row(const AttendTask& task, const AttendScratch& s, int r, int64_t chunk, int tokens, int64_t position,
                          KvRange visible, bool integer_scores) {
  const AttendParams& p = *task.params;
  const int dim_v = p.cache.layout.head_dim_v;
  const bool coded = p.cache.format.value_codec == ValueCodec::kUniform;
  const DF df;
  const DI di;
  const int group = p.num_heads / p.cache.layout.num_kv_heads;
  const int head = task.kv_head * group + r % group;
  float* scores = s.scores + r * kChunkTokens;
  int16_t* weights = s.weights16 + r * kChunkTokens;
  const int begin = static_cast<int>(std::clamp<int64_t>(visible.begin - chunk, 0, tokens));
  const int end = static_cast<int>(std::clamp<int64_t>(visible.end - chunk, 0, tokens));
  const int padded = (tokens + kAtomTokens - 1) / kAtomTokens * kAtomTokens;
  s.weight_scale[r] = 0;
  if (begin >= end) {
    std::fill(scores, scores + padded, 0.0f);
    std::fill(weights, weights + padded, int16_t{0});
    return;
  }
  const auto query_scale = hn::Set(df, s.query_scale[r]);
  const float slope = p.alibi_slopes != nullptr ? p.alibi_slopes[head] : 0.0f;
  const auto minus_inf = hn::Set(df, kMinusInf);
  auto largest = minus_inf;
  for (int t = 0; t < padded; t += kLanes) {
    auto x = integer_scores ? hn::ConvertTo(df, hn::LoadU(di, reinterpret_cast<const int32_t*>(scores) + t))
                            : hn::LoadU(df, scores + t);
    x = hn::Mul(x, hn::Mul(query_scale, hn::LoadU(df, s.key_norm + t)));
    if (p.soft_cap > 0) {
      x = hn::Mul(hn::Set(df, p.soft_cap), hn::Tanh(df, hn::Mul(x, hn::Set(df, 1.0f / p.soft_cap))));
    }
    const auto index = hn::Iota(df, static_cast<float>(t));
    if (slope != 0) {
      const auto distance = hn::Add(index, hn::Set(df, static_cast<float>(chunk - position)));
      x = hn::MulAdd(hn::Set(df, slope), distance, x);
    }
    const auto seen = hn::And(hn::Ge(index, hn::Set(df, static_cast<float>(begin))),
                              hn::Lt(index, hn::Set(df, static_cast<float>(end))));
    x = hn::IfThenElse(seen, x, minus_inf);
    largest = hn::Max(largest, x);
    hn::StoreU(x, df, scores + t);
  }
  const float old_max = s.max[r];
  const float new_max = std::max(old_max, hn::GetLane(hn::MaxOfLanes(df, largest)));
  if (new_max == kMinusInf) {  // scores of -inf, e.g. from a query with -inf: weigh nothing
    std::fill(scores, scores + padded, 0.0f);
    std::fill(weights, weights + padded, int16_t{0});
    return;
  }
  if (new_max != old_max) {
    const float correction = std::exp(old_max - new_max);
    s.max[r] = new_max;
    s.sum[r] *= correction;
    s.zero_sum[r] *= correction;
    scale_row(s.acc + r * dim_v, dim_v, correction);
  }
  auto sum = hn::Zero(df);
  auto zero_sum = hn::Zero(df);
  auto largest_weight = hn::Zero(df);
  for (int t = 0; t < padded; t += kLanes) {
    auto w = hn::Exp(df, hn::Sub(hn::LoadU(df, scores + t), hn::Set(df, new_max)));
    sum = hn::Add(sum, w);
    if (coded) {
      zero_sum = hn::MulAdd(w, hn::LoadU(df, s.value_zero + t), zero_sum);
      w = hn::Mul(w, hn::LoadU(df, s.value_scale + t));
      largest_weight = hn::Max(largest_weight, w);
    }
    hn::StoreU(w, df, scores + t);
  }
  s.sum[r] += hn::GetLane(hn::SumOfLanes(df, sum));
  if (!coded) return;
  s.zero_sum[r] += hn::GetLane(hn::SumOfLanes(df, zero_sum));
  // 15 bits relative to the chunk's largest weight: at most 2^-16 of it is lost per token, far below the codec's error.
  const float max_weight = hn::GetLane(hn::MaxOfLanes(df, largest_weight));
  const float inverse = max_weight > 1e-30f ? 32767.0f / max_weight : 0.0f;
  s.weight_scale[r] = max_weight / 32767.0f;
  const hn::Rebind<int16_t, DI> di16;
  for (int t = 0; t < padded; t += kLanes) {
    const auto w = hn::NearestInt(hn::Mul(hn::LoadU(df, scores + t), hn::Set(df, inverse)));
    hn::StoreU(hn::DemoteTo(di16, w), di16, weights + t);
  }
}

// acc (in group order, without the zero points) to the row's normalised output; row is scratch of head_dim_v floats.
HWY_ATTR void write_row(const AttendTask& task, int r, const float* acc, float zero_sum, float max, float sum, bool group_order,
                        float* HWY_RESTRICT row) {
  const AttendParams& p = *task.params;
  const int dim = p.cache.layout.head_dim_v;
  const int group = p.num_heads / p.cache.layout.num_kv_heads;
  const int head = task.kv_head * group + r % group;
  const int64_t token = int64_t{p.query_start_loc[task.seq]} + task.first_query + r / group;
  float denominator = sum;
  float top = max;
  if (p.sinks != nullptr) {
    top = std::max(max, p.sinks[head]);
    denominator = (sum > 0 ? sum * std::exp(max - top) : 0.0f) + std::exp(p.sinks[head] - top);
  }
  // A row that saw nothing has sum 0; a NaN stays a NaN.
  const bool nothing = sum == 0;
  const float factor = nothing ? 0.0f : (p.sinks != nullptr ? std::exp(max - top) : 1.0f) / denominator;
  for (int i = 0; i < dim; ++i) {
    const int d = group_order ? group_order_dim(p.cache.layout.value_bits, dim, i) : i;
    row[d] = nothing ? 0.0f : (acc[i] + zero_sum) * factor;
  }
  store_row(p.dtype, row, dim, p.out, token * p.out_token_stride + head * p.out_head_stride);
  if (p.lse != nullptr) p.lse[token * p.num_heads + head] = denominator == 0 ? kMinusInf : top + std::log(denominator);
}

HWY_ATTR void AttendTaskImpl(const AttendTask& task, const AttendScratch& s) {
  const AttendParams& p = *task.params;
  const PagedCache& cache = p.cache;
  const PageLayout& layout = cache.layout;
  const int group = p.num_heads / layout.num_kv_heads;
  const int rows = task.num_queries * group;
  const int dim_v = layout.head_dim_v;
  const bool coded_keys = cache.format.key_codec == KeyCodec::kLloydMax;
  const bool coded_values = cache.format.value_codec == ValueCodec::kUniform;
  const int64_t seq_len = p.seq_lens[task.seq];
  const int64_t query_len = p.query_start_loc[task.seq + 1] - p.query_start_loc[task.seq];
  const int32_t* blocks = p.block_table + task.seq * p.block_table_stride;

  load_queries(task, s);
  std::fill(s.max, s.max + rows, kMinusInf);
  std::fill(s.sum, s.sum + rows, 0.0f);
  std::fill(s.zero_sum, s.zero_sum + rows, 0.0f);
  std::fill(s.acc, s.acc + rows * dim_v, 0.0f);

  const uint8_t* atoms[kChunkTokens / kAtomTokens];
  for (int64_t chunk = task.kv_begin; chunk < task.kv_end; chunk += kChunkTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kChunkTokens, task.kv_end - chunk));
    for (int t = 0; t < tokens; t += kAtomTokens) {
      const int64_t token = chunk + t;
      const uint8_t* page = cache.data + blocks[token / layout.block_size] * cache.block_stride;
      atoms[t / kAtomTokens] = page + layout.atom_offset(task.kv_head, static_cast<int>(token % layout.block_size));
      const int valid = std::min(kAtomTokens, tokens - t);
      load_keys(cache, atoms[t / kAtomTokens], valid, s, s.key_norm + t);
      if (coded_keys) {
        dot_rows(s.query16, static_cast<const int16_t*>(s.key_tile), pad16(layout.head_dim), rows,
                 reinterpret_cast<int32_t*>(s.scores) + t);
      } else {
        dot_rows(s.query, static_cast<const float*>(s.key_tile), layout.head_dim, rows, s.scores + t);
      }
    }
    for (int t = 0; t < tokens; t += kAtomTokens) {
      load_values(cache, atoms[t / kAtomTokens], t, std::min(kAtomTokens, tokens - t), s);
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t q = task.first_query + r / group;
      softmax_row(task, s, r, chunk, tokens, seq_len - query_len + q, visible_range(p, seq_len, query_len, q), coded_keys);
    }
    const int padded = (tokens + kAtomTokens - 1) / kAtomTokens * kAtomTokens;
    int r = 0;
    for (; r + kRowBlock <= rows; r += kRowBlock) weigh_rows<kRowBlock>(s, r, coded_values, padded, dim_v);
    for (; r < rows; ++r) weigh_rows<1>(s, r, coded_values, padded, dim_v);
  }

  for (int r = 0; r < rows; ++r) {
    if (task.partial == nullptr) {
      write_row(task, r, s.acc + r * dim_v, s.zero_sum[r], s.max[r], s.sum[r], coded_values, s.row);
    } else {
      // Partials carry the zero points already, so that merging is a plain weighted sum.
      for (int i = 0; i < dim_v; ++i) task.partial->acc[r * dim_v + i] = s.acc[r * dim_v + i] + s.zero_sum[r];
      task.partial->max[r] = s.max[r];
      task.partial->sum[r] = s.sum[r];
    }
  }
}

HWY_ATTR void MergeImpl(const AttendTask& tile, const Partial* partials, int count, float* scratch) {
  const AttendParams& p = *tile.params;
  const int dim = p.cache.layout.head_dim_v;
  const int rows = tile.num_queries * (p.num_heads / p.cache.layout.num_kv_heads);
  float* acc = scratch;
  float* row = scratch + kMaxHeadDim;
  for (int r = 0; r < rows; ++r) {
    float max = kMinusInf;
    for (int i = 0; i < count; ++i) max = std::max(max, partials[i].max[r]);
    float sum = 0;
    std::fill(acc, acc + dim, 0.0f);
    for (int i = 0; i < count && max != kMinusInf; ++i) {
      const float weight = std::exp(partials[i].max[r] - max);
      sum += weight * partials[i].sum[r];
      for (int d = 0; d < dim; ++d) acc[d] += weight * partials[i].acc[r * dim + d];
    }
    write_row(tile, r, acc, 0.0f, max, sum, p.cache.format.value_codec == ValueCodec::kUniform, row);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tq
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tq {

HWY_EXPORT(AttendTaskImpl);
HWY_EXPORT(MergeImpl);

void run_attend_task(const AttendTask& task, const AttendScratch& scratch) {
  HWY_DYNAMIC_DISPATCH(AttendTaskImpl)(task, scratch);
}

void merge_partials(const AttendTask& tile, const Partial* partials, int count, float* row_scratch) {
  HWY_DYNAMIC_DISPATCH(MergeImpl)(tile, partials, count, row_scratch);
}

const char* cpu_target_name() {
  // The dispatcher takes the best target that is both compiled and supported: the lowest bit of the two sets.
  const int64_t usable = hwy::SupportedTargets() & HWY_TARGETS;
  return hwy::TargetName(usable == 0 ? HWY_STATIC_TARGET : usable & -usable);
}

}  // namespace tq
#endif
