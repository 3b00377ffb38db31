// attend_cuda_test.cc - CUDA attention against attention in double over the decoded cache.
#include <future>

#include "cuda_fixture.h"

namespace tq::testing {
namespace {

// fp16 weights and queries of 15 bits, one rounding of the output (2^-11 or 2^-8 of it).
double cuda_tolerance(Dtype dtype) { return dtype == Dtype::kBF16 ? 8e-3 : 5e-3; }

template <class T>
T pick(std::mt19937& rng, std::initializer_list<T> from) {
  return *(from.begin() + std::uniform_int_distribution<size_t>(0, from.size() - 1)(rng));
}

const Format* random_format(std::mt19937& rng) {
  return find_format(served_formats()[rng() % served_formats().size()]);
}

Config random_config(std::mt19937& rng) {
  Config c;
  c.format = random_format(rng);
  c.dtype = pick(rng, {Dtype::kF16, Dtype::kF16, Dtype::kBF16, Dtype::kF32});
  c.head_dim = pick(rng, {64, 64, 80, 96, 112, 128, 128, 128, 192, 256, 256, 512, 16, 48});
  c.head_dim_v = pick(rng, {0, 0, 0, 0, 0, 64, 80, 128});
  if (c.head_dim_v == 0) c.head_dim_v = c.head_dim;
  c.num_kv_heads = pick(rng, {1, 2, 3});
  c.num_heads = c.num_kv_heads * pick(rng, {1, 2, 3, 4, 5, 6, 7, 8, 16});
  c.block_size = pick(rng, {16, 32, 48, 64, 128});
  c.causal = pick(rng, {true, true, true, false});
  c.window = pick(rng, {0, 0, 1, 7, 64, 100});
  c.soft_cap = pick(rng, {0.0f, 0.0f, 5.0f, 30.0f});
  c.sinks = pick(rng, {false, false, true});
  c.alibi = pick(rng, {false, false, true});
  c.max_spans = pick(rng, {0, 0, 0, 1, 3});
  const int num_seqs = pick(rng, {1, 1, 2, 3, 4, 40});
  for (int i = 0; i < num_seqs; ++i) {
    const int n =
        num_seqs == 40 ? pick(rng, {0, 1, 17, 40}) : pick(rng, {0, 1, 15, 16, 17, 63, 65, 130, 200, 513, 1500});
    c.seq_lens.push_back(n);
    c.query_lens.push_back(std::min(n, pick(rng, {0, 1, 1, 1, 1, 2, 4, 9, 16, 17, 40, 200})));
  }
  return c;
}

class AttendCuda : public CudaTest {};

TEST_F(AttendCuda, RandomGrid) {
  std::mt19937 rng(test_seed(20261124));
  const char* given = std::getenv("TQ_TEST_CONFIGS");
  const int count = given != nullptr ? std::atoi(given) : 2000;
  double worst[4] = {};
  std::vector<std::future<double>> pending;
  std::vector<std::unique_ptr<CudaCase>> cases;
  auto drain = [&] {
    for (size_t i = 0; i < pending.size(); ++i) {
      const Config& c = cases[i]->host.c;
      const double error = pending[i].get();
      double& w = worst[static_cast<int>(c.dtype)];
      w = std::max(w, error);
      EXPECT_LE(error, cuda_tolerance(c.dtype)) << c.describe();
    }
    pending.clear();
    cases.clear();
  };
  for (int i = 0; i < count && !::testing::Test::HasFatalFailure(); ++i) {
    const Config config = random_config(rng);
    cases.push_back(std::make_unique<CudaCase>(config, rng(), device));
    CudaCase* test = cases.back().get();
    ASSERT_NO_FATAL_FAILURE(test->run()) << config.describe();
    ASSERT_NO_FATAL_FAILURE(test->fetch()) << config.describe();
    pending.push_back(std::async(std::launch::async, [test] { return test->host.worst_error(); }));
    if (pending.size() == 32) drain();
  }
  drain();
  std::printf("largest errors: float32 %.2e, float16 %.2e, bfloat16 %.2e (of the row's largest output)\n", worst[1],
              worst[2], worst[3]);
}

Config simple_config(const char* format, int query_len, std::vector<int> seq_lens) {
  Config c;
  c.format = find_format(format);
  c.dtype = Dtype::kF16;
  c.num_heads = 8;
  c.num_kv_heads = 2;
  c.head_dim = c.head_dim_v = 128;
  c.block_size = 16;
  c.seq_lens = std::move(seq_lens);
  c.query_lens.assign(c.seq_lens.size(), query_len);
  return c;
}

// Many tiles per warp, weights nearly alike and values around zero, so that outputs are small: what the matrix unit
// rounds off in its accumulators must not add up.
TEST_F(AttendCuda, LongContext) {
  for (const char* format : served_formats()) {
    Config c = simple_config(format, 1, {40000, 40000, 40000, 40000, 40000, 40000, 40000, 40000});
    c.num_kv_heads = 1;
    c.num_heads = 4;
    c.block_size = 64;
    c.query_scale = 1.0f;
    c.value_mean = 0.0f;
    CudaCase test(c, 3, device);
    const double error = test.run_and_compare();
    std::printf("%s: %.2e\n", format, error);
    EXPECT_LE(error, 5e-3) << format;
  }
}

TEST_F(AttendCuda, GraphReplayWithOtherLengths) {
  Config c = simple_config("turboquant_4bit_nc", 2, {700, 700, 700});
  CudaCase test(c, 5, device);
  cudaStream_t stream;
  cuda_ok(cudaStreamCreate(&stream));
  test.run(stream);  // outside of the capture first: kernels are loaded
  cuda_ok(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  test.run(stream);
  cuda_ok(cudaStreamEndCapture(stream, &graph));
  cuda_ok(cudaGraphInstantiate(&exec, graph, 0));
  const std::vector<std::pair<std::vector<int>, std::vector<int>>> lengths = {
      {{2, 2, 2}, {700, 700, 700}}, {{1, 2, 1}, {3, 511, 64}}, {{0, 1, 2}, {0, 1, 2}}, {{2, 0, 0}, {699, 0, 0}}};
  for (const auto& [query_lens, seq_lens] : lengths) {
    test.set_lengths(query_lens, seq_lens);
    test.poison();
    cuda_ok(cudaGraphLaunch(exec, stream));
    test.fetch();
    EXPECT_LE(test.host.worst_error(), 5e-3) << test.host.c.describe();
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(AttendCuda, TwoStreamsAtOnce) {
  Config c = simple_config("turboquant_4bit_nc", 1, {3000, 2000, 1000});
  CudaCase first(c, 6, device), second(c, 7, device);
  cudaStream_t streams[2];
  for (auto& s : streams) cuda_ok(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  for (int i = 0; i < 200; ++i) {
    first.run(streams[0]);
    second.run(streams[1]);
  }
  first.fetch();
  second.fetch();
  EXPECT_LE(first.host.worst_error(), 5e-3);
  EXPECT_LE(second.host.worst_error(), 5e-3);
  for (auto& s : streams) cudaStreamDestroy(s);
}

TEST_F(AttendCuda, RepeatsBitForBit) {
  Config c = simple_config("turboquant_3bit_nc", 3, {5000, 100});
  CudaCase test(c, 8, device);
  test.run();
  test.fetch();
  const std::vector<uint8_t> once = test.host.out;
  for (int i = 0; i < 20; ++i) {
    test.poison();
    test.run();
    test.fetch();
    ASSERT_EQ(once, test.host.out);
  }
}

// Scores of +-1e4 and beyond: the softmax is one-hot or nearly so, and nothing overflows.
TEST_F(AttendCuda, ExtremeScores) {
  for (const char* format : served_formats()) {
    for (const int query_len : {1, 40}) {
      Config c = simple_config(format, query_len, {300});
      CudaCase test(c, 9, device);
      AttendParams p = test.params();
      for (const float scale : {1e3f, -1e3f, 1e-6f}) {
        p.scale = scale;
        test.poison();
        const KernelStatus status = cuda_kernels().attend(device, p);
        ASSERT_EQ(status.code, 0) << status.message;
        test.fetch();
        for (size_t i = 0; i < test.host.out.size() / 2; ++i) {
          const float x = to_float(c.dtype, test.host.out.data(), static_cast<int64_t>(i));
          ASSERT_TRUE(std::fabs(x) < 100.0f) << format << " scale " << scale << " element " << i << " is " << x;
        }
      }
    }
  }
}

// A sink of +inf takes all weight, and its LSE is the largest finite float; one of -inf takes none. Decode, prefill.
TEST_F(AttendCuda, ExtremeSinks) {
  for (const int query_len : {1, 40}) {
    Config c = simple_config("turboquant_4bit_nc", query_len, {300, 41});
    c.sinks = c.extreme_sinks = true;
    CudaCase test(c, 12, device);
    EXPECT_LE(test.run_and_compare(), cuda_tolerance(c.dtype)) << query_len;
    EXPECT_EQ(test.host.lse[0], std::numeric_limits<float>::max()) << query_len;
  }
}

TEST_F(AttendCuda, BadQueryStaysInItsRow) {
  for (const int query_len : {2, 30}) {
    Config c = simple_config("turboquant_4bit_nc", query_len, {100});
    CudaCase good(c, 10, device), bad(c, 10, device);
    good.run();
    good.fetch();
    const int row = 1 * c.num_heads + 3;
    bad.host.query[(row * c.head_dim + 5) * 2] = 0x00;
    bad.host.query[(row * c.head_dim + 5) * 2 + 1] = 0x7e;  // fp16 NaN
    AttendParams p = bad.params();
    DeviceBytes query(bad.host.query);
    p.query = query.get();
    ASSERT_EQ(cuda_kernels().attend(device, p).code, 0);
    bad.fetch();
    for (int r = 0; r < query_len * c.num_heads; ++r) {
      for (int d = 0; d < c.head_dim; ++d) {
        const int64_t i = int64_t{r} * c.head_dim + d;
        const float x = to_float(c.dtype, bad.host.out.data(), i);
        if (r == row) {
          ASSERT_TRUE(std::isnan(x));
        } else {
          ASSERT_EQ(x, to_float(c.dtype, good.host.out.data(), i)) << r << " " << d;
        }
      }
    }
  }
}

TEST_F(AttendCuda, TestFormatIsRefused) {
  const Format& format = *find_format("raw_f32");
  const KernelStatus status = cuda_kernels().supports(device, format, make_page_layout(format, 128, 128, 8, 16));
  EXPECT_EQ(status.code, 12);
  EXPECT_NE(std::string(status.message).find("raw_f32"), std::string::npos);
}

TEST_F(AttendCuda, WorkspaceTooSmallIsRefused) {
  CudaCase test(simple_config("turboquant_4bit_nc", 1, {20}), 11, device);
  AttendParams p = test.params();
  p.workspace_bytes -= 1;
  const KernelStatus status = cuda_kernels().attend(device, p);
  EXPECT_EQ(status.code, 3);
  EXPECT_EQ(status.message, "workspace_bytes is " + std::to_string(p.workspace_bytes) + "; this call needs at least " +
                                std::to_string(p.workspace_bytes + 1) + " (see workspace_size)");
}

// What supports says of a layer, attend says by itself.
TEST_F(AttendCuda, TestFormatIsRefusedByACall) {
  CudaCase test(simple_config("turboquant_4bit_nc", 1, {20}), 12, device);
  AttendParams p = test.params();
  p.cache.format = *find_format("raw_f32");
  p.cache.layout = make_page_layout(p.cache.format, 128, 128, 2, 16);
  const KernelStatus refused = cuda_kernels().supports(device, p.cache.format, p.cache.layout);
  const KernelStatus status = cuda_kernels().attend(device, p);
  EXPECT_EQ(status.code, 12);
  EXPECT_STREQ(status.message, refused.message);
}

TEST_F(AttendCuda, WorkspaceIsBounded) {
  for (const char* name : served_formats()) {
    const Format& format = *find_format(name);
    for (const int dim : {16, 64, 80, 128, 256, 512}) {
      const PageLayout layout = make_page_layout(format, dim, dim, 8, 16);
      ASSERT_EQ(cuda_kernels().supports(device, format, layout).code, 0);
      EXPECT_LE(cuda_kernels().workspace_size(device, layout, 128), uint64_t{256} << 20);
    }
  }
}

}  // namespace
}  // namespace tq::testing
