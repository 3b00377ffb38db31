#include "hip/runtime.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>

namespace tq::hip {
namespace {

struct Loaded {
  Runtime functions = {};
  std::string reason;
};

const char* named() {
  const char* name = std::getenv("TQ_HIP_LIBRARY");
  return name != nullptr && *name != '\0' ? name : nullptr;
}

void* open_library(std::string* reason) {
  if (const char* name = named(); name != nullptr) {
    // NOLINTNEXTLINE(clang-analyzer-optin.taint.GenericTaint): the environment is its owner's, as LD_LIBRARY_PATH is
    void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) *reason = std::string("TQ_HIP_LIBRARY names a library that cannot be opened: ") + dlerror();
    return handle;
  }
  // One that the process has already first: a PyTorch for ROCm brings its own, and streams of one are nothing to
  // another.
  const char* names[] = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so", "libamdhip64.so.5"};
  for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL}) {
    for (const char* name : names) {
      if (void* handle = dlopen(name, flags); handle != nullptr) return handle;
    }
  }
  *reason = "ROCm's runtime library libamdhip64.so is not installed, or not where the loader looks";
  return nullptr;
}

template <class F>
void find(void* handle, const char* name, F** function, std::string* reason) {
  *function = reinterpret_cast<F*>(dlsym(handle, name));
  if (*function == nullptr && reason->empty()) *reason = std::string("ROCm's runtime library has no ") + name;
}

Loaded load() {
  Loaded out;
  void* handle = open_library(&out.reason);
  if (handle == nullptr) return out;
  Runtime& f = out.functions;
  find(handle, "hipInit", &f.init, &out.reason);
  find(handle, "hipGetDeviceCount", &f.device_count, &out.reason);
  find(handle, "hipGetDevice", &f.get_device, &out.reason);
  find(handle, "hipSetDevice", &f.set_device, &out.reason);
  find(handle, "hipDeviceGetName", &f.device_name, &out.reason);
  find(handle, "hipModuleLoadData", &f.load_module, &out.reason);
  find(handle, "hipModuleUnload", &f.unload_module, &out.reason);
  find(handle, "hipModuleGetFunction", &f.get_function, &out.reason);
  find(handle, "hipModuleGetGlobal", &f.get_global, &out.reason);
  find(handle, "hipMemcpyDtoH", &f.copy_to_host, &out.reason);
  find(handle, "hipModuleLaunchKernel", &f.launch, &out.reason);
  find(handle, "hipStreamSynchronize", &f.synchronize_stream, &out.reason);
  find(handle, "hipStreamIsCapturing", &f.stream_is_capturing, &out.reason);
  find(handle, "hipGetLastError", &f.last_error, &out.reason);
  find(handle, "hipGetErrorName", &f.error_name, &out.reason);
  find(handle, "hipGetErrorString", &f.error_string, &out.reason);
  return out;
}

}  // namespace

bool runtime_is_named() { return named() != nullptr; }

const Runtime* runtime(const char** reason) {
  static const Loaded loaded = load();
  if (reason != nullptr) *reason = loaded.reason.c_str();
  return loaded.reason.empty() ? &loaded.functions : nullptr;
}

}  // namespace tq::hip
