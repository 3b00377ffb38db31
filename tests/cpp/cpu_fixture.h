// cpu_fixture.h - the CPU kernel library, opened as the loader does, and one device of it.
#pragma once

#include <dlfcn.h>

#include "attention_case.h"

namespace tq::testing {

inline const KernelApi& cpu_kernels() {
  static const KernelApi* api = [] {
    void* handle = dlopen(TQ_KERNELS_CPU_PATH, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      ADD_FAILURE() << dlerror();
      std::abort();
    }
    return reinterpret_cast<TqKernelsGetApi>(dlsym(handle, "tq_kernels_get_api"))();
  }();
  return *api;
}

class CpuDevice {
 public:
  explicit CpuDevice(const ParallelFor* pool = nullptr) {
    const KernelStatus status = cpu_kernels().create(0, pool, &state_);
    EXPECT_EQ(status.code, 0) << status.message;
  }
  ~CpuDevice() { cpu_kernels().destroy(state_); }
  DeviceState* get() { return state_; }
  KernelCounters counters() const {
    KernelCounters out;
    cpu_kernels().counters(state_, &out);
    return out;
  }

 private:
  DeviceState* state_ = nullptr;
};

// Runs the case on the CPU kernels; see worst_error.
template <class AnyCase>
double run_and_compare(AnyCase&& test, DeviceState* device) {
  const Config& c = test.c;
  const uint64_t bytes = cpu_kernels().workspace_size(device, test.layout, c.num_heads);
  AlignedBytes workspace(bytes, 0xff);
  const KernelStatus status = cpu_kernels().attend(device, test.params(workspace.data(), bytes));
  EXPECT_EQ(status.code, 0) << status.message;
  return test.worst_error();
}

// Largest error relative to the largest output of a row: float arithmetic with 15-bit queries and weights, and one
// rounding of the output.
inline double tolerance(Dtype dtype) { return dtype == Dtype::kF32 ? 1e-3 : dtype == Dtype::kF16 ? 2e-3 : 1e-2; }

}  // namespace tq::testing
