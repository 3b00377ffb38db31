// runtime.cc - libamdhip64 of a GPU that is simt.h: a kernel library opens it by TQ_HIP_LIBRARY and runs unchanged, but
// for its machine code, in whose place kernels.hip is compiled into this library by the host's compiler. Device memory
// is host memory, and a call returns when its work is done.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simt/host_memory.h"
#include "simt/simt.h"

extern "C" const int tq_wave_size;

namespace {

constexpr int kInvalidValue = 1, kNotFound = 500;
int module;

void* own_symbol(const char* name) {
  static void* self = [] {
    Dl_info info;
    dladdr(reinterpret_cast<const void*>(&own_symbol), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  return dlsym(self, name);
}

}  // namespace

TQ_HIP_API int hipInit(unsigned) { return 0; }
TQ_HIP_API int hipGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
TQ_HIP_API int hipGetDevice(int* device) {
  *device = 0;
  return 0;
}
TQ_HIP_API int hipSetDevice(int device) { return device == 0 ? 0 : kInvalidValue; }
TQ_HIP_API int hipDeviceGetName(char* name, int length, int) {
  std::snprintf(name, static_cast<size_t>(length), "model of %s", TQ_SIMT_TARGET);
  return 0;
}
TQ_HIP_API int hipModuleLoadData(void** out, const void* image) {
  if (std::memcmp(image, "__CLANG_OFFLOAD_BUNDLE__", 24) != 0) return kInvalidValue;
  *out = &module;
  return 0;
}
TQ_HIP_API int hipModuleUnload(void* given) { return given == &module ? 0 : kInvalidValue; }
TQ_HIP_API int hipModuleGetFunction(void** function, void*, const char* name) {
  *function = own_symbol(name);
  return *function != nullptr ? 0 : kNotFound;
}
TQ_HIP_API int hipModuleGetGlobal(void** address, size_t* bytes, void*, const char* name) {
  *address = own_symbol(name);
  *bytes = sizeof(int);
  return *address != nullptr ? 0 : kNotFound;
}
TQ_HIP_API int hipModuleLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                     unsigned bz, unsigned, void*, void** arguments, void**) {
  static const bool seeded = [] {
    const char* seed = std::getenv("TQ_TEST_SEED");
    simt::set_seed(seed != nullptr ? static_cast<uint32_t>(std::strtoul(seed, nullptr, 10)) : 1);
    return true;
  }();
  static_cast<void>(seeded);
  if (gx == 0 || gy == 0 || gz == 0 || bx == 0) return kInvalidValue;
  simt::launch(reinterpret_cast<void (*)(const void*)>(function), arguments[0], {gx, gy, gz}, {bx, by, bz},
               tq_wave_size);
  return 0;
}
TQ_HIP_API const char* hipGetErrorName(int error) {
  return error == kNotFound ? "hipErrorNotFound" : "hipErrorInvalidValue";
}
TQ_HIP_API const char* hipGetErrorString(int error) {
  return error == kNotFound ? "named symbol not found" : "invalid argument";
}
