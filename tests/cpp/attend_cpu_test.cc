// attend_cpu_test.cc - CPU attention against attention in double over the decoded cache, at every instruction set.
#include <hwy/highway.h>

#include <atomic>
#include <set>
#include <thread>

#include "cpu_fixture.h"

namespace tq::testing {
namespace {

template <class T>
T pick(std::mt19937& rng, std::initializer_list<T> from) {
  return *(from.begin() + std::uniform_int_distribution<size_t>(0, from.size() - 1)(rng));
}

Config random_config(std::mt19937& rng) {
  Config c;
  const auto formats = all_formats();
  c.format = &formats[std::uniform_int_distribution<size_t>(0, formats.size() - 1)(rng)];
  c.dtype = pick(rng, {Dtype::kF32, Dtype::kF32, Dtype::kF16, Dtype::kBF16});
  c.head_dim = pick(rng, {16, 48, 64, 80, 96, 112, 128, 128, 192, 256, 512});
  c.head_dim_v = pick(rng, {0, 0, 0, 64, 80, 128});
  if (c.head_dim_v == 0) c.head_dim_v = c.head_dim;
  c.num_kv_heads = pick(rng, {1, 2, 3});
  c.num_heads = c.num_kv_heads * pick(rng, {1, 2, 3, 4, 5, 7, 8, 16});
  c.block_size = pick(rng, {16, 32, 48, 64, 128});
  c.causal = pick(rng, {true, true, true, false});
  c.window = pick(rng, {0, 0, 1, 7, 64, 100});
  c.soft_cap = pick(rng, {0.0f, 0.0f, 5.0f, 30.0f});
  c.sinks = pick(rng, {false, false, true});
  c.alibi = pick(rng, {false, false, true});
  c.max_spans = pick(rng, {0, 0, 0, 1, 3});
  const int num_seqs = std::uniform_int_distribution<int>(1, 4)(rng);
  for (int i = 0; i < num_seqs; ++i) {
    const int n = pick(rng, {0, 1, 15, 16, 17, 63, 64, 65, 130, 200});
    c.seq_lens.push_back(n);
    c.query_lens.push_back(std::min(n, pick(rng, {0, 1, 1, 1, 2, 4, 9, 40, 200})));
  }
  return c;
}

// Under a sanitizer a case takes an order of magnitude longer, and what it looks for shows in fewer.
#ifdef TQ_SANITIZED
constexpr int kShare = 8;
#else
constexpr int kShare = 1;
#endif

void run_grid(int count, uint32_t seed) {
  std::mt19937 rng(seed);
  CpuDevice device;
  for (int i = 0; i < count / kShare; ++i) {
    const Config config = random_config(rng);
    const uint32_t case_seed = rng();
    Case test(config, case_seed);
    const double error = run_and_compare(test, device.get());
    ASSERT_LE(error, tolerance(config.dtype)) << "config " << i << ": " << config.describe();
  }
}

TEST(AttendCpu, RandomGrid) { run_grid(400, test_seed(20261123)); }

// Every instruction set that this machine can run, not only the best.
TEST(AttendCpu, RandomGridAtEveryTarget) {
  const uint32_t seed = test_seed(7);
  const int64_t all = hwy::SupportedTargets();
  std::set<std::string> names;
  for (int bit = 0; bit < 62; ++bit) {
    const int64_t target = int64_t{1} << bit;
    if ((all & target) == 0) continue;
    hwy::SetSupportedTargetsForTest(target);
    CpuDevice device;
    const std::string name = cpu_kernels().device_name(device.get());
    if (!names.insert(name).second) continue;  // not compiled into the library, which took its baseline
    std::printf("target %s\n", name.c_str());
    run_grid(80, seed);
  }
  hwy::SetSupportedTargetsForTest(0);
  EXPECT_GE(names.size(), 1u);
}

#if defined(__x86_64__)
TEST(AttendCpu, AProcessorWithoutSse4IsTurnedAway) {
  EXPECT_EQ(cpu_kernels().probe().code, 0);
  hwy::SetSupportedTargetsForTest(HWY_SCALAR);
  const KernelStatus status = cpu_kernels().probe();
  hwy::SetSupportedTargetsForTest(0);
  EXPECT_EQ(status.code, 14);
  EXPECT_NE(std::string(status.message).find("SSE4.2"), std::string::npos);
}
#endif

Config simple_config(const char* format, int query_len, int seq_len) {
  Config c;
  c.format = find_format(format);
  c.dtype = Dtype::kF32;
  c.num_heads = 8;
  c.num_kv_heads = 2;
  c.head_dim = c.head_dim_v = 128;
  c.block_size = 64;
  c.query_lens = {query_len};
  c.seq_lens = {seq_len};
  return c;
}

// Long enough that tiles are split over threads and merged.
TEST(AttendCpu, SplitKv) {
  for (const Format& format : all_formats()) {
    Config c = simple_config(format.name, 1, 3001);
    c.sinks = true;
    CpuDevice device;
    EXPECT_LE(run_and_compare(Case(c, 1), device.get()), tolerance(c.dtype)) << format.name;
    c.window = 1500;
    c.query_lens = {5};
    EXPECT_LE(run_and_compare(Case(c, 2), device.get()), tolerance(c.dtype)) << format.name;
  }
}

// More threads than this machine has, from the caller, with tasks in reverse order.
TEST(AttendCpu, CallersThreads) {
  std::atomic<int> calls{0};
  ParallelFor pool = {16, &calls, [](void* context, int64_t n, void (*task)(void*, int64_t), void* arg) {
                        ++*static_cast<std::atomic<int>*>(context);
                        std::vector<std::thread> threads;
                        for (int64_t i = n - 1; i >= 0; --i) threads.emplace_back([=] { task(arg, i); });
                        for (std::thread& t : threads) t.join();
                      }};
  CpuDevice device(&pool);
  EXPECT_LE(run_and_compare(Case(simple_config("turboquant_4bit_nc", 3, 3001), 3), device.get()), 1e-3);
  EXPECT_GE(calls.load(), 2);
}

TEST(AttendCpu, TwoThreadsShareOneBackend) {
  CpuDevice device;
  std::vector<std::thread> threads;
  std::atomic<int> bad{0};
  for (uint32_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (uint32_t j = 0; j < 5; ++j) {
        Case test(simple_config("turboquant_3bit_nc", 4, 700), 10 * i + j);
        if (!(run_and_compare(test, device.get()) <= 1e-3)) ++bad;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(bad.load(), 0);
}

// A chunked prefill gives what one prefill gives: in compressed mode chunk boundaries do not exist.
TEST(AttendCpu, ChunkBoundariesDoNotMatter) {
  for (const Format& format : all_formats()) {
    CpuDevice device;
    Case whole(simple_config(format.name, 200, 200), 5);
    EXPECT_LE(run_and_compare(whole, device.get()), 1e-3);
    Case tail(simple_config(format.name, 30, 200), 5);
    const size_t row = 8 * 128 * sizeof(float);
    // Same pages, and the last 30 queries of the whole.
    std::memcpy(tail.pages.data(), whole.pages.data(), size_t(whole.num_blocks * whole.stride));
    tail.table = whole.table;
    std::memcpy(tail.query.data(), whole.query.data() + 170 * row, 30 * row);
    EXPECT_LE(run_and_compare(tail, device.get()), 1e-3);
    const float* a = reinterpret_cast<const float*>(whole.out.data() + 170 * row);
    const float* b = reinterpret_cast<const float*>(tail.out.data());
    for (int i = 0; i < 30 * 8 * 128; ++i) ASSERT_NEAR(a[i], b[i], 2e-4) << format.name;
  }
}

TEST(AttendCpu, ExtremeScores) {
  for (const float scale : {1e-6f, 300.0f, 1e4f}) {
    Config c = simple_config("turboquant_4bit_nc", 4, 300);
    Case test(c, 9);
    float* q = reinterpret_cast<float*>(test.query.data());
    for (size_t i = 0; i < test.query.size() / 4; ++i) q[i] *= scale;
    CpuDevice device;
    // At 1e4 a score is near 1e5 and the softmax a hard maximum: 15-bit queries resolve scores to 1e5 * 2^-15 there.
    const double error = run_and_compare(test, device.get());
    if (scale < 1e4f) {
      EXPECT_LE(error, scale > 1 ? 0.2 : 1e-3);
    } else {
      EXPECT_TRUE(std::isfinite(error));
    }
  }
}

// A sink of +inf takes all weight: the row is zeros and its LSE the largest finite float. One of -inf takes none.
TEST(AttendCpu, ExtremeSinks) {
  for (const Format& format : all_formats()) {
    Config c = simple_config(format.name, 3, 3001);
    c.sinks = c.extreme_sinks = true;
    c.query_lens.push_back(2);
    c.seq_lens.push_back(40);
    CpuDevice device;
    Case test(c, 13);
    EXPECT_LE(run_and_compare(test, device.get()), 1e-3) << format.name;
    EXPECT_EQ(test.lse[0], std::numeric_limits<float>::max());
  }
}

// Queries with NaN or infinity spoil their own row at most.
TEST(AttendCpu, BadQueryStaysInItsRow) {
  for (const Format& format : all_formats()) {
    Case good(simple_config(format.name, 4, 100), 11);
    Case bad(simple_config(format.name, 4, 100), 11);
    float* q = reinterpret_cast<float*>(bad.query.data());
    q[1 * 8 * 128 + 3 * 128 + 5] = NAN;
    q[2 * 8 * 128 + 6 * 128 + 7] = -INFINITY;
    CpuDevice device;
    run_and_compare(good, device.get());
    const uint64_t bytes = cpu_kernels().workspace_size(device.get(), bad.layout, 8);
    AlignedBytes workspace(bytes);
    ASSERT_EQ(cpu_kernels().attend(device.get(), bad.params(workspace.data(), bytes)).code, 0);
    const float* a = reinterpret_cast<const float*>(good.out.data());
    const float* b = reinterpret_cast<const float*>(bad.out.data());
    for (int i = 0; i < 4 * 8 * 128; ++i) {
      const int token = i / 1024, head = i / 128 % 8;
      if ((token == 1 && head == 3) || (token == 2 && head == 6)) continue;
      ASSERT_EQ(a[i], b[i]) << format.name << " token " << token << " head " << head;
    }
  }
}

TEST(AttendCpu, CountersCountWhatWasRead) {
  CpuDevice device;
  Config c = simple_config("turboquant_k8v4", 10, 50);
  c.window = 8;
  run_and_compare(Case(c, 1), device.get());
  c.window = 0;
  run_and_compare(Case(c, 1), device.get());
  const KernelCounters counters = device.counters();
  EXPECT_EQ(counters.attend_calls, 2u);
  EXPECT_EQ(counters.query_tokens, 20u);
  EXPECT_EQ(counters.compressed_kv_reads, 10u * 8 + (41u + 50u) * 10 / 2);
}

}  // namespace
}  // namespace tq::testing
