// some_device.cc - a kernel library of kind TQ_FAKE_KIND whose device is there, unless TQ_FAKE_BROKEN names its kind.
#include <cstdlib>

#include "build_id.h"
#include "elf/build_note.h"
#include "kernels/kernels.h"
#include "tq_backend.h"

TQ_BUILD_NOTE(tq::kBuildId);

extern "C" __attribute__((visibility("default"))) const tq::KernelApi* tq_kernels_get_api() {
  static const tq::KernelApi api = [] {
    tq::KernelApi a = {};
    a.struct_size = sizeof(a);
    a.build_id = tq::kBuildId;
    a.device_kind = TQ_FAKE_KIND;
    a.probe = [] {
      const char* broken = std::getenv("TQ_FAKE_BROKEN");
      const bool is_broken = broken != nullptr && std::atoi(broken) == TQ_FAKE_KIND;
      return is_broken ? tq::KernelStatus{14, "its device was unplugged"} : tq::KernelStatus{0, ""};
    };
    a.create = [](int, const tq::ParallelFor*, tq::DeviceState** out) {
      *out = reinterpret_cast<tq::DeviceState*>(0x1000);
      return tq::KernelStatus{0, ""};
    };
    a.destroy = [](tq::DeviceState*) {};
    a.device_name = [](const tq::DeviceState*) { return "a fake"; };
    return a;
  }();
  return &api;
}
