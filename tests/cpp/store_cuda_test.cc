// store_cuda_test.cc - CUDA store, dequantize and page copy against the reference codec.
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
};

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
  p.cache = {format,
             layout,
             format.rotates_keys() ? &format_codebook(format.key_bits) : nullptr,
             device_pages.get<uint8_t>(),
             num_blocks,
             stride};
  p.dtype = shape.dtype;
  p.num_tokens = shape.tokens;
  p.key = device_key.get();
  p.key_token_stride = int64_t{shape.kv_heads} * shape.head_dim;
  p.key_head_stride = shape.head_dim;
  p.value = device_value.get();
  p.value_token_stride = int64_t{shape.kv_heads} * shape.head_dim_v;
  p.value_head_stride = shape.head_dim_v;
  p.slot_mapping = device_slots.get<int64_t>();
  const KernelStatus status = cuda_kernels().store_kv(device, p);
  ASSERT_EQ(status.code, 0) << status.message;
  cuda_ok(cudaDeviceSynchronize());
  std::vector<uint8_t> got(num_blocks * stride);
  device_pages.download(got.data());

  // What nothing was stored to is as it was.
  std::vector<uint8_t> want(pages.data(), pages.data() + num_blocks * stride);
  int64_t codes = 0, ties = 0;
  std::vector<float> k(shape.head_dim), v(shape.head_dim_v);
  for (int t = 0; t < shape.tokens; ++t) {
    if (slots[t] < 0) continue;
    const int64_t page = slots[t] / shape.block_size * stride;
    const int offset = static_cast<int>(slots[t] % shape.block_size), row = offset % kAtomTokens;
    for (int h = 0; h < shape.kv_heads; ++h) {
      for (int d = 0; d < shape.head_dim; ++d) {
        k[d] = to_float(shape.dtype, key.data(), (int64_t{t} * shape.kv_heads + h) * shape.head_dim + d);
      }
      for (int d = 0; d < shape.head_dim_v; ++d) {
        v[d] = to_float(shape.dtype, value.data(), (int64_t{t} * shape.kv_heads + h) * shape.head_dim_v + d);
      }
      reference_store<float>(format, layout, &want[page], h, offset, k.data(), v.data());
      uint8_t* a = &want[page + layout.atom_offset(h, offset)];
      const uint8_t* b = &got[page + layout.atom_offset(h, offset)];
      if (!format.rotates_keys()) continue;
      // Codes that differ must be ties; then the pages are made equal, norm included, for the whole comparison.
      std::vector<double> y(k.begin(), k.end());
      double n = 0;
      for (double& x : y) x = std::isnan(x) ? 0 : std::clamp(x, -1e15, 1e15);
      for (const double x : y) n += x * x;
      rotate(y.data(), shape.head_dim);
      const Codebook& book = format_codebook(format.key_bits);
      bool tied = false;
      for (int d = 0; d < shape.head_dim; ++d) {
        ++codes;
        const int x = unpack_code(a + layout.key_row_offset(row), format.key_bits, shape.head_dim, d);
        const int z = unpack_code(b + layout.key_row_offset(row), format.key_bits, shape.head_dim, d);
        if (x == z) continue;
        const double at = y[d] * std::sqrt(double(shape.head_dim)) / (std::sqrt(n) + 1e-8);
        ASSERT_EQ(std::abs(x - z), 1) << "token " << t << " head " << h << " dim " << d;
        ASSERT_NEAR(at, book.midpoints[std::min(x, z)], kTie * std::max(1.0, std::fabs(at)));
        ++ties;
        tied = true;
      }
      uint16_t norm_a, norm_b;
      std::memcpy(&norm_a, a + layout.key_norm_offset(row), 2);
      std::memcpy(&norm_b, b + layout.key_norm_offset(row), 2);
      if (!tied) {
        ASSERT_LE(std::abs(int{norm_a} - int{norm_b}), 1) << "token " << t << " head " << h;
      }
      std::memcpy(a + layout.key_norm_offset(row), &norm_b, 2);
      if (tied) std::memcpy(a + layout.key_row_offset(row), b + layout.key_row_offset(row), layout.key_row_bytes());
    }
  }
  EXPECT_LE(ties, 1 + codes / 10000);
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(want[i], got[i]) << "byte " << i << " of " << shape.format << " dim " << shape.head_dim << "/"
                               << shape.head_dim_v;
  }
}

TEST_F(StoreCuda, PagesEqualTheReference) {
  std::mt19937 rng(test_seed(41));
  auto pick = [&rng](std::initializer_list<int> from) { return *(from.begin() + rng() % from.size()); };
  for (const char* format : {"turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"}) {
    for (const int dim : {16, 32, 48, 64, 80, 96, 112, 128, 144, 192, 208, 256, 320, 400, 512}) {
      for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
        const Shape shape = {format,
                             dtype,
                             dim,
                             pick({dim, dim, 64, 80, 128}),
                             pick({1, 2, 3, 8}),
                             pick({16, 48, 64}),
                             pick({1, 3, 17, 64})};
        ASSERT_NO_FATAL_FAILURE(check_store(shape, rng(), device)) << format << " " << dim;
      }
    }
  }
}

TEST_F(StoreCuda, DequantEqualsTheReference) {
  std::mt19937 rng(test_seed(42));
  for (const char* format : {"turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"}) {
    for (const int dim : {16, 64, 80, 112, 128, 256, 512}) {
      Config c;
      c.format = find_format(format);
      c.dtype = Dtype::kF32;
      c.num_heads = c.num_kv_heads = 3;
      c.head_dim = c.head_dim_v = dim;
      c.block_size = 48;
      c.query_lens = {1};
      c.seq_lens = {200};
      Case test(c, rng());
      DeviceBytes pages(test.pages.data(), test.num_blocks * test.stride), table(test.table);
      const int64_t first = 13, count = 171, elements = count * 3 * dim;
      for (const bool rotated : {false, true}) {
        std::vector<float> key(elements, NAN), value(elements, NAN);
        DeviceBytes key_out(key), value_out(value);
        DequantParams p = {};
        p.cache = test.cache();
        p.cache.data = pages.get<uint8_t>();
        p.dtype = Dtype::kF32;
        p.keep_rotated = rotated;
        p.block_table = table.get<int32_t>();
        p.first_token = first;
        p.num_tokens = count;
        p.key_out = key_out.get();
        p.value_out = value_out.get();
        ASSERT_EQ(cuda_kernels().dequant_kv(device, p).code, 0);
        cuda_ok(cudaDeviceSynchronize());
        key_out.download(key.data());
        value_out.download(value.data());
        std::vector<double> k(dim), v(dim);
        for (int64_t t = 0; t < count; ++t) {
          for (int h = 0; h < 3; ++h) {
            const int at = static_cast<int>(first + t);
            reference_load<double>(*c.format, test.layout, test.page(0, at), h, at % c.block_size, k.data(), v.data());
            if (!rotated && c.format->rotates_keys()) rotate(k.data(), dim);
            for (int d = 0; d < dim; ++d) {
              ASSERT_NEAR(key[(t * 3 + h) * dim + d], k[d], 1e-5)
                  << format << " " << dim << " " << t << " " << h << " " << d;
              ASSERT_NEAR(value[(t * 3 + h) * dim + d], v[d], 1e-5) << format << " " << dim;
            }
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
  p.cache = {format, layout, &format_codebook(4), device_pages.get<uint8_t>(), blocks, stride};
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
  p.cache = {format, layout, &format_codebook(4), pages.get<uint8_t>(), blocks, stride};
  p.dtype = Dtype::kF32;
  p.num_tokens = 1;
  p.key = p.value = device_kv.get();
  p.key_token_stride = p.value_token_stride = 8 * 128;
  p.key_head_stride = p.value_head_stride = 128;
  p.slot_mapping = device_slot.get<int64_t>();
  ASSERT_EQ(cuda_kernels().store_kv(device, p).code, 0);
  std::vector<int32_t> table = {static_cast<int32_t>(blocks - 1)};
  DeviceBytes device_table(table);
  std::vector<float> value(8 * 128, NAN);
  DeviceBytes value_out(value);
  DequantParams d = {};
  d.cache = p.cache;
  d.dtype = Dtype::kF32;
  d.block_table = device_table.get<int32_t>();
  d.first_token = 7;
  d.num_tokens = 1;
  d.value_out = value_out.get();
  ASSERT_EQ(cuda_kernels().dequant_kv(device, d).code, 0);
  cuda_ok(cudaDeviceSynchronize());
  value_out.download(value.data());
  for (size_t i = 0; i < value.size(); ++i) EXPECT_NEAR(value[i], kv[i], 0.35f);
}

}  // namespace
}  // namespace tq::testing
