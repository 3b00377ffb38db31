#include "check/self_test.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check/device_memory.h"

namespace tq::check {
namespace {

constexpr int kKvHeads = 2, kGroup = 3, kHeads = kKvHeads * kGroup, kBlockSize = 16;
constexpr int kQueryLens[] = {1, 5, 37, 0}, kSeqLens[] = {150, 64, 40, 0};  // decode, verify, prefill, nothing
constexpr int kSeqs = 4, kQueries = 43, kMaxBlocks = 10;
constexpr uint32_t kSeed = 20261125;

// Of an element, relative to its vector's largest: float arithmetic, one rounding of norms and scales is in the format.
constexpr double kCodecTolerance = 1e-3;
// A key within rounding of a threshold may take the other code: so many vectors of a thousand may, by so much.
constexpr double kTiesPerMille = 10, kTieTolerance = 0.5;

// Relative to a row's largest output: weights and values in fp16 (2^-11 each), queries within 2^-11 of their largest
// element, and the output's own rounding.
double attend_tolerance(int dtype) { return dtype == TQ_DTYPE_BF16 ? 1e-2 : 5e-3; }

// Floats as a dtype's bytes and back. Numbers below fp16's normal ones become 0: the checks need none.
uint16_t narrow(int dtype, float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if (dtype == TQ_DTYPE_BF16) return static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
  const auto sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  u &= 0x7FFFFFFFu;
  return u < 0x38800000u ? sign : static_cast<uint16_t>(sign | (u + 0xFFFu + (u >> 13 & 1u) - 0x38000000u) >> 13);
}
float widen(int dtype, uint16_t h) {
  if (dtype == TQ_DTYPE_BF16) return std::bit_cast<float>(uint32_t{h} << 16);
  const uint32_t sign = uint32_t{h} << 16 & 0x80000000u, rest = h & 0x7FFFu;
  if (rest < 0x400u)
    return std::bit_cast<float>(sign) + std::ldexp(static_cast<float>(rest), -24) * (sign != 0 ? -1 : 1);
  if (rest >= 0x7C00u) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
}

struct Features {
  const char* name;
  int dtype = TQ_DTYPE_F16;
  bool causal = true;
  int window = 0;
  float soft_cap = 0;
  bool sinks = false, alibi = false, spans = false;
};

class SelfTest {
 public:
  SelfTest(const TqApi& api, TqBackend* backend, int device_kind)
      : api_(api), backend_(backend), memory_(make_device_memory(device_kind)) {}

  // All checks of one format and head dimension, as a line.
  void instance(const TqFormatInfo& format, int dim, const std::vector<Features>& features) {
    format_ = format;
    dim_ = dim;
    std::string line = fmt::format("{} head_dim {}:", format.name, dim);
    try {
      fill();
      line += fmt::format(" store and dequantize {:.1e}", check_codec());
      line += fmt::format(", rotate {:.1e}", check_rotate());
      check_copy();
      line += ", copy, attend";
      for (const Features& f : features) line += fmt::format(" {:.1e}{}", check_attend(f), f.name);
    } catch (const std::exception& error) {
      line += fmt::format(" FAILED: {}", error.what());
      ++failed_;
    }
    memory_->clear();
    fmt::print("{}\n", line);
    std::fflush(stdout);
  }

  int passed() const { return passed_; }
  int failed() const { return failed_; }

 private:
  template <class F, class Args>
  void call(F function, const Args& args, const char* name) {
    TqError error = {sizeof(TqError), 0, ""};
    if (function(backend_, &args, &error) != TQ_OK)
      throw std::runtime_error(fmt::format("{}: {}", name, error.message));
  }
  void expect(bool holds, const std::string& sentence) {
    if (!holds) throw std::runtime_error(sentence);
    ++passed_;
  }

  TqLayerDesc layer(int dtype) const {
    TqLayerDesc d = {};
    d.struct_size = sizeof(d);
    d.format_id = format_.format_id;
    d.num_heads = kHeads;
    d.num_kv_heads = kKvHeads;
    d.head_dim = dim_;
    d.dtype = dtype;
    d.attention_kind = TQ_ATTENTION_DECODER;
    return d;
  }

  // Keys and values of all tokens, stored in shuffled blocks.
  void fill() {
    num_tokens_ = 0;
    for (const int n : kSeqLens) num_tokens_ += n;
    const size_t elements = size_t(num_tokens_) * kKvHeads * dim_;
    std::normal_distribution<float> normal;
    key_.resize(elements), value_.resize(elements);
    for (float& x : key_) x = normal(rng_);
    for (float& x : value_) x = normal(rng_) + 0.3f;
    table_.resize(kSeqs * kMaxBlocks);
    for (size_t i = 0; i < table_.size(); ++i) table_[i] = static_cast<int32_t>(i);
    std::shuffle(table_.begin(), table_.end(), rng_);
    std::vector<int64_t> slots;
    for (int s = 0; s < kSeqs; ++s) {
      for (int t = 0; t < kSeqLens[s]; ++t) {
        slots.push_back(int64_t{table_[s * kMaxBlocks + t / kBlockSize]} * kBlockSize + t % kBlockSize);
      }
    }
    const TqLayerDesc d = layer(TQ_DTYPE_F32);
    TqKvCacheSpec spec = {};
    spec.struct_size = sizeof(spec);
    TqError error = {sizeof(TqError), 0, ""};
    if (api_.kv_cache_spec(&d, &spec, &error) != TQ_OK) throw std::runtime_error(error.message);
    // Twice the blocks: the second half is what copy_pages copies to. Bytes that nothing was stored to are NaN.
    const int64_t page = spec.bytes_per_token * kBlockSize, blocks = 2 * int64_t(table_.size());
    pages_ = {};
    pages_.struct_size = sizeof(pages_);
    pages_.format_id = format_.format_id;
    pages_.data = memory_->put(std::vector<uint8_t>(size_t(page * blocks), 0xff));
    pages_.num_blocks = blocks;
    pages_.block_stride_bytes = page;
    pages_.block_size = kBlockSize;
    TqStoreKvArgs a = {};
    a.struct_size = sizeof(a);
    a.layer = &d;
    a.pages = &pages_;
    a.num_tokens = num_tokens_;
    a.key = memory_->put(key_);
    a.value = memory_->put(value_);
    a.key_token_stride = a.value_token_stride = int64_t{kKvHeads} * dim_;
    a.key_head_stride = a.value_head_stride = dim_;
    a.slot_mapping = memory_->put(slots);
    call(api_.store_kv, a, "store_kv");
  }

  void dequantize(const std::vector<int32_t>& table, std::vector<float>* key, std::vector<float>* value) {
    const TqLayerDesc d = layer(TQ_DTYPE_F32);
    std::vector<int32_t> first(kSeqs, 0), start = {0};
    for (const int n : kSeqLens) start.push_back(start.back() + n);
    TqDequantKvArgs a = {};
    a.struct_size = sizeof(a);
    a.layer = &d;
    a.pages = &pages_;
    a.num_seqs = kSeqs;
    a.max_blocks_per_seq = kMaxBlocks;
    a.block_table = memory_->put(table);
    a.block_table_stride = kMaxBlocks;
    a.first_tokens = memory_->put(first);
    a.token_start_loc = memory_->put(start);
    a.num_tokens = num_tokens_;
    a.key_out = memory_->put(std::vector<float>(key_.size(), NAN));
    a.value_out = memory_->put(std::vector<float>(value_.size(), NAN));
    call(api_.dequant_kv, a, "dequant_kv");
    *key = memory_->get<float>(a.key_out, key_.size());
    *value = memory_->get<float>(a.value_out, value_.size());
  }

  // What comes back is what the reference codec makes of the same vectors.
  double check_codec() {
    dequantize(table_, &decoded_key_, &decoded_value_);
    double worst = 0;
    for (const bool is_key : {true, false}) {
      const std::vector<float>& in = is_key ? key_ : value_;
      const std::vector<float>& got = is_key ? decoded_key_ : decoded_value_;
      std::vector<float> want(in.size());
      TqError error = {sizeof(TqError), 0, ""};
      const auto rows = static_cast<int64_t>(in.size()) / dim_;
      TqFakeQuantizeArgs args = {};
      args.struct_size = sizeof(args);
      args.format_id = format_.format_id;
      args.side = is_key ? TQ_SIDE_KEY : TQ_SIDE_VALUE;
      args.head_dim = dim_;
      args.num_rows = rows;
      args.in = in.data();
      args.out = want.data();
      if (api_.fake_quantize(&args, &error) != TQ_OK) {
        throw std::runtime_error(error.message);
      }
      int64_t ties = 0;
      for (int64_t r = 0; r < rows; ++r) {
        double largest = 1e-30, off = 0;
        for (int i = 0; i < dim_; ++i) {
          const size_t at = size_t(r) * dim_ + i;
          largest = std::max(largest, std::fabs(double(want[at])));
          const double distance = std::fabs(double(got[at]) - want[at]);
          off = distance <= 1e30 ? std::max(off, distance) : 1e30;  // NaN
        }
        const double error_of_row = off / largest;
        if (error_of_row > kCodecTolerance) {
          ++ties;
          if (error_of_row > kTieTolerance) {
            throw std::runtime_error(fmt::format("{} vector {} is off by {:.1e} of its largest element",
                                                 is_key ? "key" : "value", r, error_of_row));
          }
        } else {
          worst = std::max(worst, error_of_row);
        }
      }
      expect(double(ties) <= 1 + double(rows) * kTiesPerMille / 1000,
             fmt::format("{} of {} {} vectors differ from the reference codec", ties, rows, is_key ? "key" : "value"));
    }
    return worst;
  }

  // Twice is the identity, and once leaves lengths and is no copy, unless the format does not rotate.
  double check_rotate() {
    const TqLayerDesc d = layer(TQ_DTYPE_F32);
    const size_t count = key_.size();
    TqRotateArgs a = {};
    a.struct_size = sizeof(a);
    a.num_heads = kKvHeads;
    a.side = TQ_SIDE_KEY;
    a.layer = &d;
    a.num_tokens = num_tokens_;
    a.x = memory_->put(key_);
    a.x_token_stride = a.out_token_stride = int64_t{kKvHeads} * dim_;
    a.x_head_stride = a.out_head_stride = dim_;
    a.out = memory_->put(std::vector<float>(count, NAN));
    call(api_.rotate, a, "rotate");
    const std::vector<float> once = memory_->get<float>(a.out, count);
    a.x = a.out;
    call(api_.rotate, a, "rotate");
    const std::vector<float> twice = memory_->get<float>(a.out, count);
    double worst = 0, before = 0, after = 0;
    for (size_t i = 0; i < count; ++i) {
      const double off = std::fabs(double(twice[i]) - key_[i]);
      worst = off <= 1e30 ? std::max(worst, off) : 1e30;
      before += double(key_[i]) * key_[i], after += double(once[i]) * once[i];
    }
    expect(worst < 1e-4 && std::fabs(after / before - 1) < 1e-4,
           fmt::format("two rotations are off the identity by {:.1e}", worst));
    expect((format_.rotates_keys == 0) == (once == key_), "a rotation is a copy, or a copy a rotation");
    return worst;
  }

  void check_copy() {
    std::vector<int64_t> pairs;
    std::vector<int32_t> moved(table_);
    const auto half = static_cast<int32_t>(table_.size());
    for (int32_t& block : moved) {
      pairs.push_back(block);
      pairs.push_back(block = half + (block + 7) % half);
    }
    const TqLayerDesc d = layer(TQ_DTYPE_F32);
    TqCopyPagesArgs a = {};
    a.struct_size = sizeof(a);
    a.layer = &d;
    a.pages = &pages_;
    a.src_dst = memory_->put(pairs);
    a.num_pairs = static_cast<int64_t>(pairs.size()) / 2;
    call(api_.copy_pages, a, "copy_pages");
    std::vector<float> key, value;
    dequantize(moved, &key, &value);
    expect(key == decoded_key_ && value == decoded_value_, "copied pages decode to other numbers");
  }

  double check_attend(const Features& f) {
    TqLayerDesc d = layer(f.dtype);
    d.sliding_window = f.window;
    d.soft_cap = f.soft_cap;
    const size_t count = size_t(kQueries) * kHeads * dim_;
    std::normal_distribution<float> normal;
    std::vector<float> query(count);
    std::vector<uint16_t> bits(count);
    for (size_t i = 0; i < count; ++i) {
      bits[i] = narrow(f.dtype, normal(rng_) * 2);
      query[i] = widen(f.dtype, bits[i]);
    }
    std::vector<float> sinks(kHeads), slopes(kHeads);
    for (int h = 0; h < kHeads; ++h) sinks[h] = normal(rng_) * 3, slopes[h] = std::exp2(-8.0f * float(h + 1) / kHeads);
    std::vector<int32_t> start = {0}, lens(kSeqLens, kSeqLens + kSeqs), spans;
    for (const int q : kQueryLens) start.push_back(start.back() + q);
    for (const int n : kSeqLens) spans.insert(spans.end(), {n / 2, n / 2 + n / 3});
    TqAttendArgs a = {};
    a.struct_size = sizeof(a);
    a.num_seqs = kSeqs;
    a.layer = &d;
    a.pages = &pages_;
    a.num_tokens = kQueries;
    a.query = memory_->put(bits);
    a.query_token_stride = a.out_token_stride = int64_t{kHeads} * dim_;
    a.query_head_stride = a.out_head_stride = dim_;
    a.out = memory_->put(std::vector<uint16_t>(count, 0x7fff));  // NaN
    a.query_start_loc = memory_->put(start);
    a.seq_lens = memory_->put(lens);
    a.block_table = memory_->put(table_);
    a.block_table_stride = a.max_blocks_per_seq = kMaxBlocks;
    a.scale = 1.0f / std::sqrt(static_cast<float>(dim_));
    a.causal = f.causal ? 1 : 0;
    a.max_query_len = *std::max_element(kQueryLens, kQueryLens + kSeqs);
    a.sinks = f.sinks ? memory_->put(sinks) : nullptr;
    a.alibi_slopes = f.alibi ? memory_->put(slopes) : nullptr;
    a.lse = memory_->put(std::vector<float>(size_t(kQueries) * kHeads, NAN));
    a.spans = f.spans ? memory_->put(spans) : nullptr;
    a.max_spans = f.spans ? 1 : 0;
    TqError error = {sizeof(TqError), 0, ""};
    if (api_.workspace_size(backend_, &d, &a.workspace_bytes, &error) != TQ_OK) {
      throw std::runtime_error(error.message);
    }
    a.workspace = memory_->put(std::vector<uint8_t>(a.workspace_bytes));  // zeros, before the first use
    call(api_.attend, a, "attend");
    const std::vector<uint16_t> out = memory_->get<uint16_t>(a.out, count);
    const std::vector<float> lse = memory_->get<float>(a.lse, size_t(kQueries) * kHeads);

    double worst = 0;
    int base = 0;
    for (int s = 0; s < kSeqs; base += kSeqLens[s++]) {
      for (int q = 0; q < kQueryLens[s]; ++q) {
        for (int h = 0; h < kHeads; ++h) {
          const size_t row = size_t(start[s] + q) * kHeads + h;
          std::vector<double> want(dim_);
          const double want_lse = reference_row(f, base, s, q, h, &query[row * dim_], f.sinks ? sinks[h] : -INFINITY,
                                                f.alibi ? slopes[h] : 0, &spans[2 * s], want.data());
          double largest = 1e-30, off = 0;
          for (int i = 0; i < dim_; ++i) {
            largest = std::max(largest, std::fabs(want[i]));
            const double distance = std::fabs(widen(f.dtype, out[row * dim_ + i]) - want[i]);
            off = distance <= 1e30 ? std::max(off, distance) : 1e30;
          }
          worst = std::max(worst, off / largest);
          if (!(std::fabs(lse[row] - want_lse) <= 2e-3 * std::max(1.0, std::fabs(want_lse)))) {
            throw std::runtime_error(fmt::format("attend{}: LSE of sequence {} query {} head {} is {}, not {}", f.name,
                                                 s, q, h, lse[row], want_lse));
          }
        }
      }
    }
    expect(worst <= attend_tolerance(f.dtype),
           fmt::format("attend{} is off by {:.1e} of a row's largest output; {:.0e} is allowed", f.name, worst,
                       attend_tolerance(f.dtype)));
    return worst;
  }

  // Attention in double of one query over the decoded cache. base: first decoded row of the sequence. Returns the LSE.
  double reference_row(const Features& f, int base, int s, int q, int h, const float* query, double sink, double slope,
                       const int32_t* span, double* out) const {
    const int n = kSeqLens[s], position = n - kQueryLens[s] + q, kv = h / kGroup;
    std::vector<double> score(n, -INFINITY);
    double max = sink;
    for (int t = 0; t < n; ++t) {
      bool seen = (!f.causal || t <= position) && (f.window == 0 || t > position - f.window);
      seen = seen || (f.spans && position >= span[0] && position < span[1] && t >= span[0] && t < span[1]);
      if (!seen) continue;
      const float* k = &decoded_key_[(size_t(base + t) * kKvHeads + kv) * dim_];
      double x = 0;
      for (int i = 0; i < dim_; ++i) x += double(k[i]) * query[i];
      x /= std::sqrt(double(dim_));
      if (f.soft_cap > 0) x = f.soft_cap * std::tanh(x / f.soft_cap);
      score[t] = x + slope * (t - position);
      max = std::max(max, score[t]);
    }
    double sum = std::exp(sink - max);
    for (int t = 0; t < n; ++t) {
      const double weight = std::exp(score[t] - max);
      if (weight == 0) continue;
      sum += weight;
      const float* v = &decoded_value_[(size_t(base + t) * kKvHeads + kv) * dim_];
      for (int i = 0; i < dim_; ++i) out[i] += weight * v[i];
    }
    for (int i = 0; i < dim_; ++i) out[i] /= sum;
    return max + std::log(sum);
  }

  const TqApi& api_;
  TqBackend* backend_;
  std::unique_ptr<DeviceMemory> memory_;
  std::mt19937 rng_{kSeed};  // NOLINT(bugprone-random-generator-seed): the same numbers on every machine
  TqFormatInfo format_ = {};
  int dim_ = 0, num_tokens_ = 0, passed_ = 0, failed_ = 0;
  std::vector<float> key_, value_, decoded_key_, decoded_value_;
  std::vector<int32_t> table_;
  TqPages pages_ = {};
};

}  // namespace

int self_test(const TqApi& api, int device_kind) {
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = device_kind;
  TqBackend* backend = nullptr;
  TqError error = {sizeof(TqError), 0, ""};
  if (api.create_backend(&options, &backend, &error) != TQ_OK) {
    fmt::print("The self-test cannot run: {}.\n", error.message);
    return -1;
  }
  TqCaps caps = {};
  caps.struct_size = sizeof(caps);
  api.query_caps(backend, &caps, &error);
  const char* const kinds[] = {"cpu", "cuda", "hip"};
  fmt::print(
      "Self-test of {} (build id {}) on {}, seed {}. Errors are relative to a vector's or row's largest element.\n",
      kinds[caps.device_kind - 1], caps.build_id, caps.device_name, kSeed);
  const auto began = std::chrono::steady_clock::now();
  int passed = 0, failed = 0;
  try {
    SelfTest test(api, backend, caps.device_kind);
    int64_t count = 0;
    api.list_formats(nullptr, &count, &error);
    TqFormatInfo blank = {};
    blank.struct_size = sizeof(blank);
    std::vector<TqFormatInfo> formats(static_cast<size_t>(count), blank);
    api.list_formats(formats.data(), &count, &error);
    std::vector<Features> plain(2), all(8);
    plain[0] = {.name = ""};
    plain[1] = {.name = " (bfloat16, window, sinks, soft cap, ALiBi)",
                .dtype = TQ_DTYPE_BF16,
                .window = 33,
                .soft_cap = 20,
                .sinks = true,
                .alibi = true};
    all[0] = plain[0], all[1] = plain[1];
    all[2] = {.name = " (not causal)", .causal = false};
    all[3] = {.name = " (window)", .window = 20};
    all[4] = {.name = " (sinks)", .sinks = true};
    all[5] = {.name = " (soft cap)", .soft_cap = 5};
    all[6] = {.name = " (ALiBi)", .alibi = true};
    all[7] = {.name = " (spans)", .spans = true};
    for (const TqFormatInfo& format : formats) {
      if (format.test_only != 0) continue;
      for (const int dim : {64, 128, 256, 512, 80, 192}) test.instance(format, dim, dim == 128 ? all : plain);
    }
    passed = test.passed(), failed = test.failed();
  } catch (const std::exception& e) {
    fmt::print("The self-test stopped: {}.\n", e.what());
    ++failed;
  }
  api.destroy_backend(backend);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  fmt::print("{}: {} checks passed, {} instances failed, {:.1f} s.\n", failed == 0 ? "PASSED" : "FAILED", passed,
             failed, took.count());
  return failed;
}

}  // namespace tq::check
