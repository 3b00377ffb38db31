// workspace_cuda_test.cc - what a CUDA workspace keeps from one attend call to the next: the counters at its start,
// which every launch finds and leaves at zero.
#include "cuda_fixture.h"

namespace tq::testing {
namespace {

class WorkspaceCuda : public CudaTest {};

Config long_config(const char* format, int dim, int query_len, std::vector<int> seq_lens) {
  Config c;
  c.format = find_format(format);
  c.dtype = Dtype::kF16;
  c.num_heads = 8;
  c.num_kv_heads = 2;
  c.head_dim = c.head_dim_v = dim;
  c.block_size = 16;
  c.seq_lens = std::move(seq_lens);
  c.query_lens.assign(c.seq_lens.size(), query_len);
  return c;
}

bool all_zero(const std::vector<uint8_t>& bytes, size_t count) {
  return std::all_of(bytes.begin(), bytes.begin() + static_cast<int64_t>(count), [](uint8_t b) { return b == 0; });
}

// Kernels of all sizes and presets one after the other, decode and prefill, and only the counters keep their zeros.
TEST_F(WorkspaceCuda, OneForAllLayers) {
  std::vector<std::unique_ptr<CudaCase>> cases;
  uint64_t bytes = 0;
  for (const char* format : served_formats()) {
    for (const int dim : {64, 80, 128, 256, 512}) {
      for (const int query_len : {1, 4, 40}) {
        cases.push_back(std::make_unique<CudaCase>(long_config(format, dim, query_len, {1000, 90}), 21 + dim, device));
        bytes = std::max(bytes, cases.back()->workspace_bytes());
      }
    }
  }
  const std::vector<uint8_t> fresh = CudaCase::fresh_workspace(bytes);
  DeviceBytes workspace(fresh);
  int merged = 0;  // cases in which CTAs had something to merge
  for (const auto& test : cases) {
    cuda_ok(cudaMemset(workspace.get<uint8_t>() + cuda::kCounterBytes, 0xff, bytes - cuda::kCounterBytes));
    test->poison();
    ASSERT_NO_FATAL_FAILURE(test->run(nullptr, workspace.get()));
    test->fetch();
    EXPECT_LE(test->host.worst_error(), 5e-3) << test->host.c.describe();
    std::vector<uint8_t> after(bytes);
    workspace.download(after.data());
    ASSERT_TRUE(all_zero(after, cuda::kCounterBytes)) << test->host.c.describe();
    if (after != fresh) ++merged;
  }
  EXPECT_GE(merged, static_cast<int>(cases.size()) / 2);
}

// 257 workspaces, and two streams that use the first and the last at once. Few CTAs have work in such a launch, so that
// those of both streams run side by side.
TEST_F(WorkspaceCuda, ManyWorkspacesOnTwoStreams) {
  constexpr int kWorkspaces = 257, kRounds = 40, kLaunches = 10;
  const Config c = long_config("turboquant_4bit_nc", 64, 1, {3000});
  CudaCase first(c, 31, device), second(c, 32, device);
  const uint64_t stride = (first.workspace_bytes() + 255) / 256 * 256;
  size_t available = 0, total = 0;
  cuda_ok(cudaMemGetInfo(&available, &total));
  if (available < stride * (kWorkspaces + 10)) {
    GTEST_SKIP() << "the GPU has " << available << " bytes to give; the test needs " << stride * (kWorkspaces + 10);
  }
  DeviceBytes workspaces(stride * kWorkspaces);
  cuda_ok(cudaMemset(workspaces.get(), 0, stride * kWorkspaces));
  auto workspace = [&](int i) { return workspaces.get<uint8_t>() + stride * static_cast<uint64_t>(i); };

  ASSERT_LE(first.run_and_compare(), 5e-3);
  ASSERT_LE(second.run_and_compare(), 5e-3);
  const std::vector<uint8_t> want[2] = {first.host.out, second.host.out};
  for (int i = 0; i < kWorkspaces; ++i) {
    first.poison();
    first.run(nullptr, workspace(i));
    first.fetch();
    ASSERT_EQ(first.host.out, want[0]) << "workspace " << i;
  }
  cudaStream_t streams[2];
  for (auto& s : streams) cuda_ok(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  for (int round = 0; round < kRounds && !HasFailure(); ++round) {
    first.poison();
    second.poison();
    for (int i = 0; i < kLaunches; ++i) {
      first.run(streams[0], workspace(0));
      second.run(streams[1], workspace(kWorkspaces - 1));
    }
    first.fetch();
    second.fetch();
    EXPECT_EQ(first.host.out, want[0]) << "round " << round;
    EXPECT_EQ(second.host.out, want[1]) << "round " << round;
  }
  for (auto& s : streams) cuda_ok(cudaStreamDestroy(s));
}

// Two layers' graphs with one workspace, replayed in turns with other lengths and with calls between them; a third one
// is captured and never runs.
TEST_F(WorkspaceCuda, GraphsShareOne) {
  CudaCase cases[3] = {{long_config("turboquant_4bit_nc", 128, 1, {2500, 2400, 2500}), 41, device},
                       {long_config("turboquant_3bit_nc", 256, 2, {1900, 1900, 40}), 42, device},
                       {long_config("turboquant_k8v4", 64, 4, {3000, 3000}), 43, device}};
  uint64_t bytes = 0;
  for (const CudaCase& test : cases) bytes = std::max(bytes, test.workspace_bytes());
  DeviceBytes workspace(CudaCase::fresh_workspace(bytes));
  cudaStream_t stream;
  cuda_ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (CudaCase& test : cases) test.run(stream, workspace.get());  // kernels are loaded before a capture
  cuda_ok(cudaStreamSynchronize(stream));
  cudaGraph_t graphs[3];
  cudaGraphExec_t execs[2];
  for (int i = 0; i < 3; ++i) {
    cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    cases[i].run(stream, workspace.get());
    cuda_ok(cudaStreamEndCapture(stream, &graphs[i]));
    if (i < 2) cuda_ok(cudaGraphInstantiate(&execs[i], graphs[i], 0));
  }
  const std::vector<std::vector<int>> lengths[2] = {{{2500, 700, 2500}, {1, 2400, 33}, {2500, 1, 1}},
                                                    {{1900, 1900, 40}, {2, 1800, 2}, {100, 100, 40}}};
  for (size_t round = 0; round < 3; ++round) {
    for (int i = 0; i < 2; ++i) {
      cases[i].set_lengths(cases[i].host.c.query_lens, lengths[i][round]);
      cases[i].poison();
    }
    cases[2].poison();
    for (int repeat = 0; repeat < 20; ++repeat) {
      cuda_ok(cudaGraphLaunch(execs[0], stream));
      cuda_ok(cudaGraphLaunch(execs[1], stream));
      cases[2].run(stream, workspace.get());
    }
    for (CudaCase& test : cases) {
      test.fetch();
      EXPECT_LE(test.host.worst_error(), 5e-3) << test.host.c.describe();
    }
    std::vector<uint8_t> after(bytes);
    workspace.download(after.data());
    EXPECT_TRUE(all_zero(after, cuda::kCounterBytes)) << "round " << round;
  }
  for (auto& exec : execs) cuda_ok(cudaGraphExecDestroy(exec));
  for (auto& graph : graphs) cuda_ok(cudaGraphDestroy(graph));
  cuda_ok(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace tq::testing
