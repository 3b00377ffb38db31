// long_reason.cc - a kernel library whose reason does not fit its field: snprintf cuts it, within a character for one
// of two values of TQ_FAKE_SHIFT.
#include <cstdio>
#include <cstdlib>
#include <string>

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
    a.probe = [] {
      const char* shift = std::getenv("TQ_FAKE_SHIFT");
      std::string reason(shift != nullptr ? std::atoi(shift) : 0, '-');
      for (int i = 0; i < 40; ++i) reason += " \xce\xbb\xce\xad\xce\xbe\xce\xb7";  // a Greek word of 8 bytes
      tq::KernelStatus status = {14, ""};
      std::snprintf(status.message, sizeof(status.message), "%s", reason.c_str());
      return status;
    };
    return a;
  }();
  return &api;
}
