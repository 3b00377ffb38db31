// cuda_runtime_api.h - the names that the GPU tests use, as functions of the libamdhip64 that the HIP kernel library
// uses too (TQ_HIP_LIBRARY, else ROCm's): with it the same tests run on the model of tests/simt, on an NVIDIA GPU
// through hip/on_cuda, and on AMD hardware. Where a function is missing, as graphs are in the model, a call gives an
// error.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdlib>
#include <initializer_list>

typedef int cudaError_t;
typedef struct HipStream* cudaStream_t;
typedef struct HipGraph* cudaGraph_t;
typedef struct HipGraphExec* cudaGraphExec_t;
constexpr int cudaSuccess = 0, cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2;
constexpr int cudaStreamCaptureModeGlobal = 0;
constexpr unsigned cudaStreamNonBlocking = 1;

namespace hip_names {

inline void* library() {
  static void* handle = [] {
    const char* named = std::getenv("TQ_HIP_LIBRARY");
    for (const char* name : {named, "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"}) {
      void* found = name != nullptr ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : nullptr;
      if (found != nullptr) return found;
    }
    return static_cast<void*>(nullptr);
  }();
  return handle;
}

template <class... Args>
int call(const char* name, Args... args) {
  const auto f = reinterpret_cast<int (*)(Args...)>(library() != nullptr ? dlsym(library(), name) : nullptr);
  return f != nullptr ? f(args...) : 801;  // hipErrorNotSupported
}

}  // namespace hip_names

inline const char* cudaGetErrorString(int error) {
  using Get = const char* (*)(int);
  const auto f = reinterpret_cast<Get>(
      hip_names::library() != nullptr ? dlsym(hip_names::library(), "hipGetErrorString") : nullptr);
  return f != nullptr ? f(error) : "there is no libamdhip64";
}
inline int cudaMalloc(void** p, size_t bytes) { return hip_names::call("hipMalloc", p, bytes); }
inline int cudaFree(void* p) { return hip_names::call("hipFree", p); }
inline int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  return hip_names::call(kind == cudaMemcpyHostToDevice ? "hipMemcpyHtoD" : "hipMemcpyDtoH", to,
                         const_cast<void*>(from), bytes);
}
inline int cudaDeviceSynchronize() { return hip_names::call("hipDeviceSynchronize"); }
inline int cudaStreamCreate(cudaStream_t* s) { return hip_names::call("hipStreamCreateWithFlags", s, 0u); }
inline int cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  return hip_names::call("hipStreamCreateWithFlags", s, flags);
}
inline int cudaStreamDestroy(cudaStream_t s) { return hip_names::call("hipStreamDestroy", s); }
inline int cudaStreamSynchronize(cudaStream_t s) { return hip_names::call("hipStreamSynchronize", s); }
inline int cudaStreamBeginCapture(cudaStream_t s, int mode) {
  return hip_names::call("hipStreamBeginCapture", s, mode);
}
inline int cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) { return hip_names::call("hipStreamEndCapture", s, g); }
inline int cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long flags) {
  return hip_names::call("hipGraphInstantiateWithFlags", e, g, flags);
}
inline int cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { return hip_names::call("hipGraphLaunch", e, s); }
inline int cudaGraphExecDestroy(cudaGraphExec_t e) { return hip_names::call("hipGraphExecDestroy", e); }
inline int cudaGraphDestroy(cudaGraph_t g) { return hip_names::call("hipGraphDestroy", g); }
