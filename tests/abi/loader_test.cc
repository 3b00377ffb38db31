// loader_test.cc - kernel libraries that are missing, foreign, of another build, or without a device: a sentence, no
// crash.
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>

#include "abi_fixture.h"

namespace tq::testing {
namespace {

namespace fs = std::filesystem;

int run_command(const std::string& command, std::string* output) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  char buffer[4096];
  output->clear();
  for (size_t n = 0; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output->append(buffer, n);
  return WEXITSTATUS(pclose(pipe));
}

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

// Of a library with another build id no code runs, constructors included: the id is read from its file.
TEST(Loader, WrongBuild) {
  unsetenv("TQ_FAKE_CONSTRUCTED");
  EXPECT_CREATE_ERROR(kDir + "/wrong_build", TQ_DEVICE_CPU, TQ_FAILED_PRECONDITION, "0.0.1-deadbeef");
  EXPECT_EQ(std::getenv("TQ_FAKE_CONSTRUCTED"), nullptr);
  EXPECT_CREATE_ERROR(kDir + "/replaced", TQ_DEVICE_CPU, TQ_FAILED_PRECONDITION, "0.0.1-deadbeef");
  EXPECT_NE(std::getenv("TQ_FAKE_CONSTRUCTED"), nullptr) << "the constructor that this test relies on";
}

TEST(Loader, NotAKernelLibrary) {
  EXPECT_CREATE_ERROR(kDir + "/no_note", TQ_DEVICE_CPU, TQ_FAILED_PRECONDITION, "carries no build id");
  EXPECT_CREATE_ERROR(kDir + "/no_symbol", TQ_DEVICE_CPU, TQ_FAILED_PRECONDITION, "does not export tq_kernels_get_api");
}

// A folder of its own, and gone with the test.
class Folder {
 public:
  Folder() {
    std::string name = ::testing::TempDir() + "tq_XXXXXX";
    path = fs::canonical(mkdtemp(name.data()));
  }
  ~Folder() { fs::remove_all(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  fs::path path;
};

const fs::path kCpuLibrary = fs::path(TQ_LIB_DIR) / "libtq_kernels_cpu.so";

TEST(Loader, NotALibrary) {
  const Folder folder;
  const fs::path library = folder.path / "libtq_kernels_cpu.so";
  std::ofstream(library) << "hello";
  EXPECT_CREATE_ERROR(folder.path, TQ_DEVICE_CPU, TQ_UNAVAILABLE, "is no ELF file");
  std::ofstream(library) << "";
  EXPECT_CREATE_ERROR(folder.path, TQ_DEVICE_CPU, TQ_UNAVAILABLE, "is no ELF file");
  fs::remove(library);
  fs::create_directory(library);
  EXPECT_CREATE_ERROR(folder.path, TQ_DEVICE_CPU, TQ_UNAVAILABLE, "is a directory; it must be a shared library");
  fs::remove(library);
  ASSERT_EQ(mkfifo(library.c_str(), 0600), 0);
  alarm(20);  // opening it would wait for a writer
  EXPECT_CREATE_ERROR(folder.path, TQ_DEVICE_CPU, TQ_UNAVAILABLE, "is a FIFO; it must be a shared library");
  alarm(0);
  fs::remove(library);
  fs::copy_file(TQ_WHERE, library);
  EXPECT_CREATE_ERROR(folder.path, TQ_DEVICE_CPU, TQ_FAILED_PRECONDITION, "carries no build id");
}

// Cut at any length: dlopen would map pages that the file does not have, and die of SIGBUS.
TEST(Loader, CutShort) {
  const Folder folder;
  const fs::path library = folder.path / "libtq_kernels_cpu.so";
  const auto whole = static_cast<int64_t>(fs::file_size(kCpuLibrary));
  fs::copy_file(kCpuLibrary, library);
  for (const int64_t bytes :
       {whole - 1, whole - 64, whole / 2, int64_t{65536}, int64_t{4096}, int64_t{1000}, int64_t{64}}) {
    fs::resize_file(library, static_cast<uintmax_t>(bytes));
    EXPECT_CREATE_ERROR(folder.path, TQ_DEVICE_CPU, TQ_UNAVAILABLE,
                        "is cut short: it has " + std::to_string(bytes) + " bytes");
  }
  fs::resize_file(library, 63);
  EXPECT_CREATE_ERROR(folder.path, TQ_DEVICE_CPU, TQ_UNAVAILABLE, "is no ELF file");
  fs::remove(library);
  fs::copy_file(kCpuLibrary, library);
  int code = -1;
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = TQ_DEVICE_CPU;
  options.kernels_dir = folder.path.c_str();
  TqBackend* backend = nullptr;
  TqError error = make_error();
  code = api().create_backend(&options, &backend, &error);
  EXPECT_EQ(code, TQ_OK) << "whole again: " << error.message;
  api().destroy_backend(backend);
}

// A header whose tables do not fit in any file.
TEST(Loader, HostileHeaders) {
  const Folder folder;
  const fs::path library = folder.path / "libtq_kernels_cpu.so";
  const uint32_t seed = static_cast<uint32_t>(std::getenv("TQ_TEST_SEED") ? std::atoi(std::getenv("TQ_TEST_SEED")) : 5);
  std::printf("seed %u (TQ_TEST_SEED)\n", seed);
  std::mt19937 rng(seed);
  std::string start(4096, '\0');
  std::ifstream(kCpuLibrary, std::ios::binary).read(start.data(), 4096);
  for (int i = 0; i < 300; ++i) {
    std::string bytes = start;
    for (int change = 0; change < 4; ++change) {
      const size_t at = 18 + rng() % 400;  // behind what says that it is ELF: header and program headers
      for (size_t b = 0; b < 1u << rng() % 4; ++b) bytes[at + b] = static_cast<char>(rng() % 3 == 0 ? 0xff : rng());
    }
    std::ofstream(library, std::ios::binary) << bytes;
    int code = 0;
    const std::string message = create_error(folder.path, TQ_DEVICE_CPU, &code);
    EXPECT_NE(code, TQ_OK);
    EXPECT_NE(message.find("libtq_kernels_cpu.so"), std::string::npos) << message;
  }
}

// What "libtq_backend.so" stands for does not change with the working directory.
TEST(Loader, RelativePathsAreTakenAtLoad) {
  const Folder folder;
  fs::create_directory(folder.path / "rel");
  fs::copy_file(TQ_BACKEND_PATH, folder.path / "rel/libtq_backend.so");
  fs::copy_file(kCpuLibrary, folder.path / "rel/libtq_kernels_cpu.so");
  const std::string want = (folder.path / "rel/libtq_kernels_cpu.so").string();

  const fs::path before = fs::current_path();
  fs::current_path(folder.path);
  void* handle = dlopen("rel/libtq_backend.so", RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(handle, nullptr) << dlerror();
  fs::current_path("/");
  const auto get_api = reinterpret_cast<decltype(&tq_get_api)>(dlsym(handle, "tq_get_api"));
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = TQ_DEVICE_CPU;
  TqBackend* backend = nullptr;
  TqError error = make_error();
  const TqApi* other = get_api(TQ_ABI_MAJOR, &error);
  EXPECT_NE(other, &api()) << "a library of its own";
  EXPECT_EQ(other->create_backend(&options, &backend, &error), TQ_OK) << error.message;
  TqCaps caps = {};
  caps.struct_size = sizeof(caps);
  EXPECT_EQ(other->query_caps(backend, &caps, &error), TQ_OK);
  EXPECT_EQ(caps.library, want);
  other->destroy_backend(backend);
  fs::current_path(before);

  std::string output;
  EXPECT_EQ(run_command("cd " + folder.path.string() + " && LD_LIBRARY_PATH=rel " TQ_WHERE " /", &output), 0) << output;
  EXPECT_EQ(output, want + "\n");
}

TEST(Loader, AnEmptyFolderNameIsNotTheRoot) {
  EXPECT_CREATE_ERROR("", TQ_DEVICE_CPU, TQ_INVALID_ARGUMENT, "kernels_dir is an empty string; it must be a folder");
  TqLibraryInfo rows[3] = {};
  for (TqLibraryInfo& row : rows) row.struct_size = sizeof(row);
  int64_t count = 3;
  EXPECT_EQ(api().list_libraries("", rows, &count, nullptr), TQ_INVALID_ARGUMENT);
}

TEST(Loader, ACpuIsOneDevice) {
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = TQ_DEVICE_CPU;
  TqBackend* backend = nullptr;
  TqError error = make_error();
  for (const int index : {1, 99}) {
    options.device_index = index;
    EXPECT_EQ(api().create_backend(&options, &backend, &error), TQ_INVALID_ARGUMENT);
    EXPECT_NE(std::string(error.message).find("device_index is " + std::to_string(index)), std::string::npos)
        << error.message;
  }
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
  return run_command(environment + " " + TQ_CHECK_ABI + " " + args, output);
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
  EXPECT_EQ(run(kDir + "/no_note/libtq_kernels_cpu.so", &output), 1);
  EXPECT_NE(output.find("is not libtq_backend.so"), std::string::npos);
  EXPECT_EQ(run("/nonexistent.so", &output), 1);
  EXPECT_EQ(run("--frobnicate", &output), 2);
  EXPECT_NE(output.find("usage:"), std::string::npos);
  EXPECT_EQ(run("--self-test=tpu", &output), 2);
  EXPECT_NE(output.find("no device kind 'tpu'"), std::string::npos);
}

// dlopen searches for a name without a slash; the file is meant, here one that says to be something else.
TEST(CheckAbi, ANameIsAFileHere) {
  const Folder folder;
  fs::copy_file(kDir + "/no_note/libtq_kernels_cpu.so", folder.path / "libtq_backend.so");
  const std::string here = "cd " + folder.path.string() + " && LD_LIBRARY_PATH=" TQ_LIB_DIR " " TQ_CHECK_ABI " ";
  std::string output;
  EXPECT_EQ(run_command(here + "libtq_backend.so", &output), 1);
  EXPECT_NE(output.find("./libtq_backend.so is not libtq_backend.so: it exports no"), std::string::npos) << output;
  EXPECT_EQ(run_command(here + "libc.so.6", &output), 1);
  EXPECT_NE(output.find("./libc.so.6 cannot be read: No such file"), std::string::npos) << output;
  fs::resize_file(folder.path / "libtq_backend.so", 5000);
  EXPECT_EQ(run_command(here + "libtq_backend.so", &output), 1);
  EXPECT_NE(output.find("is cut short: it has 5000 bytes"), std::string::npos) << output;
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
