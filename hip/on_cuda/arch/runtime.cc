// runtime.cc - libamdhip64 of a machine with an NVIDIA GPU: HIP's names over the CUDA runtime. The kernel library opens
// it by TQ_HIP_LIBRARY and runs unchanged; in place of AMD's code objects it gets kernels.hip as nvcc compiled it. For
// tests.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

#define TQ_HIP_API extern "C" __attribute__((visibility("default")))

asm(R"(
.section .rodata
.p2align 12
.globl tq_cuda_kernels
.hidden tq_cuda_kernels
tq_cuda_kernels:
.incbin ")" TQ_CUDA_KERNELS R"("
.previous
)");
extern "C" const char tq_cuda_kernels[];

TQ_HIP_API int hipInit(unsigned) { return 0; }
TQ_HIP_API int hipGetDeviceCount(int* count) { return cudaGetDeviceCount(count); }
TQ_HIP_API int hipGetDevice(int* device) { return cudaGetDevice(device); }
TQ_HIP_API int hipSetDevice(int device) { return cudaSetDevice(device); }
TQ_HIP_API int hipDeviceGetName(char* name, int length, int device) {
  cudaDeviceProp properties;
  if (const cudaError_t e = cudaGetDeviceProperties(&properties, device); e != cudaSuccess) return e;
  std::snprintf(name, static_cast<size_t>(length), "%s", properties.name);
  return 0;
}
TQ_HIP_API int hipModuleLoadData(void** module, const void*) {
  return cudaLibraryLoadData(reinterpret_cast<cudaLibrary_t*>(module), tq_cuda_kernels, nullptr, nullptr, 0, nullptr,
                             nullptr, 0);
}
TQ_HIP_API int hipModuleUnload(void* module) { return cudaLibraryUnload(static_cast<cudaLibrary_t>(module)); }
TQ_HIP_API int hipModuleGetFunction(void** function, void* module, const char* name) {
  return cudaLibraryGetKernel(reinterpret_cast<cudaKernel_t*>(function), static_cast<cudaLibrary_t>(module), name);
}
TQ_HIP_API int hipModuleGetGlobal(void** address, size_t* bytes, void* module, const char* name) {
  return cudaLibraryGetGlobal(address, bytes, static_cast<cudaLibrary_t>(module), name);
}
TQ_HIP_API int hipModuleLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                     unsigned bz, unsigned shared_bytes, void* stream, void** arguments, void**) {
  return cudaLaunchKernel(function, dim3(gx, gy, gz), dim3(bx, by, bz), arguments, shared_bytes,
                          static_cast<cudaStream_t>(stream));
}
TQ_HIP_API int hipMalloc(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
TQ_HIP_API int hipFree(void* p) { return cudaFree(p); }
TQ_HIP_API int hipMemcpyDtoH(void* to, void* from, size_t n) { return cudaMemcpy(to, from, n, cudaMemcpyDeviceToHost); }
TQ_HIP_API int hipMemcpyHtoD(void* to, void* from, size_t n) { return cudaMemcpy(to, from, n, cudaMemcpyHostToDevice); }
TQ_HIP_API int hipDeviceSynchronize() { return cudaDeviceSynchronize(); }
TQ_HIP_API int hipStreamSynchronize(void* s) { return cudaStreamSynchronize(static_cast<cudaStream_t>(s)); }
TQ_HIP_API int hipStreamIsCapturing(void* s, int* status) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  const int error = cudaStreamIsCapturing(static_cast<cudaStream_t>(s), &capturing);
  *status = capturing;
  return error;
}
TQ_HIP_API int hipStreamCreateWithFlags(void** s, unsigned flags) {
  return cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(s), flags);
}
TQ_HIP_API int hipStreamDestroy(void* s) { return cudaStreamDestroy(static_cast<cudaStream_t>(s)); }
TQ_HIP_API int hipStreamBeginCapture(void* s, int mode) {
  return cudaStreamBeginCapture(static_cast<cudaStream_t>(s), static_cast<cudaStreamCaptureMode>(mode));
}
TQ_HIP_API int hipStreamEndCapture(void* s, void** graph) {
  return cudaStreamEndCapture(static_cast<cudaStream_t>(s), reinterpret_cast<cudaGraph_t*>(graph));
}
TQ_HIP_API int hipGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long flags) {
  return cudaGraphInstantiate(reinterpret_cast<cudaGraphExec_t*>(exec), static_cast<cudaGraph_t>(graph), flags);
}
TQ_HIP_API int hipGraphLaunch(void* exec, void* s) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec), static_cast<cudaStream_t>(s));
}
TQ_HIP_API int hipGraphExecDestroy(void* exec) { return cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(exec)); }
TQ_HIP_API int hipGraphDestroy(void* graph) { return cudaGraphDestroy(static_cast<cudaGraph_t>(graph)); }
TQ_HIP_API int hipGetLastError() { return cudaGetLastError(); }
TQ_HIP_API const char* hipGetErrorName(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
TQ_HIP_API const char* hipGetErrorString(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
