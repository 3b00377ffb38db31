// api.cc - the one export of libtq_kernels_cuda.so: the private function table, and the device behind it.
//
// The CUDA runtime is linked statically and finds the driver by itself, so the library opens on a machine without one.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

#include "build_id.h"
#include "elf/build_note.h"
#include "kernels/cuda/decode_memory.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/instances.h"

namespace tq {
namespace cuda {

KernelStatus status_of(cudaError_t error, const char* what) {
  KernelStatus status = {0, ""};
  if (error == cudaSuccess) return status;
  status.code = error == cudaErrorMemoryAllocation ? kResourceExhausted : kInternal;
  std::snprintf(status.message, sizeof(status.message), "%s failed: %s (%s)", what, cudaGetErrorString(error),
                cudaGetErrorName(error));
  return status;
}

// Raises a kernel's limit of dynamic shared memory, once.
static KernelStatus prepare(DeviceState* state, const void* function, int shared_bytes) {
  if (shared_bytes <= 48 * 1024) return {0, ""};
  for (const auto& prepared : state->prepared) {
    const void* p = prepared.load(std::memory_order_acquire);
    if (p == function) return {0, ""};
    if (p == nullptr) break;
  }
  // The same limit whatever a call uses: the attribute is the kernel's, not the call's.
  const cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, state->shared_limit);
  if (error != cudaSuccess) return status_of(error, "raising a kernel's shared memory limit");
  for (auto& prepared : state->prepared) {  // another thread may do the same
    const void* p = nullptr;
    if (prepared.compare_exchange_strong(p, function) || p == function) break;
  }
  return {0, ""};
}

KernelStatus launch(DeviceState* state, const void* function, dim3 grid, int threads, int shared_bytes, void* arguments,
                    void* stream, const char* what) {
  if (const KernelStatus s = prepare(state, function, shared_bytes); s.code != 0) return s;
  // Kernels begin with wait_for_previous_grid(), so that this one's launch overlaps the end of what went before it.
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = state->hopper_code ? 1 : 0;
  void* args[] = {arguments};
  if (const cudaError_t error = cudaLaunchKernelExC(&config, function, args); error != cudaSuccess) {
    cudaGetLastError();  // a launch that was refused leaves no sticky error behind
    return status_of(error, what);
  }
  if (!state->synchronous) return {0, ""};
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(config.stream, &capturing) == cudaSuccess && capturing != cudaStreamCaptureStatusNone) {
    return {0, ""};
  }
  return status_of(cudaStreamSynchronize(config.stream), what);
}

}  // namespace cuda

namespace {

using cuda::unavailable;

// Whether a device can run this library's kernels: asked of a kernel, not of a version number.
KernelStatus check_device(int index) {
  cudaDeviceProp properties;
  if (const cudaError_t e = cudaGetDeviceProperties(&properties, index); e != cudaSuccess) {
    cudaGetLastError();
    return unavailable("the CUDA device cannot be asked for its properties: %s", cudaGetErrorString(e));
  }
  if (properties.major * 10 + properties.minor < 75) {
    char text[64];
    std::snprintf(text, sizeof(text), "%d.%d", properties.major, properties.minor);
    return unavailable("the CUDA device has compute capability %s; the kernels need 7.5 (Turing) or newer", text);
  }
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(index);
  cudaFuncAttributes attributes;
  const cudaError_t e = cudaFuncGetAttributes(&attributes, cuda::copy_pages_function());
  cudaGetLastError();
  cudaSetDevice(before);
  if (e != cudaSuccess) {
    return unavailable("this build of the CUDA kernels does not run on this device or driver: %s",
                       cudaGetErrorString(e));
  }
  return {0, ""};
}

void destroy(DeviceState* state) { delete state; }

KernelStatus create(int device_index, const ParallelFor*, DeviceState** out) {
  int count = 0;
  if (const cudaError_t e = cudaGetDeviceCount(&count); e != cudaSuccess) {
    return unavailable("no CUDA device can be used here: %s", cudaGetErrorString(e));
  }
  if (device_index >= count) {
    char text[96];
    std::snprintf(text, sizeof(text), "device_index is %d; this machine has %d CUDA devices", device_index, count);
    return unavailable("%s", text);
  }
  if (const KernelStatus s = check_device(device_index); s.code != 0) return s;
  std::unique_ptr<DeviceState> state;
  try {
    state = std::make_unique<DeviceState>();
  } catch (const std::exception&) {
    return {kResourceExhausted, "host memory is exhausted"};
  }
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, device_index);
  state->index = device_index;
  std::snprintf(state->name, sizeof(state->name), "%.40s (sm_%d%d)", properties.name, properties.major,
                properties.minor);
  state->multiprocessors = std::min(properties.multiProcessorCount, cuda::kMaxCtas);
  state->shared_limit = static_cast<int>(properties.sharedMemPerBlockOptin) - cuda::kStaticSharedBytes;
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_index);
  // Of the code that runs here, not of the device: it may be PTX for an older one.
  cudaFuncAttributes attributes = {};
  state->hopper_code =
      cudaFuncGetAttributes(&attributes, cuda::copy_pages_function()) == cudaSuccess && attributes.ptxVersion >= 90;
  const char* sync = std::getenv("TQ_SYNC");
  state->synchronous = sync != nullptr && std::strcmp(sync, "1") == 0;
  cudaSetDevice(before);
  *out = state.release();
  return {0, ""};
}

const char* device_name(const DeviceState* state) { return state->name; }

void counters(const DeviceState* s, KernelCounters* out) {
  // What a query read depends on lengths in device memory, which no call reads back: not counted here.
  *out = {s->store_calls, s->stored_tokens, s->attend_calls, s->query_tokens, 0};
}

// No exception leaves the library.
template <class F>
KernelStatus on_device(DeviceState* state, F&& f) noexcept {
  int before = 0;
  cudaGetDevice(&before);
  if (before != state->index) cudaSetDevice(state->index);
  KernelStatus status;
  try {
    status = f();
  } catch (const std::exception&) {
    status = {kResourceExhausted, "host memory is exhausted"};
  }
  if (before != state->index) cudaSetDevice(before);
  return status;
}

KernelStatus store_kv(DeviceState* state, const StoreParams& p) {
  return on_device(state, [&] { return cuda::store_kv(state, p); });
}
KernelStatus attend(DeviceState* state, const AttendParams& p) {
  return on_device(state, [&] { return cuda::attend(state, p); });
}
KernelStatus dequant_kv(DeviceState* state, const DequantParams& p) {
  return on_device(state, [&] { return cuda::dequant_kv(state, p); });
}
KernelStatus copy_pages(DeviceState* state, const CopyParams& p) {
  return on_device(state, [&] { return cuda::copy_pages(state, p); });
}

KernelStatus rotate(DeviceState* state, const RotateParams& p) {
  return on_device(state, [&] { return cuda::rotate(state, p); });
}

TQ_BUILD_NOTE(kBuildId);

constexpr KernelApi kApi = {
    sizeof(KernelApi), kBuildId,     kCudaDevice, &cuda::probe,    &create,
    &destroy,          &device_name, &counters,   &cuda::supports, &cuda::workspace_size,
    &store_kv,         &attend,      &dequant_kv, &copy_pages,     &rotate,
};

}  // namespace
}  // namespace tq

extern "C" __attribute__((visibility("default"))) const tq::KernelApi* tq_kernels_get_api() { return &tq::kApi; }
