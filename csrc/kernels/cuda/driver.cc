// driver.cc - what can be known of the CUDA driver without initialising it. The only dlopen of a kernel library: the
// driver is the machine's, so linking it would keep the library from loading where there is none.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>

#include "kernels/cuda/device.h"

namespace tq::cuda {

KernelStatus unavailable(const char* format, const char* detail) {
  KernelStatus status = {kUnavailable, ""};
  std::snprintf(status.message, sizeof(status.message), format, detail);
  return status;
}

// Asked in processes that will fork, where the CUDA driver must not be initialised: through NVML, which is safe, or by
// device files where there is none.
KernelStatus probe() {
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) == nullptr) {
    return unavailable("no CUDA device can be used here: %s", "the driver library libcuda.so.1 is not installed");
  }
  void* nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (nvml == nullptr) {
    const bool device = access("/dev/nvidia0", F_OK) == 0 || access("/dev/dxg", F_OK) == 0;
    return device ? KernelStatus{0, ""}
                  : unavailable("no CUDA device can be used here: %s", "there is no /dev/nvidia0");
  }
  const auto init = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlInit_v2"));
  const auto shutdown = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlShutdown"));
  const auto device_count = reinterpret_cast<int (*)(unsigned*)>(dlsym(nvml, "nvmlDeviceGetCount_v2"));
  const auto driver = reinterpret_cast<int (*)(int*)>(dlsym(nvml, "nvmlSystemGetCudaDriverVersion_v2"));
  if (init == nullptr || shutdown == nullptr || device_count == nullptr || driver == nullptr || init() != 0) {
    return unavailable("no CUDA device can be used here: %s", "the driver's management library does not start");
  }
  unsigned count = 0;
  int version = 0;
  device_count(&count);
  driver(&version);
  shutdown();
  if (count == 0) return unavailable("no CUDA device can be used here: %s", "the driver reports none");
  if (version / 1000 < CUDART_VERSION / 1000) {
    char text[96];
    std::snprintf(text, sizeof(text), "the driver supports CUDA %d.%d, this build needs %d.0 or newer", version / 1000,
                  version % 1000 / 10, CUDART_VERSION / 1000);
    return unavailable("no CUDA device can be used here: %s", text);
  }
  return {0, ""};
}

}  // namespace tq::cuda
