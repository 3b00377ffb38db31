// hip_runtime.cc - a libamdhip64 with one device that runs nothing. TQ_FAKE_HIP="hipInit=3 hipModuleLoadData=209" makes
// the functions that it names return these errors; "devices=0" sets the number of devices.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

#define TQ_HIP_API extern "C" __attribute__((visibility("default")))

namespace {

int setting(const char* name, int otherwise) {
  const char* text = std::getenv("TQ_FAKE_HIP");
  std::istringstream words(text != nullptr ? text : "");
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    if (word.substr(0, equals) == name) return std::atoi(word.c_str() + equals + 1);
  }
  return otherwise;
}

int device = 0, wave_size = 64, pending = 0;

}  // namespace

TQ_HIP_API int hipInit(unsigned) { return setting("hipInit", 0); }
TQ_HIP_API int hipGetDeviceCount(int* count) {
  *count = setting("devices", 1);
  return setting("hipGetDeviceCount", 0);
}
TQ_HIP_API int hipGetDevice(int* out) {
  *out = device;
  return 0;
}
TQ_HIP_API int hipSetDevice(int given) {
  device = given;
  return setting("hipSetDevice", 0);
}
TQ_HIP_API int hipDeviceGetName(char* name, int length, int) {
  std::snprintf(name, static_cast<size_t>(length), "Fake Instinct");
  return 0;
}
TQ_HIP_API int hipModuleLoadData(void** module, const void*) {
  *module = &device;
  return setting("hipModuleLoadData", 0);
}
TQ_HIP_API int hipModuleUnload(void*) { return 0; }
TQ_HIP_API int hipModuleGetFunction(void** function, void*, const char* name) {
  *function = &wave_size;
  return setting("hipModuleGetFunction", setting(name, 0));
}
TQ_HIP_API int hipModuleGetGlobal(void** address, size_t* bytes, void*, const char*) {
  *address = &wave_size;
  *bytes = sizeof(int);
  return setting("hipModuleGetGlobal", 0);
}
TQ_HIP_API int hipMemcpyDtoH(void* to, void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return setting("hipMemcpyDtoH", 0);
}
TQ_HIP_API int hipModuleLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                                     void**, void**) {
  return pending = setting("hipModuleLaunchKernel", 0);
}
TQ_HIP_API int hipStreamSynchronize(void*) { return setting("hipStreamSynchronize", 0); }
TQ_HIP_API int hipStreamIsCapturing(void*, int* status) {
  *status = 0;
  return 0;
}
TQ_HIP_API int hipGetLastError() {
  const int error = pending;
  pending = 0;
  return error;
}
TQ_HIP_API const char* hipGetErrorName(int error) {
  static char text[32];
  std::snprintf(text, sizeof(text), "hipError%d", error);
  return text;
}
TQ_HIP_API const char* hipGetErrorString(int) { return "the fake was told to fail"; }
// Of the tests: the sticky error that is left.
TQ_HIP_API int fakePendingError() { return pending; }
