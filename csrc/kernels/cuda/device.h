// device.h - the state of one CUDA backend, and what its calls share.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

#include "kernels/kernels.h"

namespace tq {

struct DeviceState {
  int index = 0;
  char name[64] = {};
  int multiprocessors = 0;   // that a decode launch uses
  int shared_limit = 0;      // bytes of a block's dynamic shared memory
  bool hopper_code = false;  // the kernels were compiled for sm_90 or later: bulk copies, programmatic launches
  bool synchronous = false;  // TQ_SYNC=1: every call waits and reports its kernels' errors
  // Kernels whose shared memory limit has been raised, then nulls. There is room for all; calls take no lock.
  std::array<std::atomic<const void*>, 128> prepared = {};

  std::atomic<uint64_t> store_calls{0};
  std::atomic<uint64_t> stored_tokens{0};
  std::atomic<uint64_t> attend_calls{0};
  std::atomic<uint64_t> query_tokens{0};
};

namespace cuda {

KernelStatus status_of(cudaError_t error, const char* what);
// One sentence; format has one %s, for detail.
KernelStatus unavailable(const char* format, const char* detail);
// KernelApi::probe.
KernelStatus probe();
// Launches function(arguments). An error of its launch is reported here; with TQ_SYNC=1 the kernel's own too.
KernelStatus launch(DeviceState* state, const void* function, dim3 grid, int threads, int shared_bytes, void* arguments,
                    void* stream, const char* what);

KernelStatus supports(const DeviceState* state, const Format& format, const PageLayout& layout);
uint64_t workspace_size(const DeviceState* state, const PageLayout& layout, int num_heads);
KernelStatus attend(DeviceState* state, const AttendParams& p);
KernelStatus store_kv(DeviceState* state, const StoreParams& p);
KernelStatus dequant_kv(DeviceState* state, const DequantParams& p);
KernelStatus copy_pages(DeviceState* state, const CopyParams& p);
KernelStatus rotate(DeviceState* state, const RotateParams& p);

}  // namespace cuda
}  // namespace tq
