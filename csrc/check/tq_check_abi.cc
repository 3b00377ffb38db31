// tq_check_abi.cc - opens any libtq_backend.so by path and says what it is and what it can use here.
//
//   tq-check-abi [--json] [PATH]      PATH: a libtq_backend.so; default: the one beside this program
//
// Exit code: 0 a kernel library is usable, 1 incompatible or nothing usable, 2 wrong usage.
#include <dlfcn.h>
#include <fmt/core.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

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

int check(bool json, const std::string& path) {
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
  for (const TqLibraryInfo& library : libraries) works = works || library.usable != 0;

  if (json) {
    fmt::print("{{\"path\": {}, \"works\": {}, \"abi_version\": \"{}.{}\", \"build_id\": {}, \"formats\": [",
               quoted(path), works, version() >> 16, version() & 0xffff, quoted(api->build_id()));
    for (size_t i = 0; i < formats.size(); ++i) fmt::print("{}{}", i == 0 ? "" : ", ", quoted(formats[i].name));
    fmt::print("], \"libraries\": [");
    for (size_t i = 0; i < libraries.size(); ++i) {
      const TqLibraryInfo& l = libraries[i];
      fmt::print("{}{{\"kind\": {}, \"usable\": {}, \"path\": {}, \"build_id\": {}, \"reason\": {}}}",
                 i == 0 ? "" : ", ", quoted(kind_name(l.device_kind)), l.usable != 0, quoted(l.path),
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
    fmt::print("The {} kernels are {}usable: {}{}.\n", kind_name(l.device_kind), l.usable != 0 ? "" : "not ", l.reason,
               l.build_id[0] != '\0' ? fmt::format(" (build id {})", l.build_id) : "");
  }
  if (!works) fmt::print("No kernel library is usable on this machine.\n");
  return works ? kWorks : kIncompatible;
}

int run(int argc, char** argv) {
  bool json = false;
  std::string path;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--json") == 0) {
      json = true;
    } else if (argv[i][0] == '-' || !path.empty()) {
      fmt::print(stderr,
                 "tq-check-abi: '{}' is not understood; usage: tq-check-abi [--json] [PATH of libtq_backend.so]\n",
                 argv[i]);
      return kUsage;
    } else {
      path = argv[i];
    }
  }
  return check(json, path.empty() ? beside_this_program() : path);
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
