// tq_check_abi.cc - opens any libtq_backend.so by path and says what it is and what it can use here.
//
//   tq-check-abi [--json] [--self-test[=KIND]] [PATH]
//
//   PATH         a libtq_backend.so; default: the one beside this program
//   --self-test  runs numerical checks of every kernel on the device of KIND (cpu, cuda, hip), else on the one that the
//                scores choose
//
// Exit code: 0 a kernel library is usable (and passed), 1 incompatible, nothing usable or a check failed, 2 wrong
// usage.
#include <dlfcn.h>
#include <fmt/core.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "check/self_test.h"
#include "elf/library_file.h"
#include "tq_backend.h"

namespace {

constexpr int kWorks = 0;
constexpr int kIncompatible = 1;
constexpr int kUsage = 2;

std::string beside_this_program() {
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (length <= 0) return "libtq_backend.so";
  std::string self(path, static_cast<size_t>(length));
  return self.substr(0, self.rfind('/')) + "/libtq_backend.so";
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out + "\"";
}

int fail(bool json, const std::string& path, const std::string& sentence) {
  if (json) {
    fmt::print("{{\"path\": {}, \"works\": false, \"error\": {}}}\n", quoted(path), quoted(sentence));
  } else {
    fmt::print("{}\n", sentence);
  }
  return kIncompatible;
}

const char* kind_name(int kind) {
  return kind == TQ_DEVICE_CPU ? "cpu" : kind == TQ_DEVICE_CUDA ? "cuda" : kind == TQ_DEVICE_HIP ? "hip" : "unknown";
}

// A kind's number by its name, -1 if there is none; "": the scores choose.
int kind_of(const std::string& name) {
  if (name.empty()) return TQ_DEVICE_AUTO;
  for (const int kind : {TQ_DEVICE_CPU, TQ_DEVICE_CUDA, TQ_DEVICE_HIP}) {
    if (name == kind_name(kind)) return kind;
  }
  return -1;
}

// self_test_kind: -1 for no self-test.
int check(bool json, int self_test_kind, const std::string& path) {
  if (const std::string sentence = tq::read_library_file(path); !sentence.empty()) {
    return fail(json, path, sentence + ".");
  }
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return fail(json, path, fmt::format("{} cannot be opened: {}.", path, dlerror()));
  const auto version = reinterpret_cast<uint32_t (*)()>(dlsym(handle, "tq_abi_version"));
  const auto get_api = reinterpret_cast<const TqApi* (*)(uint32_t, TqError*)>(dlsym(handle, "tq_get_api"));
  if (version == nullptr || get_api == nullptr) {
    return fail(json, path,
                fmt::format("{} is not libtq_backend.so: it exports no tq_abi_version and tq_get_api.", path));
  }
  TqError error = {sizeof(TqError), 0, ""};
  const TqApi* api = get_api(TQ_ABI_MAJOR, &error);
  if (api == nullptr) {
    return fail(json, path,
                fmt::format("{} has ABI version {}.{}, and this program needs {}.x: {}.", path, version() >> 16,
                            version() & 0xffff, TQ_ABI_MAJOR, error.message));
  }

  if (self_test_kind >= 0) return tq::check::self_test(*api, self_test_kind) == 0 ? kWorks : kIncompatible;

  TqLibraryInfo blank = {};
  blank.struct_size = sizeof(blank);
  TqFormatInfo no_format = {};
  no_format.struct_size = sizeof(no_format);
  int64_t num_formats = 0;
  int64_t num_libraries = 0;
  api->list_formats(nullptr, &num_formats, &error);
  api->list_libraries(nullptr, nullptr, &num_libraries, &error);
  std::vector<TqFormatInfo> formats(static_cast<size_t>(num_formats), no_format);
  std::vector<TqLibraryInfo> libraries(static_cast<size_t>(num_libraries), blank);
  if (api->list_formats(formats.data(), &num_formats, &error) != TQ_OK ||
      api->list_libraries(nullptr, libraries.data(), &num_libraries, &error) != TQ_OK) {
    return fail(json, path, fmt::format("{} answers with an error: {}.", path, error.message));
  }
  bool works = false;
  const TqLibraryInfo* best = nullptr;
  for (const TqLibraryInfo& library : libraries) {
    works = works || library.usable != 0;
    if (library.score > 0 && (best == nullptr || library.score > best->score)) best = &library;
  }

  if (json) {
    fmt::print("{{\"path\": {}, \"works\": {}, \"abi_version\": \"{}.{}\", \"build_id\": {}, \"formats\": [",
               quoted(path), works, version() >> 16, version() & 0xffff, quoted(api->build_id()));
    for (size_t i = 0; i < formats.size(); ++i) fmt::print("{}{}", i == 0 ? "" : ", ", quoted(formats[i].name));
    fmt::print("], \"libraries\": [");
    for (size_t i = 0; i < libraries.size(); ++i) {
      const TqLibraryInfo& l = libraries[i];
      fmt::print("{}{{\"kind\": {}, \"usable\": {}, \"score\": {}, \"path\": {}, \"build_id\": {}, \"reason\": {}}}",
                 i == 0 ? "" : ", ", quoted(kind_name(l.device_kind)), l.usable != 0, l.score, quoted(l.path),
                 quoted(l.build_id), quoted(l.reason));
    }
    fmt::print("]}}\n");
    return works ? kWorks : kIncompatible;
  }
  fmt::print("{} has ABI version {}.{} and build id {}.\n", path, version() >> 16, version() & 0xffff, api->build_id());
  fmt::print("It knows the formats");
  for (size_t i = 0; i < formats.size(); ++i) fmt::print("{} {}", i == 0 ? "" : ",", formats[i].name);
  fmt::print(".\n");
  for (const TqLibraryInfo& l : libraries) {
    fmt::print("The {} kernels are {}usable: {}{}; score {}.\n", kind_name(l.device_kind), l.usable != 0 ? "" : "not ",
               l.reason, l.build_id[0] != '\0' ? fmt::format(" (build id {})", l.build_id) : "", l.score);
  }
  if (best != nullptr) {
    fmt::print(
        "Where the caller leaves the choice, the {} kernels run: the highest score. TQ_DEVICE=cpu, cuda or hip "
        "in the environment overrides it.\n",
        kind_name(best->device_kind));
  }
  if (!works) fmt::print("No kernel library is usable on this machine.\n");
  return works ? kWorks : kIncompatible;
}

int run(int argc, char** argv) {
  constexpr const char* kUsageText = "usage: tq-check-abi [--json] [--self-test[=KIND]] [PATH of libtq_backend.so]";
  bool json = false;
  int self_test_kind = -1;
  std::string path;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--json") {
      json = true;
    } else if (argument == "--self-test" || argument.rfind("--self-test=", 0) == 0) {
      const std::string name = argument.size() > 12 ? argument.substr(12) : "";
      self_test_kind = kind_of(name);
      if (self_test_kind < 0) {
        fmt::print(stderr, "tq-check-abi: there is no device kind '{}', only cpu, cuda and hip; {}\n", name,
                   kUsageText);
        return kUsage;
      }
    } else if (argument[0] == '-' || !path.empty()) {
      fmt::print(stderr, "tq-check-abi: '{}' is not understood; {}\n", argument, kUsageText);
      return kUsage;
    } else {
      path =
          argument.find('/') == std::string::npos ? "./" + argument : argument;  // dlopen would search for a bare name
    }
  }
  return check(json, self_test_kind, path.empty() ? beside_this_program() : path);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {  // printing to a closed pipe, or no memory
    std::fputs(error.what(), stderr);
    return kIncompatible;
  }
}
