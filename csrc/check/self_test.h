// self_test.h - numerical checks of every kernel instance on a device, through the public ABI: codes against the
// reference codec, attention against attention in double over the cache's own contents.
#pragma once

#include "tq_backend.h"

namespace tq::check {

// Prints one line per instance and a summary. device_kind: TqDeviceKind. Returns the number of checks that failed, or
// -1 if there is no such device.
int self_test(const TqApi& api, int device_kind);

}  // namespace tq::check
