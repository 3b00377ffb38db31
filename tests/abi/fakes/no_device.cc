// no_device.cc - a kernel library whose device is missing on this machine.
#include "build_id.h"
#include "elf/build_note.h"
#include "kernels/kernels.h"

TQ_BUILD_NOTE(tq::kBuildId);

extern "C" __attribute__((visibility("default"))) const tq::KernelApi* tq_kernels_get_api() {
  static const tq::KernelApi api = [] {
    tq::KernelApi a = {};
    a.struct_size = sizeof(a);
    a.build_id = tq::kBuildId;
    a.device_kind = 2;
    a.probe = [] { return tq::KernelStatus{14, "no CUDA device: the driver library libcuda.so.1 is not installed"}; };
    return a;
  }();
  return &api;
}
