// api.cc - the two exported symbols and the function table. Marshals, and lets no exception out.
#include <algorithm>
#include <cstddef>
#include <exception>
#include <iterator>
#include <new>
#include <vector>

#include "abi/backend.h"
#include "abi/error.h"
#include "abi/validate.h"
#include "build_id.h"
#include "codec/lloyd_max.h"
#include "codec/reference.h"
#include "planner/planner.h"
#include "planner/skip_layers.h"
#include "tq_backend.h"

namespace tq {
namespace {

template <class F>
int32_t guarded(TqError* error, F&& f) noexcept {
  try {
    return report(f(), error);
  } catch (const std::bad_alloc&) {
    return report({TQ_RESOURCE_EXHAUSTED, "host memory is exhausted"}, error);
  } catch (const std::exception& e) {
    return report({TQ_INTERNAL, std::string("unexpected: ") + e.what()}, error);
  } catch (...) {
    return report({TQ_INTERNAL, "unexpected exception"}, error);
  }
}

Status need_backend(const TqBackend* backend) {
  return backend != nullptr ? Status() : invalid("backend is NULL; it must come from create_backend");
}

constexpr int64_t kMaxLayers = 1 << 20;  // far beyond any model: a count above it is a caller's mistake

const char* api_build_id() { return kBuildId; }

TqFormatInfo format_info(const Format& format) {
  TqFormatInfo info = {};
  info.format_id = format.id;
  std::strncpy(info.name, format.name, sizeof(info.name) - 1);
  info.key_bits = format.key_bits;
  info.value_bits = format.value_bits;
  info.test_only = format.test_only ? 1 : 0;
  return info;
}

int32_t api_list_formats(TqFormatInfo* out, int64_t* count, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (count == nullptr) return invalid("count is NULL; it must hold the capacity of out");
    const auto formats = all_formats();
    const auto number = static_cast<int64_t>(formats.size());
    if (out != nullptr && *count < number) {
      return invalid("*count is " + std::to_string(*count) + "; out must have room for " + std::to_string(number) +
                     " formats");
    }
    for (int64_t i = 0; out != nullptr && i < number; ++i) {
      if (Status s = write_struct("out[i]", format_info(formats[i]), sizeof(TqFormatInfo), &out[i]); !s.ok()) return s;
    }
    *count = number;
    return {};
  });
}

int32_t api_format_by_name(const char* name, TqFormatInfo* out, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (name == nullptr) return invalid("name is NULL; it must be a format name, for example turboquant_4bit_nc");
    const Format* format = find_format(std::string_view(name));
    if (format == nullptr) {
      std::string known;
      for (const Format& f : all_formats()) {
        if (!f.test_only) known += (known.empty() ? "" : ", ") + std::string(f.name);
      }
      return {TQ_NOT_FOUND, std::string("there is no KV format '") + name + "'; did you mean '" +
                                nearest_format(name).name + "'? Formats are " + known};
    }
    return write_struct("out", format_info(*format), sizeof(TqFormatInfo), out);
  });
}

int32_t api_codebook(uint32_t format_id, TqCodebook* out, TqError* error) {
  return guarded(error, [&]() -> Status {
    const Format* format;
    if (Status s = check_format(format_id, &format); !s.ok()) return s;
    if (!format->rotates_keys()) {
      return {TQ_NOT_FOUND,
              std::string("format ") + format->name + " has no codebook: its keys are not Lloyd-Max codes"};
    }
    const Codebook& book = format_codebook(format->key_bits);
    TqCodebook c = {};
    c.bits = book.bits;
    c.num_levels = book.num_levels;
    c.scale = book.scale;
    for (int i = 0; i < book.num_levels; ++i) c.levels[i] = book.levels[i];
    for (int i = 0; i + 1 < book.num_levels; ++i) c.midpoints[i] = book.midpoints[i];
    return write_struct("out", c, sizeof(TqCodebook), out);
  });
}

int32_t api_fake_quantize(uint32_t format_id, int32_t is_key, int32_t head_dim, int64_t num_rows, const float* in,
                          float* out, TqError* error) {
  return guarded(error, [&]() -> Status {
    const Format* format;
    if (Status s = check_format(format_id, &format); !s.ok()) return s;
    if (head_dim < kHeadDimMultiple || head_dim > kMaxHeadDim || head_dim % kHeadDimMultiple != 0) {
      return invalid("head_dim is " + std::to_string(head_dim) + "; it must be a multiple of 16 from 16 to 512");
    }
    if (num_rows < 0) return invalid("num_rows is " + std::to_string(num_rows) + "; it must not be negative");
    if (num_rows > 0 && (in == nullptr || out == nullptr))
      return invalid("in or out is NULL; both must hold num_rows rows");
    (is_key != 0 ? fake_quantize_key : fake_quantize_value)(*format, head_dim, num_rows, in, out);
    return {};
  });
}

int32_t api_kv_cache_spec(const TqLayerDesc* layer, TqKvCacheSpec* out, TqError* error) {
  return guarded(error, [&]() -> Status {
    CheckedLayer checked = {};
    if (Status s = check_layer_desc(layer, &checked); !s.ok()) return s;
    const TqLayerDesc& d = checked.desc;
    TqKvCacheSpec spec = {};
    spec.format_id = d.format_id;
    spec.slot_bytes = slot_bytes({checked.format, d.num_kv_heads, d.head_dim, d.head_dim_v, d.kv_sharing_target});
    spec.block_size_multiple = kAtomTokens;
    spec.alignment = kPageAlignment;
    spec.bytes_per_token = int64_t{spec.slot_bytes} * d.num_kv_heads;
    return write_struct("out", spec, sizeof(TqKvCacheSpec), out);
  });
}

int32_t api_plan_pages(const TqPlanRequest* given, TqPagePlan* out, int64_t* count, TqPlanSummary* summary,
                       TqError* error) {
  return guarded(error, [&]() -> Status {
    TqPlanRequest request = {};
    if (Status s = read_struct("request", given, sizeof(TqPlanRequest), &request); !s.ok()) return s;
    if (request.num_layers < 1 || request.layers == nullptr) {
      return invalid("request.num_layers is " + std::to_string(request.num_layers) +
                     "; there must be at least one layer, and layers must point to them");
    }
    if (count == nullptr) return invalid("count is NULL; it must hold the capacity of out");
    if (out != nullptr && *count < request.num_layers) {
      return invalid("*count is " + std::to_string(*count) + "; out must have room for " +
                     std::to_string(request.num_layers) + " layers");
    }
    std::vector<LayerSpec> layers;
    // The array's stride is the caller's own struct size, so that an older caller's array is walked rightly.
    const char* at = reinterpret_cast<const char*>(request.layers);
    for (int64_t i = 0; i < request.num_layers; ++i) {
      const auto* layer = reinterpret_cast<const TqLayerDesc*>(at);
      CheckedLayer checked = {};
      if (Status s = check_layer_desc(layer, &checked); !s.ok()) {
        return {s.code, "request.layers[" + std::to_string(i) + "]: " + s.message};
      }
      const TqLayerDesc& d = checked.desc;
      layers.push_back({checked.format, d.num_kv_heads, d.head_dim, d.head_dim_v, d.kv_sharing_target});
      at += layer->struct_size;
    }
    Plan plan;
    if (std::string sentence = plan_pages(layers, request.block_size, request.memory_bytes, &plan); !sentence.empty()) {
      return invalid(sentence);
    }
    TqPlanSummary totals = {};
    totals.num_groups = plan.num_groups;
    totals.bytes_per_block = plan.bytes_per_block;
    totals.num_blocks = plan.num_blocks;
    totals.kv_tokens = plan.kv_tokens;
    if (Status s = write_struct("summary", totals, sizeof(TqPlanSummary), summary); !s.ok()) return s;
    for (int64_t i = 0; out != nullptr && i < request.num_layers; ++i) {
      const LayerPlan& from = plan.layers[i];
      TqPagePlan row = {};
      row.group = from.group;
      row.block_size = from.block_size;
      row.page_bytes = from.page_bytes;
      row.padding_bytes = from.padding_bytes;
      if (Status s = write_struct("out[i]", row, sizeof(TqPagePlan), &out[i]); !s.ok()) return s;
    }
    *count = request.num_layers;
    return {};
  });
}

int32_t api_align_skip_layers(const TqSkipRequest* given, int32_t* out, int64_t* count, TqError* error) {
  return guarded(error, [&]() -> Status {
    TqSkipRequest request = {};
    if (Status s = read_struct("request", given, sizeof(TqSkipRequest), &request); !s.ok()) return s;
    if (request.num_layers < 1 || request.num_layers > kMaxLayers || request.kv_sharing_targets == nullptr) {
      return invalid("request.num_layers is " + std::to_string(request.num_layers) + "; there must be from 1 to " +
                     std::to_string(kMaxLayers) + " layers, and kv_sharing_targets must point to one number of each");
    }
    if (request.num_skip_layers < 0 || (request.num_skip_layers > 0 && request.skip_layers == nullptr)) {
      return invalid("request.num_skip_layers is " + std::to_string(request.num_skip_layers) +
                     "; it must not be negative, and skip_layers must point to so many numbers");
    }
    if (count == nullptr) return invalid("count is NULL; it must hold the capacity of out");
    std::vector<int32_t> layers;
    if (std::string sentence = align_skip_layers({request.kv_sharing_targets, static_cast<size_t>(request.num_layers)},
                                                 {request.skip_layers, static_cast<size_t>(request.num_skip_layers)},
                                                 request.boundary_layers, &layers);
        !sentence.empty()) {
      return invalid(sentence);
    }
    const auto number = static_cast<int64_t>(layers.size());
    if (out != nullptr && *count < number) {
      return invalid("*count is " + std::to_string(*count) + "; out must have room for " + std::to_string(number) +
                     " layers");
    }
    if (out != nullptr) std::copy(layers.begin(), layers.end(), out);
    *count = number;
    return {};
  });
}

int32_t api_list_libraries(const char* kernels_dir, TqLibraryInfo* out, int64_t* count, TqError* error) {
  return guarded(error, [&] { return list_libraries(kernels_dir, out, count); });
}

int32_t api_create_backend(const TqBackendOptions* options, TqBackend** out, TqError* error) {
  return guarded(error, [&] { return create_backend(options, out); });
}

void api_destroy_backend(TqBackend* backend) { destroy_backend(backend); }

int32_t api_query_caps(const TqBackend* backend, TqCaps* out, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (Status s = need_backend(backend); !s.ok()) return s;
    return query_caps(*backend, out);
  });
}

int32_t api_query_counters(const TqBackend* backend, TqCounters* out, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (Status s = need_backend(backend); !s.ok()) return s;
    return query_counters(*backend, out);
  });
}

int32_t api_check_layer(const TqBackend* backend, const TqLayerDesc* layer, uint64_t* unmet, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (Status s = need_backend(backend); !s.ok()) return s;
    return check_layer(*backend, layer, unmet);
  });
}

const char* api_unmet_reason(int32_t bit) { return unmet_reason(bit); }

Status supported(const TqBackend& backend, const PagedCache& cache, int num_heads) {
  return from_kernel(backend.kernels->supports(backend.state, cache.format, cache.layout, num_heads));
}

// The block size does not matter to the workspace; any valid one makes a layout.
uint64_t workspace_bytes(const TqBackend& backend, const CheckedLayer& layer, int64_t num_tokens, int64_t num_seqs) {
  const TqLayerDesc& d = layer.desc;
  const PageLayout layout = make_page_layout(*layer.format, d.head_dim, d.head_dim_v, d.num_kv_heads, kAtomTokens);
  return backend.kernels->workspace_size(backend.state, layout, d.num_heads, num_tokens, num_seqs);
}

int32_t api_workspace_size(const TqBackend* backend, const TqLayerDesc* layer, int64_t num_tokens, int64_t num_seqs,
                           uint64_t* bytes, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (Status s = need_backend(backend); !s.ok()) return s;
    if (bytes == nullptr) return invalid("bytes is NULL; it must point to the result");
    if (num_tokens < 0) return invalid("num_tokens is " + std::to_string(num_tokens) + "; it must not be negative");
    if (num_seqs < 0) return invalid("num_seqs is " + std::to_string(num_seqs) + "; it must not be negative");
    CheckedLayer checked = {};
    if (Status s = check_layer_desc(layer, &checked); !s.ok()) return s;
    if (Status s = layer_supported(*backend, checked); !s.ok()) return s;
    *bytes = workspace_bytes(*backend, checked, num_tokens, num_seqs);
    return {};
  });
}

int32_t api_store_kv(TqBackend* backend, const TqStoreKvArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (Status s = need_backend(backend); !s.ok()) return s;
    StoreParams params = {};
    if (Status s = check_store(args, backend->host_tables(), &params); !s.ok()) return s;
    if (Status s = supported(*backend, params.cache, params.cache.layout.num_kv_heads); !s.ok()) return s;
    return from_kernel(backend->kernels->store_kv(backend->state, params));
  });
}

int32_t api_attend(TqBackend* backend, const TqAttendArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (Status s = need_backend(backend); !s.ok()) return s;
    AttendParams params = {};
    CheckedLayer layer = {};
    if (Status s = check_attend(args, backend->host_tables(), &params, &layer); !s.ok()) return s;
    if (Status s = supported(*backend, params.cache, params.num_heads); !s.ok()) return s;
    const uint64_t needed = workspace_bytes(*backend, layer, params.num_tokens, params.num_seqs);
    if (params.workspace_bytes < needed) {
      return invalid("workspace_bytes is " + std::to_string(params.workspace_bytes) + "; this call needs at least " +
                     std::to_string(needed) + " (see workspace_size)");
    }
    return from_kernel(backend->kernels->attend(backend->state, params));
  });
}

int32_t api_dequant_kv(TqBackend* backend, const TqDequantKvArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (Status s = need_backend(backend); !s.ok()) return s;
    DequantParams params = {};
    if (Status s = check_dequant(args, backend->host_tables(), &params); !s.ok()) return s;
    if (Status s = supported(*backend, params.cache, params.cache.layout.num_kv_heads); !s.ok()) return s;
    return from_kernel(backend->kernels->dequant_kv(backend->state, params));
  });
}

int32_t api_copy_pages(TqBackend* backend, const TqCopyPagesArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    if (Status s = need_backend(backend); !s.ok()) return s;
    CopyParams params = {};
    if (Status s = check_copy(args, backend->host_tables(), &params); !s.ok()) return s;
    return from_kernel(backend->kernels->copy_pages(backend->state, params));
  });
}

constexpr TqApi kApi = {
    sizeof(TqApi),       TQ_ABI_MAJOR,         TQ_ABI_MINOR,        0,
    &api_build_id,       &api_list_formats,    &api_format_by_name, &api_codebook,
    &api_fake_quantize,  &api_kv_cache_spec,   &api_plan_pages,     &api_list_libraries,
    &api_create_backend, &api_destroy_backend, &api_query_caps,     &api_query_counters,
    &api_check_layer,    &api_unmet_reason,    &api_workspace_size, &api_store_kv,
    &api_attend,         &api_dequant_kv,      &api_copy_pages,     &api_align_skip_layers,
};

// Append-only: a slot that moves breaks every caller that was built before. Each pins one.
#define TQ_PIN_SLOT(member, index) static_assert(offsetof(TqApi, member) == 16 + (index) * sizeof(void*))
TQ_PIN_SLOT(build_id, 0);
TQ_PIN_SLOT(list_formats, 1);
TQ_PIN_SLOT(format_by_name, 2);
TQ_PIN_SLOT(codebook, 3);
TQ_PIN_SLOT(fake_quantize, 4);
TQ_PIN_SLOT(kv_cache_spec, 5);
TQ_PIN_SLOT(plan_pages, 6);
TQ_PIN_SLOT(list_libraries, 7);
TQ_PIN_SLOT(create_backend, 8);
TQ_PIN_SLOT(destroy_backend, 9);
TQ_PIN_SLOT(query_caps, 10);
TQ_PIN_SLOT(query_counters, 11);
TQ_PIN_SLOT(check_layer, 12);
TQ_PIN_SLOT(unmet_reason, 13);
TQ_PIN_SLOT(workspace_size, 14);
TQ_PIN_SLOT(store_kv, 15);
TQ_PIN_SLOT(attend, 16);
TQ_PIN_SLOT(dequant_kv, 17);
TQ_PIN_SLOT(copy_pages, 18);
TQ_PIN_SLOT(align_skip_layers, 19);
static_assert(sizeof(TqApi) == 16 + 20 * sizeof(void*), "append a TQ_PIN_SLOT for the new function");

}  // namespace
}  // namespace tq

extern "C" {

__attribute__((visibility("default"))) uint32_t tq_abi_version(void) { return TQ_ABI_MAJOR << 16 | TQ_ABI_MINOR; }

__attribute__((visibility("default"))) const TqApi* tq_get_api(uint32_t major, TqError* error) {
  if (major == TQ_ABI_MAJOR) return &tq::kApi;
  tq::guarded(error, [major]() -> tq::Status {
    return {TQ_UNIMPLEMENTED, "major is " + std::to_string(major) + "; this library serves major version " +
                                  std::to_string(TQ_ABI_MAJOR)};
  });
  return nullptr;
}
}
