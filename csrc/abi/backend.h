// backend.h - a TqBackend: a kernel library, one device's state, and what they serve.
#pragma once

#include <string>

#include "abi/error.h"
#include "abi/validate.h"
#include "kernels/kernels.h"

struct TqBackend {
  const tq::KernelApi* kernels;
  tq::DeviceState* state;
  std::string library;

  // Block tables, lengths and slots of a CPU backend are host memory and can be checked.
  bool host_tables() const { return kernels->device_kind == TQ_DEVICE_CPU; }
};

namespace tq {

Status create_backend(const TqBackendOptions* options, TqBackend** out);
void destroy_backend(TqBackend* backend);
Status list_libraries(const char* given_dir, TqLibraryInfo* out, int64_t* count);
Status query_caps(const TqBackend& backend, TqCaps* out);
Status query_counters(const TqBackend& backend, TqCounters* out);

// Bits of check_layer: what a decoder layer may ask for that a backend cannot do.
Status check_layer(const TqBackend& backend, const TqLayerDesc* layer, uint64_t* unmet);
Status layer_supported(const TqBackend& backend, const CheckedLayer& layer);
const char* unmet_reason(int bit);

}  // namespace tq
