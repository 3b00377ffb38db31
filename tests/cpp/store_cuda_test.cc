// store_cuda_test.cc - CUDA store, dequantize, rotation and page copy against the reference codec.
#include "codec/reference.h"
#include "cuda_fixture.h"

namespace tq::testing {
namespace {

class StoreCuda : public CudaTest {};

// How far, in standard deviations, a rotated and normalised key may lie from a threshold and still be called a tie: the
// rounding of 9 butterfly stages and one product in float.
constexpr double kTie = 4e-6;

struct Shape {
  const char* format;
  Dtype dtype;
  int head_dim, head_dim_v, kv_heads, block_size, tokens;
  bool offset;  // is subtracted from keys
};

struct Ties {
  int64_t codes = 0, found = 0;
};

// A row of a rotated vector in an atom.
struct Row {
  int codes, norm;  // offsets
  int bits, dim;
};

// Codes of x that differ between the atoms must be ties; then a becomes as b, norm included, for a whole comparison.
void settle_ties(const Row& row, const std::vector<float>& x, const Codebook* book, uint8_t* a, const uint8_t* b,
                 Ties& ties) {
  std::vector<double> y(x.begin(), x.end());
  double n = 0;
  for (double& e : y) e = std::isnan(e) ? 0 : std::clamp(e, -1e15, 1e15);
  for (const double e : y) n += e * e;
  rotate(y.data(), row.dim);
  uint16_t norm_a, norm_b;
  std::memcpy(&norm_a, a + row.norm, 2);
  std::memcpy(&norm_b, b + row.norm, 2);
  const double deviations = std::sqrt(double(row.dim));
  bool tied = false;
  for (int d = 0; d < row.dim; ++d) {
    ++ties.codes;
    const int u = unpack_code(a + row.codes, row.bits, row.dim, d);
    const int w = unpack_code(b + row.codes, row.bits, row.dim, d);
    if (u == w) continue;
    ASSERT_EQ(std::abs(u - w), 1) << "dim " << d;
    if (book != nullptr) {
      const double at = y[d] * deviations / (std::sqrt(n) + 1e-8);
      ASSERT_NEAR(at, book->midpoints[std::min(u, w)], kTie * std::max(1.0, std::fabs(at)));
    } else if (norm_a == norm_b) {  // integers; their step goes with the norm
      const double level = y[d] / fp16_to_float(norm_b) * kIntegerScale * deviations;
      ASSERT_NEAR(level, std::min(u, w) - kIntegerZero + 0.5, kTie * kIntegerTop);
    }
    ++ties.found;
    tied = true;
  }
  if (!tied || book == nullptr) {
    ASSERT_LE(std::abs(int{norm_a} - int{norm_b}), 1);
  }
  std::memcpy(a + row.norm, &norm_b, 2);
  if (tied) std::memcpy(a + row.codes, b + row.codes, row.dim * row.bits / 8);
}

void check_store(const Shape& shape, uint32_t seed, DeviceState* device) {
  const Format& format = *find_format(shape.format);
  const PageLayout layout =
      make_page_layout(format, shape.head_dim, shape.head_dim_v, shape.kv_heads, shape.block_size);
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  const int64_t key_count = int64_t{shape.tokens} * shape.kv_heads * shape.head_dim;
  const int64_t value_count = int64_t{shape.tokens} * shape.kv_heads * shape.head_dim_v;
  std::vector<uint8_t> key(key_count * dtype_bytes(shape.dtype)), value(value_count * dtype_bytes(shape.dtype));
  for (int64_t i = 0; i < key_count; ++i) {
    from_float(shape.dtype, key.data(), i, normal(rng) * (i % 7 == 0 ? 20.0f : 1.0f));
  }
  for (int64_t i = 0; i < value_count; ++i) from_float(shape.dtype, value.data(), i, normal(rng) + 0.2f);
  if (shape.tokens > 3) {  // a vector of zeros, one of a single constant, one that is not finite
    for (int64_t i = 0; i < int64_t{shape.kv_heads} * shape.head_dim; ++i) from_float(shape.dtype, key.data(), i, 0.0f);
    for (int64_t i = 0; i < int64_t{shape.kv_heads} * shape.head_dim_v; ++i) {
      from_float(shape.dtype, value.data(), i, 1.5f);
    }
    from_float(shape.dtype, key.data(), int64_t{shape.kv_heads} * shape.head_dim, INFINITY);
    from_float(shape.dtype, value.data(), int64_t{shape.kv_heads} * shape.head_dim_v, NAN);
  }
  const int64_t num_blocks = shape.tokens / shape.block_size + 3;
  const int64_t stride = layout.page_bytes() + 32;
  std::vector<int64_t> slots(num_blocks * shape.block_size);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), rng);
  slots.resize(shape.tokens);
  if (shape.tokens > 5) slots[5] = -1;

  AlignedBytes pages(num_blocks * stride, 0x5a);
  DeviceBytes device_pages(pages.data(), num_blocks * stride), device_key(key), device_value(value),
      device_slots(slots);
  StoreParams p = {};
  p.cache = make_paged_cache(format, layout, device_pages.get<uint8_t>(), num_blocks, stride);
  p.dtype = shape.dtype;
  p.num_tokens = shape.tokens;
  p.key = device_key.get();
  p.key_token_stride = int64_t{shape.kv_heads} * shape.head_dim;
  p.key_head_stride = shape.head_dim;
  p.value = device_value.get();
  p.value_token_stride = int64_t{shape.kv_heads} * shape.head_dim_v;
  p.value_head_stride = shape.head_dim_v;
  p.slot_mapping = device_slots.get<int64_t>();
  std::vector<float> key_offset(int64_t{shape.kv_heads} * shape.head_dim);
  for (float& x : key_offset) x = 3.0f * normal(rng);
  DeviceBytes device_offset(key_offset);
  if (shape.offset) p.key_offset = device_offset.get<float>();
  const KernelStatus status = cuda_kernels().store_kv(device, p);
  ASSERT_EQ(status.code, 0) << status.message;
  cuda_ok(cudaDeviceSynchronize());
  std::vector<uint8_t> got(num_blocks * stride);
  device_pages.download(got.data());

  // What nothing was stored to is as it was.
  std::vector<uint8_t> want(pages.data(), pages.data() + num_blocks * stride);
  Ties ties;
  std::vector<float> k(shape.head_dim), v(shape.head_dim_v);
  for (int t = 0; t < shape.tokens; ++t) {
    if (slots[t] < 0) continue;
    const int64_t page = slots[t] / shape.block_size * stride;
    const int offset = static_cast<int>(slots[t] % shape.block_size), row = offset % kAtomTokens;
    for (int h = 0; h < shape.kv_heads; ++h) {
      for (int d = 0; d < shape.head_dim; ++d) {
        k[d] = to_float(shape.dtype, key.data(), (int64_t{t} * shape.kv_heads + h) * shape.head_dim + d);
        if (shape.offset) k[d] -= key_offset[h * shape.head_dim + d];
      }
      for (int d = 0; d < shape.head_dim_v; ++d) {
        v[d] = to_float(shape.dtype, value.data(), (int64_t{t} * shape.kv_heads + h) * shape.head_dim_v + d);
      }
      reference_store<float>(format, layout, &want[page], h, offset, k.data(), v.data());
      uint8_t* a = &want[page + layout.atom_offset(h, offset)];
      const uint8_t* b = &got[page + layout.atom_offset(h, offset)];
      if (format.rotates_keys()) {
        const Row rows = {layout.key_row_offset(row), layout.key_norm_offset(row), format.key_bits, shape.head_dim};
        ASSERT_NO_FATAL_FAILURE(settle_ties(rows, k, key_codebook(format), a, b, ties));
      }
      if (format.rotates_values()) {
        const Row rows = {layout.value_row_offset(row), layout.value_scale_offset(row), format.value_bits,
                          shape.head_dim_v};
        ASSERT_NO_FATAL_FAILURE(settle_ties(rows, v, value_codebook(format), a, b, ties));
      }
    }
  }
  EXPECT_LE(ties.found, 1 + ties.codes / 10000);
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(want[i], got[i]) << "byte " << i << " of " << shape.format << " dim " << shape.head_dim << "/"
                               << shape.head_dim_v;
  }
}

TEST_F(StoreCuda, PagesEqualTheReference) {
  std::mt19937 rng(test_seed(41));
  auto pick = [&rng](std::initializer_list<int> from) { return *(from.begin() + rng() % from.size()); };
  for (const char* format : served_formats()) {
    for (const int dim : {16, 32, 48, 64, 80, 96, 112, 128, 144, 192, 208, 256, 320, 400, 512}) {
      for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
        const Shape shape = {format,
                             dtype,
                             dim,
                             pick({dim, dim, 64, 80, 128}),
                             pick({1, 2, 3, 8}),
                             pick({16, 48, 64}),
                             pick({1, 3, 17, 64}),
                             rng() % 3 == 0};
        ASSERT_NO_FATAL_FAILURE(check_store(shape, rng(), device)) << format << " " << dim;
      }
    }
  }
}

// A dequantize call with its tables on the GPU, for tests that spoil one of them.
struct Ranges {
  std::vector<int32_t> table, first, start, counts;  // counts may be empty: all rows
  int blocks;                                        // of a sequence

  void run(DequantParams p, DeviceState* device) const {
    DeviceBytes table_(table), first_(first), start_(start), counts_(counts);
    p.num_seqs = static_cast<int>(first.size());
    p.max_blocks_per_seq = blocks;
    p.block_table = table_.get<int32_t>();
    p.block_table_stride = blocks;
    p.first_tokens = first_.get<int32_t>();
    p.token_start_loc = start_.get<int32_t>();
    p.token_counts = counts.empty() ? nullptr : counts_.get<int32_t>();
    const KernelStatus status = cuda_kernels().dequant_kv(device, p);
    ASSERT_EQ(status.code, 0) << status.message;
    cuda_ok(cudaDeviceSynchronize());
  }
};

// Four sequences, one of them empty and two with rows that stay as they are.
TEST_F(StoreCuda, DequantEqualsTheReference) {
  std::mt19937 rng(test_seed(42));
  for (const char* format : served_formats()) {
    for (const int dim : {16, 64, 80, 112, 128, 144, 256, 512}) {
      for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
        Config c;
        c.format = find_format(format);
        c.dtype = Dtype::kF32;
        c.num_heads = c.num_kv_heads = 3;
        c.head_dim = c.head_dim_v = dim;
        c.block_size = 48;
        c.query_lens = {1, 1, 1, 1};
        c.seq_lens = {200, 64, 150, 90};
        Case test(c, rng());
        Ranges ranges;
        ranges.blocks = static_cast<int>(test.table.size() / 4);
        ranges.table = test.table;
        ranges.first = {13, 5, 0, 41};
        ranges.start = {0, 171, 171, 330, 380};
        ranges.counts = {171, 0, 140, 3};
        const int64_t rows = 385, elements = rows * 3 * dim;
        DeviceBytes pages(test.pages.data(), test.num_blocks * test.stride);
        for (const bool rotated : {false, true}) {
          std::vector<uint8_t> key(elements * dtype_bytes(dtype), 0x33), value(key);
          DeviceBytes key_out(key), value_out(value);
          DequantParams p = {};
          p.cache = test.cache();
          p.cache.data = pages.get<uint8_t>();
          p.dtype = dtype;
          p.keep_rotated = rotated;
          p.num_tokens = rows;
          p.key_out = key_out.get();
          p.value_out = value_out.get();
          ASSERT_NO_FATAL_FAILURE(ranges.run(p, device));
          key_out.download(key.data());
          value_out.download(value.data());
          std::vector<double> k(dim), v(dim);
          std::vector<bool> filled(rows, false);
          // One rounding to the dtype; values of the case are below 16.
          const double tolerance = dtype == Dtype::kF32 ? 1e-5 : dtype == Dtype::kF16 ? 4e-3 : 3.2e-2;
          for (int s = 0; s < 4; ++s) {
            for (int64_t t = 0; t < ranges.counts[s]; ++t) {
              const int64_t row = ranges.start[s] + t;
              const int at = static_cast<int>(ranges.first[s] + t);
              filled[row] = true;
              for (int h = 0; h < 3; ++h) {
                reference_load<double>(*c.format, test.layout, test.page(s, at), h, at % c.block_size, k.data(),
                                       v.data());
                if (!rotated && c.format->rotates_keys()) rotate(k.data(), dim);
                if (c.format->rotates_values()) rotate(v.data(), dim);
                for (int d = 0; d < dim; ++d) {
                  ASSERT_NEAR(to_float(dtype, key.data(), (row * 3 + h) * dim + d), k[d], tolerance)
                      << format << " " << dim << " " << s << " " << t << " " << h << " " << d;
                  ASSERT_NEAR(to_float(dtype, value.data(), (row * 3 + h) * dim + d), v[d], tolerance)
                      << format << " " << dim;
                }
              }
            }
          }
          const size_t row_bytes = size_t(3) * dim * dtype_bytes(dtype);
          for (size_t i = 0; i < key.size(); ++i) {
            const bool kept = key[i] == 0x33 && value[i] == 0x33;
            ASSERT_TRUE(kept || filled[i / row_bytes]) << "row " << i / row_bytes;
          }
        }
      }
    }
  }
}

// Tables in device memory cannot be checked before a launch: wrong ones may give wrong rows, and no wild access.
TEST_F(StoreCuda, DequantSurvivesWrongTables) {
  Config c;
  c.format = find_format("turboquant_4bit_nc");
  c.dtype = Dtype::kF32;
  c.num_heads = c.num_kv_heads = 2;
  c.head_dim = c.head_dim_v = 128;
  c.block_size = 16;
  c.query_lens = {1, 1};
  c.seq_lens = {64, 64};
  Case test(c, 46);
  DeviceBytes pages(test.pages.data(), test.num_blocks * test.stride);
  const int64_t rows = 40;
  DeviceBytes key_out(rows * 2 * 128 * 4), value_out(rows * 2 * 128 * 4);
  DequantParams p = {};
  p.cache = test.cache();
  p.cache.data = pages.get<uint8_t>();
  p.dtype = Dtype::kF32;
  p.num_tokens = rows;
  p.key_out = key_out.get();
  p.value_out = value_out.get();
  constexpr int32_t kLarge = std::numeric_limits<int32_t>::max(), kSmall = std::numeric_limits<int32_t>::min();
  Ranges right;
  right.blocks = static_cast<int>(test.table.size() / 2);
  right.table = test.table;
  right.first = {0, 3};
  right.start = {0, 20, 40};
  for (const std::vector<int32_t>& start :
       {std::vector{0, 20, kLarge}, std::vector{0, kLarge, 40}, std::vector{kSmall, kSmall, kLarge},
        std::vector{9, 8, 7}, std::vector{0, kSmall, 40}}) {
    Ranges wrong = right;
    wrong.start = start;
    ASSERT_NO_FATAL_FAILURE(wrong.run(p, device));
  }
  for (const int32_t x : {kLarge, kSmall, -1, 63, 64}) {
    Ranges wrong = right;
    wrong.first = {x, x};
    ASSERT_NO_FATAL_FAILURE(wrong.run(p, device));
    wrong = right;
    std::fill(wrong.table.begin(), wrong.table.end(), x);
    ASSERT_NO_FATAL_FAILURE(wrong.run(p, device));
    wrong = right;
    wrong.counts = {x, x};
    ASSERT_NO_FATAL_FAILURE(wrong.run(p, device));
  }
}

TEST_F(StoreCuda, RotatesAsTheReference) {
  std::mt19937 rng(test_seed(45));
  std::normal_distribution<float> normal;
  constexpr int kTokens = 37, kHeads = 5;
  for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
    for (const int dim : {16, 48, 64, 80, 96, 112, 128, 192, 208, 256, 512}) {
      for (const int gap : {0, 8, 3}) {  // rows that lie closely, apart on 16 bytes, and not on 16 bytes
        const int64_t count = int64_t{kTokens} * kHeads * (dim + gap);
        std::vector<uint8_t> x(count * dtype_bytes(dtype)), out(x.size(), 0x33);
        for (int64_t i = 0; i < count; ++i) from_float(dtype, x.data(), i, normal(rng));
        DeviceBytes device_x(x);
        for (const bool rotates : {true, false}) {
          DeviceBytes device_out(out);
          RotateParams p = {};
          p.dtype = dtype;
          p.rotates = rotates;
          p.num_heads = kHeads;
          p.head_dim = dim;
          p.num_tokens = kTokens;
          p.x = device_x.get();
          p.x_token_stride = p.out_token_stride = kHeads * (dim + gap);
          p.x_head_stride = p.out_head_stride = dim + gap;
          p.out = device_out.get();
          ASSERT_EQ(cuda_kernels().rotate(device, p).code, 0);
          cuda_ok(cudaDeviceSynchronize());
          std::vector<uint8_t> got(out.size());
          device_out.download(got.data());
          std::vector<double> want(dim);
          // One rounding of the output to the dtype (values are below 8), on top of nine of float.
          const double tolerance = dtype == Dtype::kF32 ? 4e-6 : dtype == Dtype::kF16 ? 2e-3 : 1.6e-2;
          for (int64_t r = 0; r < kTokens * kHeads; ++r) {
            const int64_t at = r * (dim + gap);
            for (int d = 0; d < dim; ++d) want[d] = to_float(dtype, x.data(), at + d);
            if (rotates) rotate(want.data(), dim);
            for (int d = 0; d < dim; ++d) {
              ASSERT_NEAR(to_float(dtype, got.data(), at + d), want[d], rotates ? tolerance : 0.0)
                  << "dim " << dim << " gap " << gap;
            }
            for (int d = dim; d < dim + gap; ++d) ASSERT_EQ(got[(at + d) * dtype_bytes(dtype)], 0x33);
          }
        }
      }
    }
  }
}

TEST_F(StoreCuda, CopiesPages) {
  const Format& format = *find_format("turboquant_4bit_nc");
  const PageLayout layout = make_page_layout(format, 128, 128, 3, 32);
  const int64_t stride = layout.page_bytes() + 16, blocks = 9;
  std::mt19937 rng(43);
  std::vector<uint8_t> pages(blocks * stride);
  for (uint8_t& b : pages) b = static_cast<uint8_t>(rng());
  const std::vector<int64_t> pairs = {0, 5, 3, 8, 1, 2};
  DeviceBytes device_pages(pages), device_pairs(pairs);
  CopyParams p = {};
  p.cache = make_paged_cache(format, layout, device_pages.get<uint8_t>(), blocks, stride);
  p.src_dst = device_pairs.get<int64_t>();
  p.num_pairs = 3;
  ASSERT_EQ(cuda_kernels().copy_pages(device, p).code, 0);
  cuda_ok(cudaDeviceSynchronize());
  for (size_t i = 0; i < pairs.size(); i += 2) {
    std::memcpy(&pages[pairs[i + 1] * stride], &pages[pairs[i] * stride], layout.page_bytes());
  }
  std::vector<uint8_t> got(pages.size());
  device_pages.download(got.data());
  EXPECT_EQ(pages, got);
}

// Blocks beyond 2^31 bytes, and beyond 32,768: offsets are 64 bits wide.
TEST_F(StoreCuda, FarBlocks) {
  const Format& format = *find_format("turboquant_4bit_nc");
  const PageLayout layout = make_page_layout(format, 128, 128, 8, 16);
  const int64_t stride = layout.page_bytes(), blocks = (int64_t{5} << 30) / stride;
  ASSERT_GT(blocks, 200000);
  DeviceBytes pages(blocks * stride);
  std::mt19937 rng(44);
  std::normal_distribution<float> normal;
  std::vector<float> kv(8 * 128);
  for (float& x : kv) x = normal(rng);
  const std::vector<int64_t> slot = {(blocks - 1) * 16 + 7};
  DeviceBytes device_kv(kv), device_slot(slot);
  StoreParams p = {};
  p.cache = make_paged_cache(format, layout, pages.get<uint8_t>(), blocks, stride);
  p.dtype = Dtype::kF32;
  p.num_tokens = 1;
  p.key = p.value = device_kv.get();
  p.key_token_stride = p.value_token_stride = 8 * 128;
  p.key_head_stride = p.value_head_stride = 128;
  p.slot_mapping = device_slot.get<int64_t>();
  ASSERT_EQ(cuda_kernels().store_kv(device, p).code, 0);
  std::vector<float> value(8 * 128, NAN);
  DeviceBytes value_out(value);
  DequantParams d = {};
  d.cache = p.cache;
  d.dtype = Dtype::kF32;
  d.num_tokens = 1;
  d.value_out = value_out.get();
  const Ranges ranges = {{static_cast<int32_t>(blocks - 1)}, {7}, {0, 1}, {}, 1};
  ASSERT_NO_FATAL_FAILURE(ranges.run(d, device));
  value_out.download(value.data());
  for (size_t i = 0; i < value.size(); ++i) EXPECT_NEAR(value[i], kv[i], 0.35f);
}

}  // namespace
}  // namespace tq::testing
