// api.cc - the one export of libtq_kernels_cpu.so: the private function table.
#include <cstdio>
#include <exception>
#include <new>

#include "build_id.h"
#include "elf/build_note.h"
#include "hwy/targets.h"
#include "kernels/cpu/attend_task.h"
#include "kernels/cpu/device.h"

namespace tq {
namespace {

// No exception leaves the library: what can throw in here is the standard library's allocator and its threads.
template <class F>
KernelStatus guarded(F&& f) noexcept {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return {kResourceExhausted, "the CPU kernel library could not allocate host memory for its task list or threads"};
  } catch (const std::exception&) {
    return {kInternal, "the CPU kernel library could not start its threads"};
  }
}

// This file is compiled for any x86-64, the ones under arch/ for SSE4.2 and better: they must not be entered on less.
KernelStatus probe() {
#if defined(__x86_64__)
  if ((hwy::SupportedTargets() & (HWY_SSE4 | HWY_AVX2 | HWY_AVX3 | HWY_AVX3_DL)) == 0) {
    return {kUnavailable,
            "this processor has no SSE4.2, which the CPU kernels need; any x86-64 processor since 2011 has it"};
  }
#endif
  return {0, ""};
}

KernelStatus create(int device_index, const ParallelFor* parallel_for, DeviceState** out) {
  return guarded([&]() -> KernelStatus {
    if (device_index != 0) {
      KernelStatus status = {kInvalidArgument, ""};
      std::snprintf(status.message, sizeof(status.message),
                    "options.device_index is %d; all cores of a machine are the one CPU device, 0", device_index);
      return status;
    }
    auto state = std::make_unique<DeviceState>();
    if (parallel_for != nullptr) {
      state->parallel_for = *parallel_for;
    } else {
      state->pool = std::make_unique<ThreadPool>(usable_cores());
      state->parallel_for = state->pool->parallel_for();
    }
    *out = state.release();
    return {0, ""};
  });
}

void destroy(DeviceState* state) { delete state; }

const char* device_name(const DeviceState*) { return cpu_target_name(); }

void counters(const DeviceState* s, KernelCounters* out) {
  *out = {s->store_calls, s->stored_tokens, s->attend_calls, s->query_tokens, s->compressed_kv_reads};
}

// Whatever csrc/abi lets through.
KernelStatus supports(const DeviceState*, const Format&, const PageLayout&) { return {0, ""}; }

KernelStatus store_kv(DeviceState* state, const StoreParams& p) {
  return guarded([&] { return cpu_store_kv(state, p); });
}
KernelStatus attend(DeviceState* state, const AttendParams& p) {
  return guarded([&] { return cpu_attend(state, p); });
}
KernelStatus dequant_kv(DeviceState* state, const DequantParams& p) {
  return guarded([&] { return cpu_dequant_kv(state, p); });
}
KernelStatus copy_pages(DeviceState* state, const CopyParams& p) {
  return guarded([&] { return cpu_copy_pages(state, p); });
}

KernelStatus rotate(DeviceState* state, const RotateParams& p) {
  return guarded([&] { return cpu_rotate(state, p); });
}

TQ_BUILD_NOTE(kBuildId);

constexpr KernelApi kApi = {
    sizeof(KernelApi),   kBuildId,  kCpuDevice, &probe,      &create,     &destroy, &device_name, &counters, &supports,
    &cpu_workspace_size, &store_kv, &attend,    &dequant_kv, &copy_pages, &rotate,
};

}  // namespace
}  // namespace tq

extern "C" __attribute__((visibility("default"))) const tq::KernelApi* tq_kernels_get_api() { return &tq::kApi; }
