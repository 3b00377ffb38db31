// api.cc - the one export of libtq_kernels_hip.so: the private function table, and the device behind it.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "build_id.h"
#include "elf/build_note.h"
#include "hip/arch/bundle.h"
#include "hip/device.h"
#include "hip/instances.h"
#include "hip/topology.h"

namespace tq {
namespace hip {
namespace {

constexpr int kOutOfMemory = 2;  // hipErrorOutOfMemory

template <class... Text>
KernelStatus status_with(int code, const char* format, Text... text) {
  KernelStatus status = {code, ""};
  std::snprintf(status.message, sizeof(status.message), format, text...);
  return status;
}

KernelStatus no_device(const std::string& why) {
  return status_with(kUnavailable, "no HIP device can be used here: %s", why.c_str());
}

KernelStatus status_of(const Runtime& runtime, int error, const char* what) {
  if (error == 0) return {0, ""};
  runtime.last_error();  // a call that was refused leaves no sticky error behind
  return status_with(error == kOutOfMemory ? kResourceExhausted : kInternal, "%s failed: %s (%s)", what,
                     runtime.error_string(error), runtime.error_name(error));
}

// Asked in processes that will fork, where ROCm must not be started: the driver's own files say what there is.
KernelStatus probe_machine() {
  const char* reason = nullptr;
  if (!runtime_is_named()) {
    if (access("/dev/kfd", F_OK) != 0)
      return no_device("there is no /dev/kfd, so no amdgpu driver with compute support");
    if (access("/dev/kfd", R_OK | W_OK) != 0) {
      return no_device("this user may not open /dev/kfd; it belongs to the group render, or video");
    }
  }
  if (runtime(&reason) == nullptr) return no_device(reason);
  // HSA_OVERRIDE_GFX_VERSION makes a GPU pass for another one.
  if (!runtime_is_named() && std::getenv("HSA_OVERRIDE_GFX_VERSION") == nullptr) {
    if (const std::string missing = missing_target(gpus_of("/sys/class/kfd/kfd/topology"), kBundleTargets);
        !missing.empty()) {
      return no_device(missing);
    }
  }
  return {0, ""};
}

template <class F>
KernelStatus guarded(F&& f) noexcept {
  try {
    return f();
  } catch (const std::exception&) {
    return {kResourceExhausted, "host memory is exhausted"};
  }
}

KernelStatus probe() {
  return guarded([] { return probe_machine(); });
}

void destroy(DeviceState* state) {
  if (state == nullptr) return;
  if (state->module != nullptr) state->runtime->unload_module(state->module);
  delete state;
}

// All kernels and constants of the module.
KernelStatus find_kernels(DeviceState* state) {
  const Runtime& r = *state->runtime;
  KernelStatus status = {0, ""};
  auto find = [&](void** to, const char* name) {
    if (status.code == 0) status = status_of(r, r.get_function(to, state->module, name), name);
  };
  int format = 0, size = 0;
#define TQ_FIND_ROWS(name, F, lanes)                                   \
  find(&state->store[format][size], "tq_store_" #name "_" #lanes);     \
  find(&state->dequant[format][size], "tq_dequant_" #name "_" #lanes); \
  ++size;
#define TQ_FIND_ATTEND(name, F, dim) find(&state->attend[format][size++], "tq_attend_" #name "_" #dim);
#define TQ_FIND_FORMAT(name, F)        \
  size = 0;                            \
  TQ_HIP_LANES(TQ_FIND_ROWS, name, F)  \
  size = 0;                            \
  TQ_HIP_DIMS(TQ_FIND_ATTEND, name, F) \
  ++format;
  TQ_HIP_FORMATS(TQ_FIND_FORMAT)
  find(&state->rotate[0], "tq_rotate_4");
  find(&state->rotate[1], "tq_rotate_8");
  find(&state->rotate[2], "tq_rotate_16");
  find(&state->rotate[3], "tq_rotate_32");
  find(&state->merge, "tq_merge");
  find(&state->merge_rotated, "tq_merge_rotated");
  find(&state->copy_pages, "tq_copy_pages");
  if (status.code != 0) return status;
  void* address = nullptr;
  size_t bytes = 0;
  if (const int e = r.get_global(&address, &bytes, state->module, "tq_wave_size"); e != 0 || bytes != sizeof(int)) {
    return status_of(r, e != 0 ? e : 1, "reading the kernels' wave size");
  }
  return status_of(r, r.copy_to_host(&state->wave, address, sizeof(int)), "reading the kernels' wave size");
}

KernelStatus open_device(DeviceState* state) {
  const Runtime& r = *state->runtime;
  char name[40] = "AMD GPU";
  r.device_name(name, sizeof(name), state->index);
  if (const int e = r.load_module(&state->module, bundle()); e != 0) {
    state->module = nullptr;
    r.last_error();
    return status_with(kUnavailable, "%s cannot run these kernels, which were compiled for %s: %s (%s)", name,
                       kBundleTargets, r.error_string(e), r.error_name(e));
  }
  if (const KernelStatus s = find_kernels(state); s.code != 0) return s;
  std::snprintf(state->name, sizeof(state->name), "%s (wave%d)", name, state->wave);
  const char* sync = std::getenv("TQ_SYNC");
  state->synchronous = sync != nullptr && std::strcmp(sync, "1") == 0;
  return {0, ""};
}

KernelStatus create(int device_index, const ParallelFor*, DeviceState** out) {
  return guarded([&]() -> KernelStatus {
    const char* reason = nullptr;
    const Runtime* r = runtime(&reason);
    if (r == nullptr) return no_device(reason);
    int count = 0, e = r->init(0);
    if (e == 0) e = r->device_count(&count);
    if (e != 0) {
      r->last_error();
      return no_device(std::string(r->error_string(e)) + " (" + r->error_name(e) + ")");
    }
    if (device_index >= count) {
      return status_with(kUnavailable, "device_index is %d; this machine has %d HIP devices", device_index, count);
    }
    auto state = std::make_unique<DeviceState>();
    state->index = device_index;
    state->runtime = r;
    int before = 0;
    r->get_device(&before);
    e = r->set_device(device_index);
    if (e != 0) return status_of(*r, e, "choosing the HIP device");
    const KernelStatus status = open_device(state.get());
    if (status.code != 0 && state->module != nullptr) r->unload_module(state->module);
    r->set_device(before);
    if (status.code == 0) *out = state.release();
    return status;
  });
}

const char* device_name(const DeviceState* state) { return state->name; }

void counters(const DeviceState* s, KernelCounters* out) {
  // What a query read depends on lengths in device memory, which no call reads back: not counted here.
  *out = {s->store_calls, s->stored_tokens, s->attend_calls, s->query_tokens, 0};
}

// Runs f with the backend's device as the thread's.
template <class Params>
KernelStatus on_device(DeviceState* state, KernelStatus (*f)(DeviceState*, const Params&), const Params& p) noexcept {
  int before = 0;
  state->runtime->get_device(&before);
  if (before != state->index) state->runtime->set_device(state->index);
  const KernelStatus status = guarded([&] { return f(state, p); });
  if (before != state->index) state->runtime->set_device(before);
  return status;
}

}  // namespace

KernelStatus launch(DeviceState* state, void* function, Grid grid, int threads, const void* arguments, void* stream,
                    const char* what) {
  const Runtime& r = *state->runtime;
  void* args[] = {const_cast<void*>(arguments)};
  if (const int e =
          r.launch(function, grid.x, grid.y, grid.z, static_cast<unsigned>(threads), 1, 1, 0, stream, args, nullptr);
      e != 0) {
    return status_of(r, e, what);
  }
  if (!state->synchronous) return {0, ""};
  int capturing = 0;
  if (r.stream_is_capturing(stream, &capturing) == 0 && capturing != 0) return {0, ""};
  return status_of(r, r.synchronize_stream(stream), what);
}

}  // namespace hip

namespace {

TQ_BUILD_NOTE(kBuildId);

constexpr KernelApi kApi = {
    sizeof(KernelApi),
    kBuildId,
    kHipDevice,
    &hip::probe,
    &hip::create,
    &hip::destroy,
    &hip::device_name,
    &hip::counters,
    &hip::supports,
    &hip::workspace_size,
    [](DeviceState* s, const StoreParams& p) { return hip::on_device(s, &hip::store_kv, p); },
    [](DeviceState* s, const AttendParams& p) { return hip::on_device(s, &hip::attend, p); },
    [](DeviceState* s, const DequantParams& p) { return hip::on_device(s, &hip::dequant_kv, p); },
    [](DeviceState* s, const CopyParams& p) { return hip::on_device(s, &hip::copy_pages, p); },
    [](DeviceState* s, const RotateParams& p) { return hip::on_device(s, &hip::rotate, p); },
};

}  // namespace
}  // namespace tq

extern "C" __attribute__((visibility("default"))) const tq::KernelApi* tq_kernels_get_api() { return &tq::kApi; }
