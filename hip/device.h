// device.h - the state of one HIP backend, and what its calls share.
#pragma once

#include <atomic>
#include <cstdint>

#include "hip/runtime.h"
#include "kernels/kernels.h"

namespace tq {

constexpr int kFormatCount = 7;  // of hip/instances.h

struct DeviceState {
  int index = 0;
  char name[64] = {};
  int wave = 0;              // lanes, of the code that runs here
  bool synchronous = false;  // TQ_SYNC=1: every call waits and reports its kernels' errors
  const hip::Runtime* runtime = nullptr;
  void* module = nullptr;

  // Functions of the module: formats as in hip/instances.h, then lanes or dimensions in ascending order.
  void* store[kFormatCount][4] = {};
  void* dequant[kFormatCount][4] = {};
  void* attend[kFormatCount][4] = {};
  void* rotate[4] = {};
  void* merge = nullptr;
  void* merge_rotated = nullptr;
  void* copy_pages = nullptr;

  std::atomic<uint64_t> store_calls{0};
  std::atomic<uint64_t> stored_tokens{0};
  std::atomic<uint64_t> attend_calls{0};
  std::atomic<uint64_t> query_tokens{0};
};

namespace hip {

struct Grid {
  unsigned x, y, z;
};
// Launches function(arguments). An error of its launch is reported here; with TQ_SYNC=1 the kernel's own too.
KernelStatus launch(DeviceState* state, void* function, Grid grid, int threads, const void* arguments, void* stream,
                    const char* what);

KernelStatus supports(const DeviceState* state, const Format& format, const PageLayout& layout);
uint64_t workspace_size(const DeviceState* state, const PageLayout& layout, int num_heads);
KernelStatus attend(DeviceState* state, const AttendParams& p);
KernelStatus store_kv(DeviceState* state, const StoreParams& p);
KernelStatus dequant_kv(DeviceState* state, const DequantParams& p);
KernelStatus copy_pages(DeviceState* state, const CopyParams& p);
KernelStatus rotate(DeviceState* state, const RotateParams& p);

}  // namespace hip
}  // namespace tq
