// loader_test.cc - kernel libraries that are missing, foreign, of another build, or without a device: a sentence, no
// crash.
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "abi_fixture.h"

namespace tq::testing {
namespace {

std::string create_error(const std::string& dir, int kind, int* code) {
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = kind;
  options.kernels_dir = dir.c_str();
  TqBackend* backend = nullptr;
  TqError error = make_error();
  *code = api().create_backend(&options, &backend, &error);
  EXPECT_EQ(backend, nullptr);
  return error.message;
}

#define EXPECT_CREATE_ERROR(dir, kind, want_code, words)                                           \
  do {                                                                                             \
    int code = 0;                                                                                  \
    const std::string message = create_error(dir, kind, &code);                                    \
    EXPECT_EQ(code, want_code) << message;                                                         \
    EXPECT_NE(message.find(words), std::string::npos) << "'" << message << "' has no " << (words); \
  } while (0)

const std::string kDir = TQ_TEST_DIR;

TEST(Loader, MissingLibrary) {
  EXPECT_CREATE_ERROR(TQ_LIB_DIR, TQ_DEVICE_HIP, TQ_UNAVAILABLE, "was built without the hip kernels");
  EXPECT_CREATE_ERROR("/nonexistent", TQ_DEVICE_CPU, TQ_UNAVAILABLE, "/nonexistent/libtq_kernels_cpu.so");
}

TEST(Loader, WrongBuild) {
  EXPECT_CREATE_ERROR(kDir + "/wrong_build", TQ_DEVICE_CPU, TQ_FAILED_PRECONDITION, "0.0.1-deadbeef");
}

TEST(Loader, NotAKernelLibrary) {
  EXPECT_CREATE_ERROR(kDir + "/no_symbol", TQ_DEVICE_CPU, TQ_FAILED_PRECONDITION, "does not export tq_kernels_get_api");
}

TEST(Loader, NotAnElfFile) {
  const std::string dir = ::testing::TempDir();
  std::ofstream(dir + "/libtq_kernels_cpu.so") << "hello";
  EXPECT_CREATE_ERROR(dir, TQ_DEVICE_CPU, TQ_UNAVAILABLE, "cannot be opened");
  std::remove((dir + "/libtq_kernels_cpu.so").c_str());
}

TEST(Loader, NoDevice) {
  EXPECT_CREATE_ERROR(kDir + "/no_device", TQ_DEVICE_CUDA, TQ_UNAVAILABLE, "libcuda.so.1 is not installed");
}

TEST(Loader, BadOptions) {
  EXPECT_CREATE_ERROR(TQ_LIB_DIR, 9, TQ_INVALID_ARGUMENT, "options.device_kind is 9");
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = TQ_DEVICE_CPU;
  TqParallelFor pool = {};
  pool.struct_size = sizeof(pool);
  pool.num_threads = 4;
  options.parallel_for = &pool;
  TqBackend* backend = nullptr;
  TqError error = make_error();
  EXPECT_EQ(api().create_backend(&options, &backend, &error), TQ_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("run is NULL"), std::string::npos);
  EXPECT_EQ(api().create_backend(&options, nullptr, &error), TQ_INVALID_ARGUMENT);
}

TEST(Loader, ListsEveryKindWithAReason) {
  int64_t count = 0;
  ASSERT_EQ(api().list_libraries(nullptr, nullptr, &count, nullptr), TQ_OK);
  ASSERT_EQ(count, 3);
  TqLibraryInfo rows[3] = {};
  for (TqLibraryInfo& row : rows) row.struct_size = sizeof(row);
  ASSERT_EQ(api().list_libraries((kDir + "/no_device").c_str(), rows, &count, nullptr), TQ_OK);
  EXPECT_EQ(rows[0].usable, 0);
  EXPECT_STREQ(rows[0].build_id, "");
  EXPECT_EQ(rows[1].usable, 0);
  EXPECT_STREQ(rows[1].build_id, api().build_id()) << "opened, but there is no device";
  EXPECT_NE(std::string(rows[1].reason).find("no CUDA device"), std::string::npos);
  ASSERT_EQ(api().list_libraries(nullptr, rows, &count, nullptr), TQ_OK);
  EXPECT_EQ(rows[0].usable, 1) << rows[0].reason;
  count = 2;
  EXPECT_EQ(api().list_libraries(nullptr, rows, &count, nullptr), TQ_INVALID_ARGUMENT);
}

TEST(Loader, EnvironmentNamesTheFolder) {
  setenv("TQ_KERNELS_DIR", (kDir + "/wrong_build").c_str(), 1);
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = TQ_DEVICE_CPU;
  TqBackend* backend = nullptr;
  TqError error = make_error();
  EXPECT_EQ(api().create_backend(&options, &backend, &error), TQ_FAILED_PRECONDITION);
  unsetenv("TQ_KERNELS_DIR");
  ASSERT_EQ(api().create_backend(&options, &backend, &error), TQ_OK) << error.message;
  TqCaps caps = {};
  caps.struct_size = sizeof(caps);
  ASSERT_EQ(api().query_caps(backend, &caps, &error), TQ_OK);
  EXPECT_NE(std::string(caps.library).find("/lib/libtq_kernels_cpu.so"), std::string::npos) << caps.library;
  EXPECT_STREQ(caps.build_id, api().build_id());
  EXPECT_STRNE(caps.device_name, "");
  api().destroy_backend(backend);
}

// The native half of tq-check, as a user runs it.
TEST(CheckAbi, ExitCodesAndSentences) {
  auto run = [](const std::string& args, std::string* output) {
    FILE* pipe = popen((std::string(TQ_CHECK_ABI) + " " + args + " 2>&1").c_str(), "r");
    char buffer[4096];
    output->clear();
    for (size_t n = 0; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output->append(buffer, n);
    return WEXITSTATUS(pclose(pipe));
  };
  std::string output;
  EXPECT_EQ(run(TQ_BACKEND_PATH, &output), 0);
  EXPECT_NE(output.find("has ABI version 1.0"), std::string::npos) << output;
  EXPECT_NE(output.find("The cpu kernels are usable"), std::string::npos);
  EXPECT_NE(output.find("The hip kernels are not usable"), std::string::npos);
  EXPECT_EQ(run(std::string("--json ") + TQ_BACKEND_PATH, &output), 0);
  EXPECT_EQ(output.rfind("{\"path\"", 0), 0u);
  EXPECT_EQ(run(kDir + "/no_symbol/libtq_kernels_cpu.so", &output), 1);
  EXPECT_NE(output.find("is not libtq_backend.so"), std::string::npos);
  EXPECT_EQ(run("/nonexistent.so", &output), 1);
  EXPECT_EQ(run("--frobnicate", &output), 2);
  EXPECT_NE(output.find("usage:"), std::string::npos);
}

}  // namespace
}  // namespace tq::testing
