// wrong_build.cc - a kernel library of another build, which notices when code of it runs. TQ_FAKE_NOTE is the build id
// that its file names: its own, or this build's, as if an upgrade had replaced the file after it was read.
#include <cstdlib>

#include "build_id.h"
#include "elf/build_note.h"
#include "kernels/kernels.h"

TQ_BUILD_NOTE(TQ_FAKE_NOTE);

__attribute__((constructor)) static void run_at_load() { setenv("TQ_FAKE_CONSTRUCTED", "1", 1); }

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
