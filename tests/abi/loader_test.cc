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
  EXPECT_CREATE_ERROR(kDir + "/no_device", TQ_DEVICE_HIP, TQ_UNAVAILABLE, "was built without the hip kernels");
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

// The kind that AUTO chooses in a folder, or 0 with the error's sentence.
int chosen(const std::string& dir, std::string* sentence) {
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = TQ_DEVICE_AUTO;
  options.kernels_dir = dir.c_str();
  TqBackend* backend = nullptr;
  TqError error = make_error();
  if (api().create_backend(&options, &backend, &error) != TQ_OK) {
    *sentence = error.message;
    return 0;
  }
  TqCaps caps = {};
  caps.struct_size = sizeof(caps);
  EXPECT_EQ(api().query_caps(backend, &caps, nullptr), TQ_OK);
  api().destroy_backend(backend);
  return caps.device_kind;
}

TEST(Choice, GpusBeforeTheCpu) {
  std::string sentence;
  EXPECT_EQ(chosen(kDir + "/all_devices", &sentence), TQ_DEVICE_CUDA) << sentence;
  EXPECT_EQ(chosen(kDir + "/cpu_and_hip", &sentence), TQ_DEVICE_HIP) << sentence;
  EXPECT_EQ(chosen(TQ_LIB_DIR, &sentence) == 0, false) << sentence;
}

TEST(Choice, ADeviceThatIsNotThereIsNotChosen) {
  std::string sentence;
  setenv("TQ_FAKE_BROKEN", "2", 1);
  EXPECT_EQ(chosen(kDir + "/all_devices", &sentence), TQ_DEVICE_HIP) << sentence;
  setenv("TQ_FAKE_BROKEN", "3", 1);
  EXPECT_EQ(chosen(kDir + "/cpu_and_hip", &sentence), TQ_DEVICE_CPU) << sentence;
  unsetenv("TQ_FAKE_BROKEN");
}

TEST(Choice, TheEnvironmentDecides) {
  std::string sentence;
  for (const auto& [name, kind] : {std::pair{"cpu", TQ_DEVICE_CPU}, {"cuda", TQ_DEVICE_CUDA}, {"hip", TQ_DEVICE_HIP}}) {
    setenv("TQ_DEVICE", name, 1);
    EXPECT_EQ(chosen(kDir + "/all_devices", &sentence), kind) << sentence;
  }
  setenv("TQ_FAKE_BROKEN", "3", 1);
  EXPECT_EQ(chosen(kDir + "/all_devices", &sentence), 0);
  EXPECT_EQ(sentence, "TQ_DEVICE is hip, and its kernels are not usable: its device was unplugged");
  unsetenv("TQ_FAKE_BROKEN");
  setenv("TQ_DEVICE", "rocm", 1);
  EXPECT_EQ(chosen(kDir + "/all_devices", &sentence), 0);
  EXPECT_EQ(sentence, "TQ_DEVICE is rocm; it must be cpu, cuda or hip");
  unsetenv("TQ_DEVICE");
}

TEST(Choice, NothingUsableSaysWhy) {
  std::string sentence;
  EXPECT_EQ(chosen(kDir + "/no_device", &sentence), 0);
  EXPECT_NE(sentence.find("no kernel library is usable"), std::string::npos) << sentence;
  EXPECT_NE(sentence.find("cuda: no CUDA device"), std::string::npos) << sentence;
  EXPECT_NE(sentence.find("hip: there is no "), std::string::npos) << sentence;
}

TEST(Choice, ScoresAreListed) {
  TqLibraryInfo rows[3] = {};
  for (TqLibraryInfo& row : rows) row.struct_size = sizeof(row);
  int64_t count = 3;
  setenv("TQ_DEVICE", "cpu", 1);
  setenv("TQ_FAKE_BROKEN", "2", 1);
  ASSERT_EQ(api().list_libraries((kDir + "/all_devices").c_str(), rows, &count, nullptr), TQ_OK);
  unsetenv("TQ_DEVICE");
  unsetenv("TQ_FAKE_BROKEN");
  EXPECT_EQ(rows[0].score, 110);
  EXPECT_EQ(rows[1].score, 0);
  EXPECT_EQ(rows[2].score, 20);
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
int run(const std::string& environment, const std::string& args, std::string* output) {
  FILE* pipe = popen((environment + " " + TQ_CHECK_ABI + " " + args + " 2>&1").c_str(), "r");
  char buffer[4096];
  output->clear();
  for (size_t n = 0; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output->append(buffer, n);
  return WEXITSTATUS(pclose(pipe));
}
int run(const std::string& args, std::string* output) { return run("", args, output); }

TEST(CheckAbi, ExitCodesAndSentences) {
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
  EXPECT_EQ(run("--self-test=tpu", &output), 2);
  EXPECT_NE(output.find("no device kind 'tpu'"), std::string::npos);
}

TEST(CheckAbi, ExplainsTheChoice) {
  std::string output;
  EXPECT_EQ(run("TQ_KERNELS_DIR=" + kDir + "/cpu_and_hip", TQ_BACKEND_PATH, &output), 0);
  EXPECT_NE(output.find("The cpu kernels are usable: its build id matches and its device is there"), std::string::npos);
  EXPECT_NE(output.find("score 20"), std::string::npos) << output;
  EXPECT_NE(output.find("the hip kernels run: the highest score"), std::string::npos) << output;
  EXPECT_EQ(run("TQ_DEVICE=cpu TQ_KERNELS_DIR=" + kDir + "/cpu_and_hip", TQ_BACKEND_PATH, &output), 0);
  EXPECT_NE(output.find("the cpu kernels run: the highest score"), std::string::npos) << output;
}

// The real CPU kernels pass; kernels that swap two centroids, the smallest mistake there is, do not.
TEST(CheckAbi, SelfTest) {
  std::string output;
  EXPECT_EQ(run(std::string("--self-test=cpu ") + TQ_BACKEND_PATH, &output), 0);
  EXPECT_NE(output.find("\nPASSED: "), std::string::npos) << output;
  EXPECT_EQ(
      run("TQ_KERNELS_DIR=" + kDir + "/swapped_centroids", std::string("--self-test=cpu ") + TQ_BACKEND_PATH, &output),
      1);
  EXPECT_NE(output.find("turboquant_k8v4 head_dim 64: store"), std::string::npos) << output;
  EXPECT_NE(output.find("\nFAILED: "), std::string::npos) << output;
  EXPECT_EQ(run("TQ_KERNELS_DIR=" + kDir + "/no_device", std::string("--self-test=cuda ") + TQ_BACKEND_PATH, &output),
            1);
  EXPECT_NE(output.find("The self-test cannot run: no CUDA device"), std::string::npos) << output;
}

}  // namespace
}  // namespace tq::testing
