#include "abi/backend.h"

#include <algorithm>
#include <iterator>

#include "abi/loader.h"
#include "abi/structs.h"

namespace tq {
namespace {

// One bit of check_layer each.
struct Requirement {
  bool (*unmet)(const TqLayerDesc&);
  const char* reason;
};
constexpr Requirement kRequirements[] = {
    {[](const TqLayerDesc& d) { return d.attention_kind == TQ_ATTENTION_MLA; },
     "MLA is not served: its cache is one latent vector that is key and value at once; use an fp8 cache for this "
     "model."},
    {[](const TqLayerDesc& d) {
       return d.attention_kind == TQ_ATTENTION_ENCODER || d.attention_kind == TQ_ATTENTION_CROSS;
     },
     "Encoder and cross attention are not served: leave these layers to the engine's own backend."},
    {[](const TqLayerDesc& d) {
       return !head_dim_served(d.head_dim) || (d.head_dim_v != 0 && !head_dim_served(d.head_dim_v));
     },
     "The head dimension is not served: it must be " TQ_HEAD_DIM_RULE "."},
    {[](const TqLayerDesc& d) { return d.num_kv_heads < 1 || d.num_heads < 1 || d.num_heads % d.num_kv_heads != 0; },
     "The head counts are not served: query heads must be a multiple of KV heads."},
    {[](const TqLayerDesc& d) { return find_format(d.format_id) == nullptr; },
     "The KV format is unknown to this version of tq-backend."},
    {[](const TqLayerDesc& d) {
       return d.dtype != TQ_DTYPE_F32 && d.dtype != TQ_DTYPE_F16 && d.dtype != TQ_DTYPE_BF16;
     },
     "The dtype is not served: it must be float32, float16 or bfloat16."},
};

}  // namespace

Status create_backend(const TqBackendOptions* given, TqBackend** out) {
  if (out == nullptr) return invalid("out is NULL; it must point to a TqBackend*");
  TqBackendOptions options = {};
  TQ_RETURN_IF_ERROR(read_struct("options", given, &options));
  if (options.device_kind != TQ_DEVICE_AUTO &&
      std::find(std::begin(kDeviceKinds), std::end(kDeviceKinds), options.device_kind) == std::end(kDeviceKinds)) {
    return invalid("options.device_kind is " + std::to_string(options.device_kind) +
                   "; it must be AUTO (0), CPU (1), CUDA (2) or HIP (3)");
  }
  if (options.device_index < 0) {
    return invalid("options.device_index is " + std::to_string(options.device_index) + "; it must not be negative");
  }
  ParallelFor parallel_for = {};
  if (options.parallel_for != nullptr) {
    TqParallelFor p = {};
    TQ_RETURN_IF_ERROR(read_struct("options.parallel_for", options.parallel_for, &p));
    if (p.run == nullptr)
      return invalid("options.parallel_for.run is NULL; pass no parallel_for to use the library's threads");
    if (p.num_threads < 1 || p.num_threads > 4096) {
      return invalid("options.parallel_for.num_threads is " + std::to_string(p.num_threads) +
                     "; it must be from 1 to 4096");
    }
    parallel_for = {p.num_threads, p.context, p.run};
  }
  std::string dir;
  if (Status s = kernels_dir(options.kernels_dir, &dir); !s.ok()) return s;
  if (options.device_kind == TQ_DEVICE_AUTO) {
    TQ_RETURN_IF_ERROR(choose_kind(dir, &options.device_kind));
  }
  // Now, and not in the first call that needs one: a child of a fork that came while another thread was computing them
  // would wait for ever.
  for (const Format& format : all_formats()) {
    key_codebook(format);
    value_codebook(format);
  }
  const Candidate chosen = examine(dir, options.device_kind);
  if (!chosen.status.ok()) return chosen.status;
  const KernelApi* kernels = chosen.kernels;
  DeviceState* state = nullptr;
  if (Status s = from_kernel(
          kernels->create(options.device_index, options.parallel_for != nullptr ? &parallel_for : nullptr, &state));
      !s.ok()) {
    return s;
  }
  *out = new TqBackend{kernels, state, chosen.path};
  return {};
}

void destroy_backend(TqBackend* backend) {
  if (backend == nullptr) return;
  backend->kernels->destroy(backend->state);
  delete backend;
}

Status list_libraries(const char* given_dir, TqLibraryInfo* out, int64_t* count) {
  constexpr int64_t kNumber = std::size(kDeviceKinds);
  TQ_RETURN_IF_ERROR(check_capacity(out, count, kNumber, "rows"));
  if (out == nullptr) {
    *count = kNumber;
    return {};
  }
  Rows<TqLibraryInfo> rows;
  TQ_RETURN_IF_ERROR(Rows<TqLibraryInfo>::check("out", out, kNumber, &rows));
  std::string dir;
  if (Status s = kernels_dir(given_dir, &dir); !s.ok()) return s;
  for (int64_t i = 0; i < kNumber; ++i) {
    const Candidate c = examine(dir, kDeviceKinds[i]);
    TqLibraryInfo row = {};
    row.device_kind = c.device_kind;
    copy_text(c.path, row.path);
    if (c.kernels != nullptr) copy_text(c.kernels->build_id, row.build_id);
    row.usable = c.status.ok() ? 1 : 0;
    row.score = c.score;
    copy_text(c.status.ok() ? "its build id matches and its device is there" : c.status.message, row.reason);
    write_struct(row, rows[i]);
  }
  *count = kNumber;
  return {};
}

Status query_caps(const TqBackend& backend, TqCaps* out) {
  TQ_RETURN_IF_ERROR(check_struct_size("out", out));
  TqCaps caps = {};
  caps.device_kind = backend.kernels->device_kind;
  copy_text(backend.library, caps.library);
  copy_text(backend.kernels->build_id, caps.build_id);
  copy_text(backend.kernels->device_name(backend.state), caps.device_name);
  write_struct(caps, out);
  return {};
}

Status query_counters(const TqBackend& backend, TqCounters* out) {
  TQ_RETURN_IF_ERROR(check_struct_size("out", out));
  KernelCounters from = {};
  backend.kernels->counters(backend.state, &from);
  TqCounters counters = {};
  counters.store_calls = from.store_calls;
  counters.stored_tokens = from.stored_tokens;
  counters.attend_calls = from.attend_calls;
  counters.query_tokens = from.query_tokens;
  counters.compressed_kv_reads = from.compressed_kv_reads;
  write_struct(counters, out);
  return {};
}

Status layer_supported(const TqBackend& backend, const CheckedLayer& layer) {
  const TqLayerDesc& d = layer.desc;
  const PageLayout layout = make_page_layout(*layer.format, d.head_dim, d.head_dim_v, d.num_kv_heads, kAtomTokens);
  return from_kernel(backend.kernels->supports(backend.state, *layer.format, layout));
}

Status check_layer(const TqBackend& backend, const TqLayerDesc* layer, uint64_t* unmet) {
  if (unmet == nullptr) return invalid("unmet is NULL; it must point to a bit mask");
  TqLayerDesc d = {};
  TQ_RETURN_IF_ERROR(read_struct("layer", layer, &d));
  uint64_t bits = 0;
  for (size_t i = 0; i < std::size(kRequirements); ++i) {
    if (kRequirements[i].unmet(d)) bits |= uint64_t{1} << i;
  }
  CheckedLayer checked = {};
  if (bits == 0 && check_layer_desc(layer, &checked).ok() && !layer_supported(backend, checked).ok()) {
    bits |= uint64_t{1} << std::size(kRequirements);
  }
  *unmet = bits;
  return {};
}

const char* unmet_reason(int bit) {
  if (bit == static_cast<int>(std::size(kRequirements))) {
    return "The kernel library of this device does not serve the layer; workspace_size gives the reason.";
  }
  return bit >= 0 && bit < static_cast<int>(std::size(kRequirements)) ? kRequirements[bit].reason : nullptr;
}

}  // namespace tq
