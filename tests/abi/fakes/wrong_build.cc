// wrong_build.cc - a kernel library of another build.
#include "kernels/kernels.h"

extern "C" __attribute__((visibility("default"))) const tq::KernelApi* tq_kernels_get_api() {
  static const tq::KernelApi api = [] {
    tq::KernelApi a = {};
    a.struct_size = sizeof(a);
    a.build_id = "0.0.1-deadbeef";
    a.device_kind = 1;
    return a;
  }();
  return &api;
}
