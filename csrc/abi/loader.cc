#include "abi/loader.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <cstring>

#include "build_id.h"
#include "elf/library_file.h"

namespace tq {
namespace {

// The real path of this library, or empty. The dynamic linker has it relative to the working directory if dlopen got a
// relative path, or LD_LIBRARY_PATH has a relative entry: so it is made absolute while the library is being loaded,
// before its user can go elsewhere.
char library_path[PATH_MAX];

__attribute__((constructor)) void find_library_path() {
  Dl_info info;
  if (dladdr(library_path, &info) == 0 || info.dli_fname == nullptr ||
      realpath(info.dli_fname, library_path) == nullptr)
    library_path[0] = '\0';
}

}  // namespace

const char* device_kind_name(int device_kind) {
  switch (device_kind) {
    case TQ_DEVICE_CPU:
      return "cpu";
    case TQ_DEVICE_CUDA:
      return "cuda";
    case TQ_DEVICE_HIP:
      return "hip";
    default:
      return "unknown";
  }
}

Status kernels_dir(const char* given, std::string* dir) {
  if (given != nullptr) {
    if (*given == '\0') {
      return invalid("kernels_dir is an empty string; it must be a folder, or NULL for the one of libtq_backend.so");
    }
    *dir = given;
    return {};
  }
  if (const char* named = std::getenv("TQ_KERNELS_DIR"); named != nullptr && *named != '\0') {
    *dir = named;
    return {};
  }
  *dir = library_path;
  if (dir->empty()) {
    return {TQ_UNAVAILABLE,
            "the folder of libtq_backend.so could not be found when it was loaded; name one in TQ_KERNELS_DIR"};
  }
  dir->resize(dir->rfind('/'));
  return {};
}

std::string kernel_library_path(const std::string& dir, int device_kind) {
  return dir + "/libtq_kernels_" + device_kind_name(device_kind) + ".so";
}

static Status other_build(const std::string& path, const std::string& build_id) {
  return {TQ_FAILED_PRECONDITION, path + " has build id " + build_id + "; this libtq_backend.so needs " + kBuildId +
                                      ": install both from one wheel"};
}

Status load_kernel_library(const std::string& path, int device_kind, const KernelApi** api) {
  if (access(path.c_str(), F_OK) != 0) {
    return {TQ_UNAVAILABLE, "there is no " + path + "; this package was built without the " +
                                device_kind_name(device_kind) + " kernels"};
  }
  std::string build_id;
  if (const std::string sentence = read_library_file(path, &build_id); !sentence.empty()) {
    return {TQ_UNAVAILABLE, "the kernel library cannot be opened: " + sentence};
  }
  if (build_id.empty()) {
    return {TQ_FAILED_PRECONDITION, path + " is not a kernel library of tq-backend: it carries no build id"};
  }
  if (build_id != kBuildId) return other_build(path, build_id);
  // RTLD_LOCAL: two kernel libraries export the same symbol. Never closed: backends hold pointers into it.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return {TQ_UNAVAILABLE, std::string("the kernel library cannot be opened: ") + dlerror()};
  const auto get_api = reinterpret_cast<TqKernelsGetApi>(dlsym(handle, "tq_kernels_get_api"));
  const KernelApi* found = get_api != nullptr ? get_api() : nullptr;
  if (found == nullptr || found->struct_size < 2 * sizeof(void*) || found->build_id == nullptr) {
    return {TQ_FAILED_PRECONDITION,
            path + " is not a kernel library of tq-backend: it does not export tq_kernels_get_api"};
  }
  // Again: an upgrade may have replaced the file in between.
  if (std::string_view(found->build_id) != kBuildId) return other_build(path, found->build_id);
  if (found->device_kind != device_kind) {
    return {TQ_FAILED_PRECONDITION, path + " holds kernels for " + device_kind_name(found->device_kind) + ", not for " +
                                        device_kind_name(device_kind)};
  }
  *api = found;
  return {};
}

// GPUs before the CPU. CUDA before HIP only to have an order: a machine on which both work is rare, and its owner can
// say.
static int base_score(int device_kind) {
  return device_kind == TQ_DEVICE_CUDA ? 30 : device_kind == TQ_DEVICE_HIP ? 20 : 10;
}

// What the environment's TQ_DEVICE names, or null.
static const char* wanted_kind() {
  const char* name = std::getenv("TQ_DEVICE");
  return name != nullptr && *name != '\0' ? name : nullptr;
}

Candidate examine(const std::string& dir, int device_kind) {
  Candidate out = {device_kind, kernel_library_path(dir, device_kind), nullptr, {}, 0};
  out.status = load_kernel_library(out.path, device_kind, &out.kernels);
  if (!out.status.ok()) return out;
  if (const KernelStatus probed = out.kernels->probe(); probed.code != TQ_OK) {
    out.status = from_kernel(probed);
    return out;
  }
  const char* wanted = wanted_kind();
  out.score = base_score(device_kind);
  if (wanted != nullptr && std::strcmp(wanted, device_kind_name(device_kind)) == 0) out.score += 100;
  return out;
}

Status choose_kind(const std::string& dir, int* device_kind) {
  const char* wanted = wanted_kind();
  bool known = wanted == nullptr;
  std::string reasons;
  int best = 0;
  for (const int kind : kDeviceKinds) {
    const Candidate c = examine(dir, kind);
    if (wanted != nullptr && std::strcmp(wanted, device_kind_name(kind)) == 0) {
      known = true;
      if (!c.status.ok()) {
        return {TQ_UNAVAILABLE,
                std::string("TQ_DEVICE is ") + wanted + ", and its kernels are not usable: " + c.status.message};
      }
    }
    if (c.score > best) best = c.score, *device_kind = kind;
    if (!c.status.ok()) {
      reasons += (reasons.empty() ? "" : "; ") + std::string(device_kind_name(kind)) + ": " + c.status.message;
    }
  }
  if (!known) return invalid(std::string("TQ_DEVICE is ") + wanted + "; it must be cpu, cuda or hip");
  if (best == 0) return {TQ_UNAVAILABLE, "no kernel library is usable: " + reasons};
  return {};
}

}  // namespace tq
