// attend_hip_test.cc - the portable attention kernel: every instance and every feature, small enough for a model of the
// device. Tolerances: codes are exact in fp16; weights and values are rounded to it, 2^-11 each, and queries, 2^-11 of
// their largest element, so that outputs are within about 2e-3 of a row's largest one, plus their own rounding (2^-11
// in fp16, 2^-8 in bfloat16).
#include "cuda_fixture.h"

namespace tq::testing {
namespace {

double hip_tolerance(Dtype dtype) { return dtype == Dtype::kBF16 ? 8e-3 : 4e-3; }

class AttendHip : public CudaTest {
 protected:
  void check(const Config& c, uint32_t seed) {
    CudaCase test(c, seed, device);
    ASSERT_NO_FATAL_FAILURE(test.run());
    ASSERT_NO_FATAL_FAILURE(test.fetch());
    const double error = test.host.worst_error();
    worst_ = std::max(worst_, error);
    EXPECT_LE(error, hip_tolerance(c.dtype)) << c.describe();
  }
  void TearDown() override {
    std::printf("largest error %.2e of a row's largest output\n", worst_);
    CudaTest::TearDown();
  }

 private:
  double worst_ = 0;
};

Config small_config(const char* format, int dim) {
  Config c;
  c.format = find_format(format);
  c.dtype = Dtype::kF16;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = c.head_dim_v = dim;
  c.block_size = 16;
  c.seq_lens = {70, 0, 1, 33};
  c.query_lens = {1, 0, 1, 5};
  return c;
}

// Decode, verify and the end of a prefill in one batch, for each format and head dimension that has its own instance,
// and for some that have none.
TEST_F(AttendHip, EveryInstance) {
  uint32_t seed = test_seed(61);
  for (const char* format : served_formats()) {
    for (const int dim : {64, 128, 256, 512, 16, 80, 112, 192}) {
      ASSERT_NO_FATAL_FAILURE(check(small_config(format, dim), ++seed));
    }
  }
}

TEST_F(AttendHip, EveryFeature) {
  uint32_t seed = test_seed(62);
  for (const char* format : served_formats()) {
    Config base = small_config(format, 64);
    base.seq_lens = {70, 41, 17};
    base.query_lens = {3, 1, 17};
    std::vector<Config> configs(10, base);
    configs[0].window = 20;
    configs[1].sinks = true;
    configs[2].soft_cap = 5.0f;
    configs[3].alibi = true;
    configs[4].causal = false;
    configs[5].max_spans = 2;
    configs[6].window = 1;
    configs[6].sinks = configs[6].alibi = true;
    configs[7].causal = false;
    configs[7].window = 9;
    configs[7].soft_cap = 30.0f;
    configs[8].head_dim_v = 128;
    configs[9].head_dim = 128;
    for (const Config& c : configs) ASSERT_NO_FATAL_FAILURE(check(c, ++seed));
  }
}

TEST_F(AttendHip, EveryGroupAndDtype) {
  uint32_t seed = test_seed(63);
  for (int group = 1; group <= 16; ++group) {
    Config c = small_config(served_formats()[group % served_formats().size()], 64);
    c.dtype = group % 3 == 0 ? Dtype::kF32 : group % 3 == 1 ? Dtype::kF16 : Dtype::kBF16;
    c.num_kv_heads = 1 + group % 2;
    c.num_heads = group * c.num_kv_heads;
    c.block_size = group % 2 == 0 ? 32 : 48;
    c.seq_lens = {40, 5};
    c.query_lens = {3, 2};
    ASSERT_NO_FATAL_FAILURE(check(c, ++seed));
  }
}

// More sequences than a wave has lanes, some of them empty.
TEST_F(AttendHip, ManySequences) {
  Config c = small_config("turboquant_4bit_nc", 64);
  c.seq_lens.clear(), c.query_lens.clear();
  for (int i = 0; i < 150; ++i) {
    c.seq_lens.push_back(i % 5 == 0 ? 0 : 1 + i % 23);
    c.query_lens.push_back(std::min(c.seq_lens.back(), i % 3 == 0 ? 2 : 1));
  }
  c.num_kv_heads = 1;
  ASSERT_NO_FATAL_FAILURE(check(c, test_seed(64)));
}

// Prefill: many tiles of columns, so that the context is not split.
TEST_F(AttendHip, ManyColumns) {
  Config c = small_config("turboquant_3bit_nc", 64);
  c.num_heads = 32;
  c.num_kv_heads = 2;
  c.seq_lens = {300};
  c.query_lens = {260};
  c.window = 50;
  ASSERT_NO_FATAL_FAILURE(check(c, test_seed(65)));
}

// Heads whose outputs several blocks share, and so many of them that a rotation over all parts takes several launches.
TEST_F(AttendHip, PartsOfManyColumns) {
  for (const char* format : {"tq_4", "turboquant_4bit_nc"}) {
    Config c = small_config(format, 512);
    c.num_heads = c.num_kv_heads = 64;
    c.seq_lens = {5, 17, 3, 1, 1, 2, 9, 4, 1};
    c.query_lens.assign(c.seq_lens.size(), 1);
    ASSERT_NO_FATAL_FAILURE(check(c, test_seed(67)));
  }
}

// One token far above the others, whose weights are many and small: below 2^-14 of the largest, where gfx90a's matrix
// unit takes fp16 for 0, they are still a tenth of the sum.
TEST_F(AttendHip, ManySmallWeights) {
  Config c = small_config("turboquant_k8v4", 64);
  c.num_heads = c.num_kv_heads = 1;
  c.seq_lens = {2000};
  c.query_lens = {1};
  c.query_scale = 1.0f;
  CudaCase test(c, test_seed(66), device);
  std::vector<float> key(64, 0.0f), value(64);
  std::normal_distribution<float> normal;
  for (int t = 0; t < 2000; ++t) {
    // q = (1, 0, ...), keys (x, 0, ...): scores of 0 and of 9.75, whose weights are as 5.8e-5 to 1.
    key[0] = t == 77 ? 80.0f : 2.0f;
    for (float& x : value) x = normal(test.host.rng) * (t == 77 ? 0.1f : 0.05f) + (t == 77 ? 0.0f : 4.0f);
    reference_store<float>(*c.format, test.host.layout, test.host.page(0, t), 0, t % c.block_size, key.data(),
                           value.data());
  }
  for (int d = 0; d < 64; ++d) from_float(c.dtype, test.host.query.data(), d, d == 0 ? 1.0f : 0.0f);
  DeviceBytes pages(test.host.pages.data(), static_cast<size_t>(test.host.num_blocks * test.host.stride));
  DeviceBytes query(test.host.query);
  AttendParams p = test.params();
  p.cache.data = pages.get<uint8_t>();
  p.query = query.get();
  ASSERT_EQ(cuda_kernels().attend(device, p).code, 0);
  test.fetch();
  EXPECT_LE(test.host.worst_error(), hip_tolerance(c.dtype));
}

TEST_F(AttendHip, RepeatsBitForBit) {
  Config c = small_config("turboquant_3bit_nc", 64);
  c.seq_lens = {200};
  c.query_lens = {2};
  CudaCase test(c, 8, device);
  test.run();
  test.fetch();
  const std::vector<uint8_t> once = test.host.out;
  for (int i = 0; i < 3; ++i) {
    test.poison();
    test.run();
    test.fetch();
    ASSERT_EQ(once, test.host.out);
  }
}

}  // namespace
}  // namespace tq::testing
