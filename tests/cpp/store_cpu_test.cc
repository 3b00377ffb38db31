// store_cpu_test.cc - CPU store, dequantize, rotate and copy against the reference codec and page.
#include <algorithm>
#include <ctime>

#include "cpu_fixture.h"

namespace tq::testing {
namespace {

struct Store {
  const Format* format;
  PageLayout layout;
  Dtype dtype;
  int num_tokens;
  std::vector<uint8_t> key, value;
  std::vector<int64_t> slots;
  AlignedBytes pages;
  int64_t num_blocks = 5, stride;

  // scale(i): magnitude of token i.
  template <class Scale>
  Store(const Format& f, Dtype dt, int dim, int dim_v, int heads, int block, int tokens, uint32_t seed, Scale&& scale)
      : format(&f),
        layout(make_page_layout(f, dim, dim_v, heads, block)),
        dtype(dt),
        num_tokens(tokens),
        pages(static_cast<size_t>(5 * layout.page_bytes()), 0),
        stride(layout.page_bytes()) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    key.resize(size_t(tokens) * heads * dim * dtype_bytes(dt));
    value.resize(size_t(tokens) * heads * dim_v * dtype_bytes(dt));
    for (int64_t i = 0; i < int64_t{tokens} * heads * dim; ++i) {
      from_float(dt, key.data(), i, normal(rng) * scale(i / (heads * dim)));
    }
    for (int64_t i = 0; i < int64_t{tokens} * heads * dim_v; ++i) {
      from_float(dt, value.data(), i, normal(rng) * scale(i / (heads * dim_v)));
    }
    std::vector<int64_t> all(static_cast<size_t>(num_blocks * block));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
    std::shuffle(all.begin(), all.end(), rng);
    slots.assign(all.begin(), all.begin() + tokens);
  }

  PagedCache cache() { return make_paged_cache(*format, layout, pages.data(), num_blocks, stride); }

  void run(DeviceState* device, const float* key_offset = nullptr) {
    StoreParams p = {};
    p.key_offset = key_offset;
    p.cache = cache();
    p.dtype = dtype;
    p.num_tokens = num_tokens;
    p.key = key.data();
    p.key_token_stride = int64_t{layout.num_kv_heads} * layout.head_dim;
    p.key_head_stride = layout.head_dim;
    p.value = value.data();
    p.value_token_stride = int64_t{layout.num_kv_heads} * layout.head_dim_v;
    p.value_head_stride = layout.head_dim_v;
    p.slot_mapping = slots.data();
    const KernelStatus status = cpu_kernels().store_kv(device, p);
    ASSERT_EQ(status.code, 0) << status.message;
  }

  std::vector<float> row(const std::vector<uint8_t>& from, int64_t token, int head, int dim) const {
    std::vector<float> out(dim);
    for (int d = 0; d < dim; ++d) out[d] = to_float(dtype, from.data(), (token * layout.num_kv_heads + head) * dim + d);
    return out;
  }
};

uint16_t fp16_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

// Codes equal the reference's, except where the reference's own input to the quantizer lies within tie of a threshold:
// sums are taken in another order here. Norms may then differ by the changed levels, otherwise by one unit in the last
// place.
// Packed rows of the page that is wanted and of the one that came: how many codes differ, and none by more than most.
int different_codes(const uint8_t* want, const uint8_t* got, int bits, int dim, int most) {
  int different = 0;
  for (int d = 0; d < dim; ++d) {
    const int x = unpack_code(want, bits, dim, d), y = unpack_code(got, bits, dim, d);
    EXPECT_LE(std::abs(x - y), most) << "dimension " << d;
    different += x != y;
  }
  return different;
}

void expect_equal_pages(Store& s) {
  const PageLayout& l = s.layout;
  AlignedBytes want(size_t(s.num_blocks * s.stride), 0);
  int64_t codes = 0, ties = 0;
  // fp16 numbers that come from sums of floats.
  auto near = [](const uint8_t* a, const uint8_t* b) { return std::abs(int(fp16_at(a)) - int(fp16_at(b))) <= 1; };
  for (int i = 0; i < s.num_tokens; ++i) {
    if (s.slots[i] < 0) continue;
    const int64_t block = s.slots[i] / l.block_size;
    const int in_block = static_cast<int>(s.slots[i] % l.block_size), t = in_block % kAtomTokens;
    for (int h = 0; h < l.num_kv_heads; ++h) {
      const auto key = s.row(s.key, i, h, l.head_dim), value = s.row(s.value, i, h, l.head_dim_v);
      reference_store<float>(*s.format, l, want.data() + block * s.stride, h, in_block, key.data(), value.data());
      const uint8_t* a = want.data() + block * s.stride + l.atom_offset(h, in_block);
      const uint8_t* b = s.pages.data() + block * s.stride + l.atom_offset(h, in_block);
      if (l.key_bits > 8) {
        ASSERT_EQ(std::memcmp(a + l.key_row_offset(t), b + l.key_row_offset(t), l.key_row_bytes()), 0);
        ASSERT_EQ(std::memcmp(a + l.value_row_offset(t), b + l.value_row_offset(t), l.value_row_bytes()), 0);
        continue;
      }
      int different = different_codes(a + l.key_row_offset(t), b + l.key_row_offset(t), l.key_bits, l.head_dim,
                                      s.format->rotates_keys() ? 1 : 0);
      // An integer's step is a norm, which may be the next fp16 number: 2^-11 of 127 levels, a code in thirty.
      const bool integers = s.format->key_codec == KeyCodec::kInteger;
      const bool same_norm = !l.has_key_norm || fp16_at(a + l.key_norm_offset(t)) == fp16_at(b + l.key_norm_offset(t));
      codes += l.head_dim;
      ties += integers && !same_norm ? 0 : different;
      if (l.has_key_norm && (different == 0 || integers)) {
        ASSERT_TRUE(near(a + l.key_norm_offset(t), b + l.key_norm_offset(t)));
      }
      if (s.format->rotates_values()) {
        different =
            different_codes(a + l.value_row_offset(t), b + l.value_row_offset(t), l.value_bits, l.head_dim_v, 1);
        codes += l.head_dim_v;
        ties += different;
        if (different == 0) ASSERT_TRUE(near(a + l.value_scale_offset(t), b + l.value_scale_offset(t)));
        continue;
      }
      ASSERT_EQ(fp16_at(a + l.value_scale_offset(t)), fp16_at(b + l.value_scale_offset(t)));
      ASSERT_EQ(fp16_at(a + l.value_zero_offset(t)), fp16_at(b + l.value_zero_offset(t)));
      ASSERT_EQ(std::memcmp(a + l.value_row_offset(t), b + l.value_row_offset(t), l.value_row_bytes()), 0);
    }
  }
  // Float sums over up to 512 elements differ by some 1e-6 relative; thresholds are hit that closely in about as many
  // codes.
  EXPECT_LE(ties, codes / 10000 + 2) << s.format->name;
}

TEST(StoreCpu, EqualsReference) {
  const uint32_t seed = test_seed(3);
  CpuDevice device;
  for (const Format& format : all_formats()) {
    for (const int dim : {16, 48, 64, 80, 96, 112, 128, 192, 256, 512}) {
      for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
        Store s(format, dtype, dim, dim == 128 ? 64 : dim, 2, 32, 100, seed + dim, [](int64_t) { return 1.0f; });
        s.slots[7] = -1;
        s.run(device.get());
        SCOPED_TRACE(std::string(format.name) + " dim " + std::to_string(dim));
        expect_equal_pages(s);
      }
    }
  }
}

// What is stored with an offset is what is stored of keys less the offset; values know nothing of it.
TEST(StoreCpu, KeyOffsetIsTakenFromEveryKey) {
  const uint32_t seed = test_seed(23);
  CpuDevice device;
  for (const Format& format : all_formats()) {
    for (const int dim : {48, 128}) {
      Store s(format, Dtype::kF32, dim, dim, 2, 16, 40, seed, [](int64_t) { return 1.0f; });
      std::vector<float> offset(size_t(2) * dim);
      std::mt19937 rng(seed);
      for (float& x : offset) x = static_cast<float>(static_cast<int>(rng() % 513) - 256);  // far above the keys
      s.run(device.get(), offset.data());
      auto pages = [&s] { return std::vector<uint8_t>(s.pages.data(), s.pages.data() + s.num_blocks * s.stride); };
      const std::vector<uint8_t> with = pages();
      float* key = reinterpret_cast<float*>(s.key.data());
      for (int i = 0; i < 40 * 2 * dim; ++i) key[i] -= offset[size_t(i) % offset.size()];
      s.run(device.get());
      EXPECT_TRUE(with == pages()) << format.name;
      s.run(device.get(), offset.data());
      EXPECT_FALSE(with == pages()) << format.name;
    }
  }
}

TEST(StoreCpu, PaddingIsSkippedAndCounted) {
  CpuDevice device;
  Store s(*find_format("turboquant_4bit_nc"), Dtype::kF32, 128, 128, 2, 16, 20, 1, [](int64_t) { return 1.0f; });
  std::fill(s.slots.begin(), s.slots.end(), -1);
  s.run(device.get());
  for (int64_t i = 0; i < s.num_blocks * s.stride; ++i) ASSERT_EQ(s.pages.data()[i], 0) << i;
  s.slots[3] = 17;
  s.run(device.get());
  EXPECT_EQ(device.counters().store_calls, 2u);
  EXPECT_EQ(device.counters().stored_tokens, 1u);
}

// Magnitudes from 1e-8 to 1e38, zeros, infinities and NaN next to ordinary tokens: everything decodes to finite
// numbers, and the ordinary tokens to what they are without bad neighbours.
TEST(StoreCpu, OutliersStayInTheirToken) {
  CpuDevice device;
  for (const Format& format : all_formats()) {
    if (format.test_only) continue;  // raw floats keep what they are given
    auto scale = [](int64_t i) { return i % 8 == 0 ? 1e5f : i % 8 == 1 ? 1e-8f : i % 8 == 2 ? 1e37f : 1.0f; };
    Store s(format, Dtype::kF32, 128, 128, 2, 32, 64, 5, scale);
    float* key = reinterpret_cast<float*>(s.key.data());
    float* value = reinterpret_cast<float*>(s.value.data());
    auto spoil = [&](int token, float x) {
      key[token * 256 + 5] = key[token * 256 + 130] = x;
      value[token * 256 + 9] = value[token * 256 + 200] = x;
    };
    spoil(3, NAN);
    spoil(11, INFINITY);
    spoil(19, -INFINITY);
    std::fill(key + 27 * 256, key + 28 * 256, 0.0f);
    std::fill(value + 27 * 256, value + 28 * 256, 0.0f);
    s.run(device.get());
    std::vector<double> k(128), v(128);
    for (int i = 0; i < s.num_tokens; ++i) {
      for (int h = 0; h < 2; ++h) {
        reference_load<double>(format, s.layout, s.pages.data() + s.slots[i] / 32 * s.stride, h, int(s.slots[i] % 32),
                               k.data(), v.data());
        double norm = 0, error = 0;
        if (format.rotates_keys()) rotate(k.data(), 128);
        if (format.rotates_values()) rotate(v.data(), 128);
        for (int d = 0; d < 128; ++d) {
          ASSERT_TRUE(std::isfinite(k[d]) && std::isfinite(v[d])) << format.name << " token " << i;
          norm += double(key[(i * 2 + h) * 128 + d]) * key[(i * 2 + h) * 128 + d];
          error += std::pow(k[d] - key[(i * 2 + h) * 128 + d], 2);
        }
        const bool ordinary = i % 8 > 2 && i != 3 && i != 11 && i != 19 && i != 27;
        if (ordinary) {
          EXPECT_LE(error / norm, 0.1)
              << format.name << " token "
              << i;  // 3 bits: 0.0345 on average, more where one rotated element lies beyond 4 sigma
        }
        if (i == 27) {
          EXPECT_EQ(v[0], 0.0);
          EXPECT_EQ(k[0], 0.0);
        }
      }
    }
  }
}

// A fuzzer gave two sequences two thousand million rows, of which six are tokens: each row was looked at.
TEST(DequantCpu, RowsWithoutTokensCostNothing) {
  CpuDevice device;
  const Format& format = *find_format("tq_8");
  Store s(format, Dtype::kF32, 64, 64, 2, 16, 16, 19, [](int64_t) { return 1.0f; });
  for (int i = 0; i < 16; ++i) s.slots[i] = i;
  s.run(device.get());
  const std::vector<int32_t> table = {0, 0}, first = {2, 9}, start = {0, 8, 2'000'000'000}, counts = {4, 2};
  std::vector<float> key(10 * 2 * 64, -7.0f), value(key);
  DequantParams p = {};
  p.cache = s.cache();
  p.dtype = Dtype::kF32;
  p.num_seqs = 2;
  p.max_blocks_per_seq = 1;
  p.block_table = table.data();
  p.block_table_stride = 1;
  p.first_tokens = first.data();
  p.token_start_loc = start.data();
  p.token_counts = counts.data();
  p.num_tokens = start[2];
  p.key_out = key.data();
  p.value_out = value.data();
  const std::clock_t before = std::clock();
  ASSERT_EQ(cpu_kernels().dequant_kv(device.get(), p).code, 0);
  // Of all threads; microseconds, and 4 seconds at two nanoseconds a row.
  EXPECT_LT(double(std::clock() - before) / CLOCKS_PER_SEC, 0.5);
  for (int row = 0; row < 10; ++row) {
    const bool token = row < 4 || row >= 8;
    for (int d = 0; d < 128; ++d) EXPECT_EQ(key[row * 128 + d] != -7.0f, token) << row;
  }
}

// Ranges of four sequences: one that ends within its rows, an empty one, one that begins within a page. Rows that no
// range fills keep what was in them.
TEST(DequantCpu, EqualsReference) {
  CpuDevice device;
  const std::vector<int32_t> table = {3, 0, -9, -9, -9, -9, 4, 2, 1, -9, -9, -9};  // [4, 3]; -9 must not be read
  const std::vector<int32_t> first = {0, 5, 13, 2}, start = {0, 25, 25, 56, 70}, counts = {20, 0, 31, 0};
  constexpr int kRows = 75;
  for (const Format& format : all_formats()) {
    for (const int dim : {48, 80, 128, 512}) {
      Store s(format, Dtype::kF32, dim, dim, 2, 16, 80, 17, [](int64_t) { return 1.0f; });
      for (int i = 0; i < 80; ++i) s.slots[i] = i;
      s.run(device.get());
      for (const bool keep_rotated : {false, true}) {
        std::vector<float> key(kRows * 2 * dim, -7.0f), value(key);
        DequantParams p = {};
        p.cache = s.cache();
        p.dtype = Dtype::kF32;
        p.keep_rotated = keep_rotated;
        p.num_seqs = 4;
        p.max_blocks_per_seq = 3;
        p.block_table = table.data();
        p.block_table_stride = 3;
        p.first_tokens = first.data();
        p.token_start_loc = start.data();
        p.token_counts = counts.data();
        p.num_tokens = kRows;
        p.key_out = key.data();
        p.value_out = value.data();
        ASSERT_EQ(cpu_kernels().dequant_kv(device.get(), p).code, 0);
        std::vector<double> k(dim), v(dim);
        std::vector<bool> filled(kRows, false);
        for (int q = 0; q < 4; ++q) {
          for (int i = 0; i < counts[q]; ++i) {
            filled[start[q] + i] = true;
            const int token = first[q] + i, block = table[q * 3 + token / 16];
            for (int h = 0; h < 2; ++h) {
              reference_load<double>(format, s.layout, s.pages.data() + block * s.stride, h, token % 16, k.data(),
                                     v.data());
              if (format.rotates_keys() && !keep_rotated) rotate(k.data(), dim);
              if (format.rotates_values()) rotate(v.data(), dim);
              for (int d = 0; d < dim; ++d) {
                const int64_t at = (int64_t{start[q] + i} * 2 + h) * dim + d;
                // A few float roundings of values below 8.
                ASSERT_NEAR(key[at], k[d], 1e-5) << format.name << " dim " << dim;
                ASSERT_NEAR(value[at], v[d], 1e-5) << format.name << " dim " << dim;
              }
            }
          }
        }
        for (int64_t i = 0; i < int64_t{kRows} * 2 * dim; ++i) {
          const bool kept = key[i] == -7.0f && value[i] == -7.0f;
          ASSERT_TRUE(kept || filled[i / (2 * dim)]) << "row " << i / (2 * dim);
        }
      }
    }
  }
}

TEST(RotateCpu, EqualsReference) {
  CpuDevice device;
  std::mt19937 rng(test_seed(29));
  std::normal_distribution<float> normal;
  constexpr int kTokens = 19, kHeads = 3, kGap = 5;  // kGap: rows lie further apart than they are long
  for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
    for (const int dim : {16, 48, 64, 80, 112, 128, 208, 512}) {
      const int64_t count = int64_t{kTokens} * kHeads * (dim + kGap);
      std::vector<uint8_t> x(count * dtype_bytes(dtype)), out(x.size(), 0x33);
      for (int64_t i = 0; i < count; ++i) from_float(dtype, x.data(), i, normal(rng));
      for (const bool rotates : {true, false}) {
        RotateParams p = {};
        p.dtype = dtype;
        p.rotates = rotates;
        p.num_heads = kHeads;
        p.head_dim = dim;
        p.num_tokens = kTokens;
        p.x = x.data();
        p.x_token_stride = p.out_token_stride = kHeads * (dim + kGap);
        p.x_head_stride = p.out_head_stride = dim + kGap;
        p.out = out.data();
        ASSERT_EQ(cpu_kernels().rotate(device.get(), p).code, 0);
        std::vector<double> want(dim);
        for (int64_t r = 0; r < kTokens * kHeads; ++r) {
          const int64_t at = r * (dim + kGap);
          for (int d = 0; d < dim; ++d) want[d] = to_float(dtype, x.data(), at + d);
          if (rotates) rotate(want.data(), dim);
          for (int d = 0; d < dim; ++d) {
            // One rounding of the output to the dtype (values are below 8), on top of nine of float.
            const double tolerance = dtype == Dtype::kF32 ? 4e-6 : dtype == Dtype::kF16 ? 2e-3 : 1.6e-2;
            ASSERT_NEAR(to_float(dtype, out.data(), at + d), want[d], rotates ? tolerance : 0.0) << "dim " << dim;
          }
          for (int d = dim; d < dim + kGap; ++d) {
            const size_t byte = static_cast<size_t>(at + d) * dtype_bytes(dtype);
            ASSERT_EQ(out[byte], 0x33) << "between rows";
          }
        }
      }
    }
  }
}

TEST(CopyPagesCpu, CopiesWholePagesInOrder) {
  CpuDevice device;
  Store s(*find_format("turboquant_k3v4_nc"), Dtype::kF32, 64, 64, 2, 16, 80, 23, [](int64_t) { return 1.0f; });
  s.run(device.get());
  const std::vector<uint8_t> before(s.pages.data(), s.pages.data() + 5 * s.stride);
  const int64_t pairs[] = {0, 3, 3, 4};  // the second reads what the first wrote
  CopyParams p = {};
  p.cache = s.cache();
  p.src_dst = pairs;
  p.num_pairs = 2;
  ASSERT_EQ(cpu_kernels().copy_pages(device.get(), p).code, 0);
  for (const int block : {0, 3, 4}) {
    EXPECT_EQ(std::memcmp(s.pages.data() + block * s.stride, before.data(), size_t(s.stride)), 0) << block;
  }
  EXPECT_EQ(std::memcmp(s.pages.data() + s.stride, before.data() + s.stride, size_t(2 * s.stride)), 0);
}

}  // namespace
}  // namespace tq::testing
