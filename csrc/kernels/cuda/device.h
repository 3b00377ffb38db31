// device.h - the state of one CUDA backend, and what its calls share.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>

#include "kernels/kernels.h"

namespace tq {

struct DeviceState {
  int index = 0;
  char name[64] = {};
  int multiprocessors = 0;
  int shared_limit = 0;      // bytes of a block's dynamic shared memory
  bool hopper_code = false;  // the kernels were compiled for sm_90 or later: bulk copies, programmatic launches
  bool synchronous = false;  // TQ_SYNC=1: every call waits and reports its kernels' errors

  // Counters of arrived CTAs, zero between launches. A launch finds its own by its workspace, which by contract no
  // concurrent call uses.
  static constexpr int kCounterSets = 256;
  int* counters = nullptr;  // [kCounterSets][multiprocessors]
  std::mutex mutex;
  std::map<const void*, int> counter_set;
  std::set<const void*> prepared;  // kernels whose shared memory limit has been raised

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

KernelStatus supports(const DeviceState* state, const Format& format, const PageLayout& layout, int num_heads);
uint64_t workspace_size(const DeviceState* state, const PageLayout& layout, int num_heads, int64_t num_tokens,
                        int64_t num_seqs);
KernelStatus attend(DeviceState* state, const AttendParams& p);
KernelStatus store_kv(DeviceState* state, const StoreParams& p);
KernelStatus dequant_kv(DeviceState* state, const DequantParams& p);
KernelStatus copy_pages(DeviceState* state, const CopyParams& p);
KernelStatus rotate(DeviceState* state, const RotateParams& p);

}  // namespace cuda
}  // namespace tq
