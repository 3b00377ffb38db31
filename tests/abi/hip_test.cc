// hip_test.cc - the HIP kernel library where there is no device, no ROCm, the wrong device, or a runtime that fails: a
// sentence from every entry, and no crash. What a machine lacks is tried in processes of their own (tq-check-abi).
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "abi_fixture.h"
#include "hip/topology.h"

namespace tq::testing {
namespace {

// What tq-check-abi prints in this environment; it must not end by a signal.
std::string check_abi(const std::string& environment, const std::string& arguments, int* exit_code) {
  FILE* pipe =
      popen((environment + " " + TQ_CHECK_ABI + " " + arguments + " " + TQ_BACKEND_PATH + " 2>&1").c_str(), "r");
  char buffer[4096];
  std::string output;
  for (size_t n = 0; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output.append(buffer, n);
  const int status = pclose(pipe);
  EXPECT_TRUE(WIFEXITED(status)) << output;
  *exit_code = WEXITSTATUS(status);
  return output;
}

std::string self_test(const std::string& environment) {
  int exit_code = 0;
  const std::string output = check_abi(environment, "--self-test=hip", &exit_code);
  EXPECT_EQ(exit_code, 1) << output;
  return output;
}

#define EXPECT_SENTENCE(environment, words)                                                          \
  do {                                                                                               \
    const std::string said = self_test(environment);                                                 \
    EXPECT_NE(said.find(words), std::string::npos) << "'" << said << "' has no '" << (words) << "'"; \
  } while (0)

const std::string kFake = "TQ_HIP_LIBRARY=" TQ_FAKE_HIP_LIBRARY " ";

TEST(NoHip, WithoutTheDriver) {
  if (access("/dev/kfd", F_OK) == 0) GTEST_SKIP() << "this machine has the amdgpu driver";
  EXPECT_SENTENCE("", "no HIP device can be used here: there is no /dev/kfd");
}

TEST(NoHip, WithoutTheRuntime) {
  EXPECT_SENTENCE("TQ_HIP_LIBRARY=/nonexistent/libamdhip64.so",
                  "TQ_HIP_LIBRARY names a library that cannot be opened: /nonexistent/libamdhip64.so");
}

TEST(NoHip, ARuntimeThatLacksAFunction) {
  EXPECT_SENTENCE("TQ_HIP_LIBRARY=" TQ_TEST_DIR "/no_symbol/libtq_kernels_cpu.so",
                  "ROCm's runtime library has no hipInit");
}

TEST(NoHip, ARuntimeThatFails) {
  EXPECT_SENTENCE(kFake + "TQ_FAKE_HIP=hipInit=100",
                  "no HIP device can be used here: the fake was told to fail (hipError100)");
  EXPECT_SENTENCE(kFake + "TQ_FAKE_HIP=hipGetDeviceCount=100", "no HIP device can be used here");
  EXPECT_SENTENCE(kFake + "TQ_FAKE_HIP=devices=0", "device_index is 0; this machine has 0 HIP devices");
  EXPECT_SENTENCE(kFake + "TQ_FAKE_HIP=hipSetDevice=101", "choosing the HIP device failed");
  EXPECT_SENTENCE(kFake + "TQ_FAKE_HIP=hipModuleGetFunction=500", "tq_store_k8v4_4 failed");
  EXPECT_SENTENCE(kFake + "TQ_FAKE_HIP=tq_merge=500", "tq_merge failed");
  EXPECT_SENTENCE(kFake + "TQ_FAKE_HIP=hipModuleGetGlobal=500", "reading the kernels' wave size failed");
  EXPECT_SENTENCE(kFake + "TQ_FAKE_HIP=hipMemcpyDtoH=1", "reading the kernels' wave size failed");
}

TEST(NoHip, ADeviceOfAnotherKind) {
  EXPECT_SENTENCE(
      kFake + "TQ_FAKE_HIP=hipModuleLoadData=209",
      "Fake Instinct cannot run these kernels, which were compiled for gfx90a gfx942 gfx950 gfx1100 gfx1201");
}

TEST(NoHip, IsListedWithItsReason) {
  int exit_code = 0;
  const std::string output = check_abi("TQ_HIP_LIBRARY=/nonexistent/libamdhip64.so", "", &exit_code);
  EXPECT_EQ(exit_code, 0) << "the CPU's kernels are usable";
  EXPECT_NE(output.find("The hip kernels are not usable: no HIP device can be used here: TQ_HIP_LIBRARY names"),
            std::string::npos)
      << output;
  EXPECT_NE(output.find(std::string("(build id ") + api().build_id() + "); score 0."), std::string::npos) << output;
}

// The calls of a backend whose device is there and whose launches fail.
class HipCalls : public AbiTest {
 protected:
  void SetUp() override {
    AbiTest::SetUp();
    setenv("TQ_HIP_LIBRARY", TQ_FAKE_HIP_LIBRARY, 1);
    TqBackendOptions options = {};
    options.struct_size = sizeof(options);
    options.device_kind = TQ_DEVICE_HIP;
    TqError error = make_error();
    ASSERT_EQ(api().create_backend(&options, &hip, &error), TQ_OK) << error.message;
    uint64_t bytes = 0;
    ASSERT_EQ(api().workspace_size(hip, &layer, &bytes, &error), TQ_OK) << error.message;
    scratch.resize(bytes + 64);
    attend.workspace = aligned(scratch);
    attend.workspace_bytes = bytes;
  }
  void TearDown() override {
    unsetenv("TQ_FAKE_HIP");
    api().destroy_backend(hip);
    AbiTest::TearDown();
  }

  template <class F, class Args>
  void expect_failure(F function, const Args& args, const char* kernel) {
    unsetenv("TQ_FAKE_HIP");
    TqError error = make_error();
    EXPECT_EQ(function(hip, &args, &error), TQ_OK) << error.message;
    setenv("TQ_FAKE_HIP", "hipModuleLaunchKernel=719", 1);
    EXPECT_EQ(function(hip, &args, &error), TQ_INTERNAL);
    EXPECT_EQ(std::string(error.message), std::string(kernel) + " failed: the fake was told to fail (hipError719)");
    setenv("TQ_FAKE_HIP", "hipModuleLaunchKernel=2", 1);
    EXPECT_EQ(function(hip, &args, &error), TQ_RESOURCE_EXHAUSTED) << "hipErrorOutOfMemory";
    const auto left = reinterpret_cast<int (*)()>(dlsym(dlopen(TQ_FAKE_HIP_LIBRARY, RTLD_NOW), "fakePendingError"));
    EXPECT_EQ(left(), 0) << "an error that was reported is not left for others";
  }

  TqBackend* hip = nullptr;
};

TEST_F(HipCalls, FailWithASentence) {
  expect_failure(api().store_kv, store, "the store kernel");
  expect_failure(api().attend, attend, "the attention kernel");
  TqDequantKvArgs dequant = {};
  dequant.struct_size = sizeof(dequant);
  dequant.layer = &layer;
  dequant.pages = &pages;
  dequant.num_seqs = 2;
  dequant.max_blocks_per_seq = 2;
  dequant.block_table = table;
  dequant.block_table_stride = 2;
  const int32_t first[] = {0, 0};
  dequant.first_tokens = first;
  dequant.token_start_loc = starts;
  dequant.num_tokens = 3;
  dequant.key_out = out.data();
  expect_failure(api().dequant_kv, dequant, "the dequantization kernel");
  TqRotateArgs rotate = {};
  rotate.struct_size = sizeof(rotate);
  rotate.num_heads = kHeads;
  rotate.side = TQ_SIDE_KEY;
  rotate.layer = &layer;
  rotate.num_tokens = 3;
  rotate.x = rotate.out = out.data();
  rotate.x_token_stride = rotate.out_token_stride = kHeads * kDim;
  rotate.x_head_stride = rotate.out_head_stride = kDim;
  expect_failure(api().rotate, rotate, "the rotation kernel");
  TqCopyPagesArgs copy = {};
  copy.struct_size = sizeof(copy);
  copy.layer = &layer;
  copy.pages = &pages;
  const int64_t pairs[] = {0, 1};
  copy.src_dst = pairs;
  copy.num_pairs = 1;
  expect_failure(api().copy_pages, copy, "the page copy kernel");
}

TEST_F(HipCalls, TestFormatsAreRefused) {
  layer.format_id = TQ_FORMAT_RAW_F32;
  TqError error = make_error();
  uint64_t bytes = 0;
  EXPECT_EQ(api().workspace_size(hip, &layer, &bytes, &error), TQ_UNIMPLEMENTED);
  EXPECT_NE(std::string(error.message).find("the HIP kernels serve all others"), std::string::npos);
}

TEST_F(HipCalls, CapsNameTheDevice) {
  TqCaps caps = {};
  caps.struct_size = sizeof(caps);
  ASSERT_EQ(api().query_caps(hip, &caps, nullptr), TQ_OK);
  EXPECT_EQ(caps.device_kind, TQ_DEVICE_HIP);
  EXPECT_STREQ(caps.device_name, "Fake Instinct (wave64)");
}

// The kernel driver's files, as on a machine with an MI300X, and on one with a GPU that the kernels do not serve.
TEST(Topology, NamesGpus) {
  const std::string root = ::testing::TempDir() + "/tq_topology";
  std::filesystem::remove_all(root);
  EXPECT_EQ(hip::missing_target(hip::gpus_of(root), "gfx90a"), "the amdgpu driver reports no GPU");
  const int versions[] = {0, 90402, 90010, 110000, 120001, 100306};
  for (int i = 0; i < 6; ++i) {
    const std::string node = root + "/nodes/" + std::to_string(i);
    std::filesystem::create_directories(node);
    std::ofstream(node + "/properties") << "cpu_cores_count 0\ngfx_target_version " << versions[i]
                                        << "\nvendor_id 4098\n";
  }
  const std::vector<std::string> want = {"gfx1036", "gfx1100", "gfx1201", "gfx90a", "gfx942"};
  EXPECT_EQ(hip::gpus_of(root), want);
  EXPECT_EQ(hip::missing_target(want, "gfx950 gfx942"), "");
  EXPECT_EQ(hip::missing_target({"gfx1036", "gfx1036"}, "gfx90a gfx942"),
            "this machine's GPU is gfx1036, and the kernels were compiled for gfx90a gfx942");
  std::filesystem::remove_all(root);
}

}  // namespace
}  // namespace tq::testing
