// attend_task.cc - the CPU attention kernel: one tile of queries against compressed pages.
//
// Per chunk of 64 tokens: scores of packed keys (key_tile-inl.h), online softmax in float, weighted sums of packed
// values (value_tile-inl.h). Queries and weights are 16-bit integers, products are exact in 32 bits (32639 * 63 * 512 <
// 2^31), and the codes never become floats. The float formats (FP8 keys, raw_f32) share everything but the inner
// products. Nothing larger than a chunk is ever expanded. Reference: layout/reference_page.h in double
// (tests/cpp/attend_cpu_test.cc).
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
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "kernels/cpu/arch/key_tile-inl.h"
#include "kernels/cpu/arch/rows-inl.h"
#include "kernels/cpu/arch/value_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tq {
namespace HWY_NAMESPACE {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Loads the tile's queries; rotates and quantizes them where keys are coded.
HWY_ATTR void load_queries(const AttendTask& task, const AttendScratch& s) {
  const AttendParams& p = *task.params;
  const Format& format = p.cache.format;
  const int dim = p.cache.layout.head_dim;
  const int group = p.num_heads / p.cache.layout.num_kv_heads;
  const int64_t first_token = p.query_start_loc[task.seq] + task.first_query;
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
    // A level is worth 1 / (scale * sqrt(head_dim)) of the key's norm.
    const float levels = p.cache.key_book != nullptr ? p.cache.key_book->scale : kIntegerScale;
    const float level_unit = levels * std::sqrt(static_cast<float>(dim));
    s.query_scale[r] =
        quantize_query(s.row, format.key_bits, dim, s.query8 + 2 * r * dim, s.query_bias + r) / level_unit * p.scale;
  }
}

// scores[r][0..16) of all rows against one atom, and the norms that go with them; tokens from valid on get norm 0.
HWY_ATTR void score_keys(const PagedCache& cache, const uint8_t* atom, int valid, int rows, const AttendScratch& s,
                         int t0) {
  const PageLayout& layout = cache.layout;
  const int dim = layout.head_dim;
  const DF df;
  const hn::Rebind<hwy::float16_t, DF> df16;
  const hn::Rebind<uint16_t, DF> du16;
  float* key_norm = s.key_norm + t0;
  if (cache.format.rotates_keys()) {
    score_coded_keys(cache, atom, rows, s, s.scores + t0);
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
  score_float_keys(s.query, tile, dim, rows, s.scores + t0);
}

// One atom's values into the chunk's tile, from token `first` of the chunk on.
HWY_ATTR void load_values(const PagedCache& cache, const uint8_t* atom, int first, int valid, const AttendScratch& s) {
  if (cache.format.has_value_scale()) {
    const ValueShape v = value_shape(cache.layout.value_bits, cache.layout.head_dim_v);
    with_parts(v.parts, [&](auto parts) HWY_ATTR { load_coded_values<parts()>(cache, v, atom, first, valid, s); });
    return;
  }
  const int dim = cache.layout.head_dim_v;
  float* tile = static_cast<float*>(s.value_tile) + first * dim;
  std::memset(tile, 0, sizeof(float) * kAtomTokens * dim);
  for (int t = 0; t < valid; ++t) {
    std::memcpy(tile + t * dim, atom + cache.layout.value_row_offset(t), sizeof(float) * dim);
  }
}

// Scores of row r (raw products on entry) to weights: scale, soft cap, ALiBi, masks, online softmax. Leaves p (float
// values) or the quantized p * value_scale (coded values).
HWY_ATTR void softmax_row(const AttendTask& task, const AttendScratch& s, int r, int64_t chunk, int tokens,
                          int64_t position, KvRange visible, bool integer_scores) {
  const AttendParams& p = *task.params;
  const bool coded = p.cache.format.has_value_scale(), levels = p.cache.value_book != nullptr;
  const DF df;
  const DI di;
  const int group = p.num_heads / p.cache.layout.num_kv_heads;
  const int head = task.kv_head * group + r % group;
  float* scores = s.scores + r * kChunkTokens;
  int8_t* weights = s.weights8 + 2 * r * kChunkTokens;
  const int begin = static_cast<int>(std::clamp<int64_t>(visible.begin - chunk, 0, tokens));
  const int end = static_cast<int>(std::clamp<int64_t>(visible.end - chunk, 0, tokens));
  const int padded = (tokens + kAtomTokens - 1) / kAtomTokens * kAtomTokens;
  s.weight_scale[r] = 0;
  if (begin >= end) {
    std::fill(scores, scores + padded, 0.0f);
    std::fill(weights, weights + 2 * kChunkTokens, int8_t{0});
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
    std::fill(weights, weights + 2 * kChunkTokens, int8_t{0});
    return;
  }
  if (new_max != old_max) {
    const float correction = std::exp(old_max - new_max);
    s.max[r] = new_max;
    s.sum[r] *= correction;
    s.zero_sum[r] *= correction;
    scale_row(s.acc + r * s.acc_stride, s.acc_stride, correction);
  }
  auto sum = hn::Zero(df);
  auto zero_sum = hn::Zero(df);
  auto largest_weight = hn::Zero(df);
  for (int t = 0; t < padded; t += kLanes) {
    auto w = hn::Exp(df, hn::Sub(hn::LoadU(df, scores + t), hn::Set(df, new_max)));
    sum = hn::Add(sum, w);
    if (coded) {
      if (!levels) zero_sum = hn::MulAdd(w, hn::LoadU(df, s.value_zero + t), zero_sum);
      w = hn::Mul(w, hn::LoadU(df, s.value_scale + t));
      largest_weight = hn::Max(largest_weight, w);
    }
    hn::StoreU(w, df, scores + t);
  }
  s.sum[r] += hn::GetLane(hn::SumOfLanes(df, sum));
  if (!coded) return;
  s.zero_sum[r] += hn::GetLane(hn::SumOfLanes(df, zero_sum));
  // 16 bits relative to the chunk's largest weight: at most 2^-16 of it is lost per token, far below the codec's error.
  const float max_weight = hn::GetLane(hn::MaxOfLanes(df, largest_weight));
  const float inverse = max_weight > 1e-30f ? static_cast<float>(kPlaneLimit) / max_weight : 0.0f;
  s.weight_scale[r] = max_weight / static_cast<float>(kPlaneLimit);
  const hn::Rebind<int8_t, DI> di8;
  auto weight_sum = hn::Zero(di);
  for (int t = 0; t < padded; t += kLanes) {
    const auto w = hn::NearestInt(hn::Mul(hn::LoadU(df, scores + t), hn::Set(df, inverse)));
    weight_sum = hn::Add(weight_sum, w);
    const auto low = hn::ShiftRight<24>(hn::ShiftLeft<24>(w));
    hn::StoreU(hn::DemoteTo(di8, hn::ShiftRight<8>(hn::Sub(w, low))), di8, weights + t);
    hn::StoreU(hn::DemoteTo(di8, low), di8, weights + kChunkTokens + t);
  }
  // What the level offset adds is the same in all dimensions, and the rotation back would gather what is left of it in
  // one: so it is taken back by the weights as they were rounded.
  if (levels) {
    const auto sum_of_weights = static_cast<float>(hn::GetLane(hn::SumOfLanes(di, weight_sum)));
    s.zero_sum[r] -= kLevelOffset * s.weight_scale[r] * sum_of_weights;
  }
}

// row[head_dim_v] <- accumulators in dimension order, with the zero points.
HWY_ATTR void collect_row(const PagedCache& cache, const float* HWY_RESTRICT acc, float zero_sum,
                          float* HWY_RESTRICT row) {
  const int dim = cache.layout.head_dim_v;
  if (cache.format.value_codec == ValueCodec::kF32) {
    std::copy(acc, acc + dim, row);
    return;
  }
  const ValueShape v = value_shape(cache.layout.value_bits, dim);
  std::fill(row, row + dim, zero_sum);
  for (int o = 0; o < v.operands; ++o) {
    for (int l = 0; l < kLanes; ++l) {
      const int d = value_dim(v, o, l);
      if (d >= 0) row[d] += acc[o * kLanes + l];
    }
  }
}

// Normalises the row in place, rotates it back and writes it and its LSE.
HWY_ATTR void write_row(const AttendTask& task, int r, float max, float sum, float* HWY_RESTRICT row) {
  const AttendParams& p = *task.params;
  const int dim = p.cache.layout.head_dim_v;
  const int group = p.num_heads / p.cache.layout.num_kv_heads;
  const int head = task.kv_head * group + r % group;
  const int64_t token = int64_t{p.query_start_loc[task.seq]} + task.first_query + r / group;
  float top = max, correction = 1.0f, denominator = sum;
  // A sink of -inf is none; one of +inf is the largest finite one, whose row is zeros. A NaN stays one.
  if (p.sinks != nullptr && p.sinks[head] != kMinusInf) {
    const float sink = std::min(p.sinks[head], std::numeric_limits<float>::max());
    top = std::max(max, sink);
    correction = std::exp(max - top);
    denominator = sum * correction + std::exp(sink - top);
  }
  if (sum == 0) {  // the row saw nothing; a NaN is not 0 and stays
    std::fill(row, row + dim, 0.0f);
  } else {
    scale_row(row, dim, correction / denominator);
  }
  if (p.cache.format.rotates_values()) rotate_simd(row, dim);
  store_row(p.dtype, row, dim, p.out, token * p.out_token_stride + head * p.out_head_stride);
  if (p.lse != nullptr) p.lse[token * p.num_heads + head] = denominator == 0 ? kMinusInf : top + std::log(denominator);
}

HWY_ATTR void AttendTaskImpl(const AttendTask& task, const AttendScratch& s) {
  const AttendParams& p = *task.params;
  const PagedCache& cache = p.cache;
  const PageLayout& layout = cache.layout;
  const int group = p.num_heads / layout.num_kv_heads;
  const int rows = task.num_queries * group;
  const bool coded_keys = cache.format.rotates_keys();
  const int64_t seq_len = p.seq_lens[task.seq];
  const int64_t query_len = p.query_start_loc[task.seq + 1] - p.query_start_loc[task.seq];
  const int32_t* blocks = p.block_table + task.seq * p.block_table_stride;

  load_queries(task, s);
  std::fill(s.max, s.max + rows, kMinusInf);
  std::fill(s.sum, s.sum + rows, 0.0f);
  std::fill(s.zero_sum, s.zero_sum + rows, 0.0f);
  std::fill(s.acc, s.acc + rows * s.acc_stride, 0.0f);

  // The atom that holds a token. Atoms of one head lie page by page, so the hardware's own prefetcher loses the trail.
  auto atom_of = [&](int64_t token) {
    const uint8_t* page = cache.data + blocks[token / layout.block_size] * cache.block_stride;
    return page + layout.atom_offset(task.kv_head, static_cast<int>(token % layout.block_size));
  };
  const uint8_t* atoms[kChunkTokens / kAtomTokens];
  for (int64_t chunk = task.kv_begin; chunk < task.kv_end; chunk += kChunkTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kChunkTokens, task.kv_end - chunk));
    for (int t = 0; t < tokens; t += kAtomTokens) {
      atoms[t / kAtomTokens] = atom_of(chunk + t);
      if (chunk + t + kChunkTokens < task.kv_end) {
        const uint8_t* next = atom_of(chunk + t + kChunkTokens);
        for (int i = 0; i < layout.atom_bytes(); i += 64) hwy::Prefetch(next + i);
      }
      const int valid = std::min(kAtomTokens, tokens - t);
      score_keys(cache, atoms[t / kAtomTokens], valid, rows, s, t);
    }
    for (int t = 0; t < tokens; t += kAtomTokens) {
      load_values(cache, atoms[t / kAtomTokens], t, std::min(kAtomTokens, tokens - t), s);
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t q = task.first_query + r / group;
      softmax_row(task, s, r, chunk, tokens, seq_len - query_len + q, visible_range(p, task.seq, query_len, q),
                  coded_keys);
    }
    const int padded = (tokens + kAtomTokens - 1) / kAtomTokens * kAtomTokens;
    weigh_values(cache, s, rows, padded);
  }

  for (int r = 0; r < rows; ++r) {
    const float* acc = s.acc + r * s.acc_stride;
    if (task.partial == nullptr) {
      collect_row(cache, acc, s.zero_sum[r], s.row);
      write_row(task, r, s.max[r], s.sum[r], s.row);
    } else {
      collect_row(cache, acc, s.zero_sum[r], task.partial->acc + r * layout.head_dim_v);
      task.partial->max[r] = s.max[r];
      task.partial->sum[r] = s.sum[r];
    }
  }
}

HWY_ATTR void MergeImpl(const AttendTask& tile, const Partial* partials, int count, float* HWY_RESTRICT row) {
  const AttendParams& p = *tile.params;
  const int dim = p.cache.layout.head_dim_v;
  const int rows = tile.num_queries * (p.num_heads / p.cache.layout.num_kv_heads);
  for (int r = 0; r < rows; ++r) {
    float max = kMinusInf;
    for (int i = 0; i < count; ++i) max = std::max(max, partials[i].max[r]);
    float sum = 0;
    std::fill(row, row + dim, 0.0f);
    for (int i = 0; i < count && max != kMinusInf; ++i) {
      const float weight = std::exp(partials[i].max[r] - max);
      sum += weight * partials[i].sum[r];
      for (int d = 0; d < dim; ++d) row[d] += weight * partials[i].acc[r * dim + d];
    }
    write_row(tile, r, max, sum, row);
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
