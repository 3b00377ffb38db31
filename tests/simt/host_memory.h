// host_memory.h - the functions of libamdhip64 that need no device: memory of a stand-in whose device memory is host
// memory, and whose calls return when their work is done. Included by one file of each such stand-in.
#pragma once

#include <cstdlib>
#include <cstring>

#define TQ_HIP_API extern "C" __attribute__((visibility("default")))

TQ_HIP_API int hipMalloc(void** out, size_t bytes) {
  *out = std::aligned_alloc(256, (bytes + 256) / 256 * 256);
  return *out != nullptr ? 0 : 2;
}
TQ_HIP_API int hipFree(void* p) {
  std::free(p);
  return 0;
}
TQ_HIP_API int hipMemcpyDtoH(void* to, void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return 0;
}
TQ_HIP_API int hipMemcpyHtoD(void* to, void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return 0;
}
TQ_HIP_API int hipDeviceSynchronize() { return 0; }
TQ_HIP_API int hipStreamSynchronize(void*) { return 0; }
TQ_HIP_API int hipStreamIsCapturing(void*, int* status) {
  *status = 0;
  return 0;
}
TQ_HIP_API int hipGetLastError() { return 0; }
