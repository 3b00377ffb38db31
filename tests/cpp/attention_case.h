// attention_case.h - a paged cache with random contents, one attend call over it, and the same attention in double over
// the decoded cache: the independent reference of every kernel library.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "codec/float_bits.h"
#include "codec/hadamard.h"
#include "kernels/kernels.h"
#include "layout/reference_page.h"

namespace tq::testing {

// 64-byte aligned bytes.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t size, uint8_t fill = 0) : storage_(size + 64, fill) {}
  uint8_t* data() {
    const auto at = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<uint8_t*>((at + 63) / 64 * 64);
  }

 private:
  std::vector<uint8_t> storage_;
};

inline float to_float(Dtype dtype, const void* base, int64_t i) {
  switch (dtype) {
    case Dtype::kF32:
      return static_cast<const float*>(base)[i];
    case Dtype::kF16:
      return fp16_to_float(static_cast<const uint16_t*>(base)[i]);
    case Dtype::kBF16:
      return bf16_to_float(static_cast<const uint16_t*>(base)[i]);
  }
  return 0;
}

inline void from_float(Dtype dtype, void* base, int64_t i, float x) {
  switch (dtype) {
    case Dtype::kF32:
      static_cast<float*>(base)[i] = x;
      break;
    case Dtype::kF16:
      static_cast<uint16_t*>(base)[i] = float_to_fp16(x);
      break;
    case Dtype::kBF16:
      static_cast<uint16_t*>(base)[i] = float_to_bf16(x);
      break;
  }
}

inline size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

// What one attend call is made of. Lengths are per sequence.
struct Config {
  const Format* format;
  Dtype dtype;
  int num_heads, num_kv_heads, head_dim, head_dim_v, block_size;
  std::vector<int> query_lens, seq_lens;
  bool causal = true;
  int window = 0;
  float soft_cap = 0;
  bool sinks = false, alibi = false;
  bool extreme_sinks = false;  // with sinks: those that take all weight, or none
  int max_spans = 0;           // bidirectional spans of each sequence
  float query_scale = 2.0f, value_mean = 0.3f;

  std::string describe() const {
    std::ostringstream s;
    s << format->name << " dtype " << static_cast<int>(dtype) << " heads " << num_heads << ":" << num_kv_heads
      << " dim " << head_dim << "/" << head_dim_v << " block " << block_size << (causal ? " causal" : " full")
      << " window " << window << " cap " << soft_cap << (extreme_sinks ? " extreme" : "") << (sinks ? " sinks" : "")
      << (alibi ? " alibi" : "") << " spans " << max_spans << " lens";
    for (size_t i = 0; i < seq_lens.size(); ++i) s << " " << query_lens[i] << "/" << seq_lens[i];
    return s.str();
  }
};

// Buffers of one call, filled with seeded noise; pages are written by the reference, in random order, between pages of
// 0xff bytes (NaN norms), which a kernel must never let into a result.
class Case {
 public:
  Case(const Config& config, uint32_t seed) : c(config), rng(seed), pages(0) {
    layout = make_page_layout(*c.format, c.head_dim, c.head_dim_v, c.num_kv_heads, c.block_size);
    const int num_seqs = static_cast<int>(c.seq_lens.size());
    start.push_back(0);
    for (int q : c.query_lens) start.push_back(start.back() + q);
    for (int n : c.seq_lens) max_blocks = std::max(max_blocks, (n + c.block_size - 1) / c.block_size);
    num_blocks = num_seqs * max_blocks * 2 + 1;
    stride = layout.page_bytes() + 48;  // block strides need not be the page size
    pages = AlignedBytes(static_cast<size_t>(num_blocks * stride), 0xff);
    std::vector<int32_t> order(static_cast<size_t>(num_blocks));
    for (int i = 0; i < num_blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
    table.assign(order.begin(), order.begin() + num_seqs * max_blocks);

    std::normal_distribution<float> normal;
    auto noise = [&](int64_t count, float scale) {
      std::vector<uint8_t> bytes(static_cast<size_t>(count) * dtype_bytes(c.dtype));
      for (int64_t i = 0; i < count; ++i) from_float(c.dtype, bytes.data(), i, normal(rng) * scale);
      return bytes;
    };
    query = noise(int64_t{start.back()} * c.num_heads * c.head_dim, c.query_scale);
    out.assign(static_cast<size_t>(start.back()) * c.num_heads * c.head_dim_v * dtype_bytes(c.dtype), 0xff);
    lse.assign(static_cast<size_t>(start.back()) * c.num_heads, std::numeric_limits<float>::quiet_NaN());
    for (int h = 0; h < c.num_heads; ++h) {
      sinks.push_back(normal(rng) * 3);
      slopes.push_back(std::exp2(-8.0f * static_cast<float>(h + 1) / static_cast<float>(c.num_heads)));
    }
    constexpr float kExtreme[] = {INFINITY, std::numeric_limits<float>::max(), -INFINITY, 0.5f};
    for (int h = 0; c.extreme_sinks && h < c.num_heads; ++h) sinks[h] = kExtreme[h % 4];
    for (int s = 0; s < num_seqs; ++s) {
      for (int i = 0; i < c.max_spans; ++i) {
        int first = c.seq_lens[s] > 0 ? static_cast<int>(rng() % c.seq_lens[s]) : 0;
        int end = std::min(c.seq_lens[s], first + static_cast<int>(rng() % 40));
        if (first >= end) first = end = 0;
        spans.push_back(first);
        spans.push_back(end);
      }
    }
    std::vector<float> key(c.head_dim), value(c.head_dim_v);
    for (int s = 0; s < num_seqs; ++s) {
      for (int t = 0; t < c.seq_lens[s]; ++t) {
        for (int h = 0; h < c.num_kv_heads; ++h) {
          for (float& x : key) x = normal(rng);
          for (float& x : value) x = normal(rng) + c.value_mean;
          reference_store<float>(*c.format, layout, page(s, t), h, t % c.block_size, key.data(), value.data());
        }
      }
    }
  }

  uint8_t* page(int seq, int token) { return pages.data() + table[seq * max_blocks + token / c.block_size] * stride; }

  PagedCache cache() { return make_paged_cache(*c.format, layout, pages.data(), num_blocks, stride); }

  AttendParams params(void* workspace, uint64_t workspace_bytes) {
    AttendParams p = {};
    p.cache = cache();
    p.dtype = c.dtype;
    p.num_heads = c.num_heads;
    p.num_seqs = static_cast<int>(c.seq_lens.size());
    p.num_tokens = start.back();
    p.query = query.data();
    p.query_token_stride = int64_t{c.num_heads} * c.head_dim;
    p.query_head_stride = c.head_dim;
    p.out = out.data();
    p.out_token_stride = int64_t{c.num_heads} * c.head_dim_v;
    p.out_head_stride = c.head_dim_v;
    p.query_start_loc = start.data();
    p.seq_lens = c.seq_lens.data();
    p.block_table = table.data();
    p.block_table_stride = max_blocks;
    p.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    p.soft_cap = c.soft_cap;
    p.sliding_window = c.window;
    p.causal = c.causal;
    p.max_query_len = *std::max_element(c.query_lens.begin(), c.query_lens.end());
    p.spans = c.max_spans > 0 ? spans.data() : nullptr;
    p.max_spans = c.max_spans;
    p.sinks = c.sinks ? sinks.data() : nullptr;
    p.alibi_slopes = c.alibi ? slopes.data() : nullptr;
    p.lse = lse.data();
    p.workspace = workspace;
    p.workspace_bytes = workspace_bytes;
    return p;
  }

  // Compares every row of out with attention in double over the decoded cache. Returns the largest error relative to
  // the row's largest output, over all rows; LSE is checked here. What no kernel can avoid is taken off: half of the
  // smallest step of fp16, 2^-25, which is 0.7 % of an output of 4e-6 (a sink that takes all but 2e-6 of the weight).
  double worst_error() {
    double worst = 0;
    for (size_t s = 0; s < c.seq_lens.size(); ++s) worst = std::max(worst, compare_sequence(static_cast<int>(s)));
    return worst;
  }

  Config c;
  std::mt19937 rng;
  PageLayout layout;
  AlignedBytes pages;
  int64_t num_blocks = 0, stride = 0;
  int max_blocks = 1;
  std::vector<int32_t> table, start, spans;
  std::vector<uint8_t> query, out;
  std::vector<float> lse, sinks, slopes;

 private:
  double compare_sequence(int s) {
    const int n = c.seq_lens[s], m = c.query_lens[s], group = c.num_heads / c.num_kv_heads;
    double worst = 0;
    for (int kv = 0; kv < c.num_kv_heads && m > 0; ++kv) {
      std::vector<double> k(static_cast<size_t>(n) * c.head_dim), v(static_cast<size_t>(n) * c.head_dim_v);
      for (int t = 0; t < n; ++t) {
        double* row = &k[size_t(t) * c.head_dim];
        double* value = &v[size_t(t) * c.head_dim_v];
        reference_load<double>(*c.format, layout, page(s, t), kv, t % c.block_size, row, value);
        // Back: the kernel rotates queries and outputs instead.
        if (c.format->rotates_keys()) rotate(row, c.head_dim);
        if (c.format->rotates_values()) rotate(value, c.head_dim_v);
      }
      for (int q = 0; q < m; ++q) {
        for (int h = kv * group; h < (kv + 1) * group; ++h) worst = std::max(worst, compare_row(s, q, h, k, v));
      }
    }
    return worst;
  }

  double compare_row(int s, int q, int h, const std::vector<double>& k, const std::vector<double>& v) {
    const int n = c.seq_lens[s], position = n - c.query_lens[s] + q;
    const int64_t token = start[s] + q;
    std::vector<double> score(n, -INFINITY);
    // A sink of +inf counts as the largest finite float.
    const double sink = c.sinks ? std::min(sinks[h], std::numeric_limits<float>::max()) : -INFINITY;
    double max = sink;
    bool any = false;
    for (int t = 0; t < n; ++t) {
      bool seen = (!c.causal || t <= position) && (c.window == 0 || t > position - c.window);
      for (int i = 0; i < c.max_spans; ++i) {
        const int32_t* span = &spans[(s * c.max_spans + i) * 2];
        seen = seen || (position >= span[0] && position < span[1] && t >= span[0] && t < span[1]);
      }
      if (!seen) continue;
      double x = 0;
      for (int d = 0; d < c.head_dim; ++d) {
        x +=
            k[size_t(t) * c.head_dim + d] * to_float(c.dtype, query.data(), (token * c.num_heads + h) * c.head_dim + d);
      }
      x /= std::sqrt(double(c.head_dim));
      if (c.soft_cap > 0) x = c.soft_cap * std::tanh(x / c.soft_cap);
      if (c.alibi) x += slopes[h] * (t - position);
      score[t] = x;
      max = std::max(max, x);
      any = true;
    }
    double sum = sink != -INFINITY ? std::exp(sink - max) : 0;
    for (double x : score) sum += x == -INFINITY ? 0 : std::exp(x - max);
    std::vector<double> want(c.head_dim_v);
    for (int t = 0; t < n; ++t) {
      if (score[t] == -INFINITY) continue;
      for (int d = 0; d < c.head_dim_v; ++d)
        want[d] += std::exp(score[t] - max) / sum * v[size_t(t) * c.head_dim_v + d];
    }
    const double smallest_step = c.dtype == Dtype::kF16 ? 0x1p-25 : 0.0;
    double largest = 1e-30, error = 0;
    for (double x : want) largest = std::max(largest, std::fabs(x));
    for (int d = 0; d < c.head_dim_v; ++d) {
      const double got = to_float(c.dtype, out.data(), (token * c.num_heads + h) * c.head_dim_v + d);
      if (!(std::fabs(got - want[d]) <= 1e30)) return INFINITY;  // NaN
      error = std::max(error, std::fabs(got - want[d]) - smallest_step);
    }
    const double want_lse = any || sink != -INFINITY ? max + std::log(sum) : -INFINITY;
    const double got_lse = lse[token * c.num_heads + h];
    if (want_lse == -INFINITY) {
      EXPECT_EQ(got_lse, -INFINITY);
    } else {
      EXPECT_NEAR(got_lse, want_lse, 2e-3 * std::max(1.0, std::fabs(want_lse))) << c.describe();
    }
    return error / largest;
  }
};

// The seed of a fuzz test: TQ_TEST_SEED if set, else fixed; always printed.
inline uint32_t test_seed(uint32_t fallback) {
  const char* text = std::getenv("TQ_TEST_SEED");
  const uint32_t seed = text != nullptr ? static_cast<uint32_t>(std::strtoul(text, nullptr, 10)) : fallback;
  std::printf("seed %u (TQ_TEST_SEED overrides)\n", seed);
  return seed;
}

}  // namespace tq::testing
