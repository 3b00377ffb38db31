// api.cc - the two exported symbols and the function table. Marshals, and lets no exception out.
#include <algorithm>
#include <cstddef>
#include <exception>
#include <iterator>
#include <new>
#include <vector>

#include "abi/backend.h"
#include "abi/error.h"
#include "abi/structs.h"
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

constexpr int64_t kMaxLayers = 1 << 16;  // far beyond any model: a count above it is a caller's mistake

const char* api_build_id() { return kBuildId; }

TqFormatInfo format_info(const Format& format) {
  TqFormatInfo info = {};
  info.format_id = format.id;
  std::strncpy(info.name, format.name, sizeof(info.name) - 1);
  info.key_bits = format.key_bits;
  info.value_bits = format.value_bits;
  info.test_only = format.test_only ? 1 : 0;
  info.rotates_keys = format.rotates_keys() ? 1 : 0;
  return info;
}

int32_t api_list_formats(TqFormatInfo* out, int64_t* count, TqError* error) {
  return guarded(error, [&]() -> Status {
    const auto formats = all_formats();
    const auto number = static_cast<int64_t>(formats.size());
    Rows<TqFormatInfo> rows;
    TQ_RETURN_IF_ERROR(check_capacity(out, count, number, "formats"));
    TQ_RETURN_IF_ERROR(Rows<TqFormatInfo>::check("out", out, number, &rows));
    for (int64_t i = 0; !rows.empty() && i < number; ++i) write_struct(format_info(formats[i]), rows[i]);
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
      const Format* nearest = nearest_format(name);
      return {TQ_NOT_FOUND, std::string("there is no KV format '") + name + "'" +
                                (nearest != nullptr ? std::string("; did you mean '") + nearest->name + "'?" : ".") +
                                " Formats are " + known};
    }
    TQ_RETURN_IF_ERROR(check_struct_size("out", out));
    write_struct(format_info(*format), out);
    return {};
  });
}

// The format, side and head_dim of the functions of the codec, whose vectors are a page's.
Status check_codec_args(uint32_t format_id, int32_t side, int32_t head_dim, const Format** format) {
  TQ_RETURN_IF_ERROR(check_format(format_id, format));
  if (side != TQ_SIDE_KEY && side != TQ_SIDE_VALUE) {
    return invalid("args.side is " + std::to_string(side) + "; it must be TQ_SIDE_KEY (2) or TQ_SIDE_VALUE (3)");
  }
  return check_head_dim("args.head_dim", head_dim);
}

int32_t api_codebook(const TqCodebookArgs* given, TqCodebook* out, float* levels, float* midpoints, int64_t capacity,
                     TqError* error) {
  return guarded(error, [&]() -> Status {
    TqCodebookArgs args = {};
    const Format* format = nullptr;
    TQ_RETURN_IF_ERROR(read_struct("args", given, &args));
    TQ_RETURN_IF_ERROR(check_codec_args(args.format_id, args.side, args.head_dim, &format));
    TQ_RETURN_IF_ERROR(check_struct_size("out", out));
    const Codebook* found = args.side == TQ_SIDE_VALUE ? value_codebook(*format) : key_codebook(*format);
    if (found == nullptr) {
      return {TQ_NOT_FOUND, std::string("format ") + format->name + " has no codebook of " +
                                (args.side == TQ_SIDE_VALUE ? "values" : "keys") +
                                ": their codes are not indices of one"};
    }
    if (args.group != 0) {
      return invalid("args.group is " + std::to_string(args.group) + "; format " + format->name +
                     " has one group of dimensions, 0");
    }
    const Codebook& book = *found;
    if ((levels != nullptr || midpoints != nullptr) && capacity < book.num_levels) {
      return invalid("capacity is " + std::to_string(capacity) + "; levels and midpoints must have room for " +
                     std::to_string(book.num_levels) + " floats");
    }
    TqCodebook c = {};
    c.num_groups = 1;
    c.num_dims = args.head_dim;
    c.bits = book.bits;
    c.num_levels = book.num_levels;
    for (int i = 0; levels != nullptr && i < book.num_levels; ++i) {
      levels[i] = static_cast<float>(book.levels[i]) / book.scale;
    }
    if (midpoints != nullptr) std::copy_n(book.midpoints, book.num_levels - 1, midpoints);
    write_struct(c, out);
    return {};
  });
}

int32_t api_fake_quantize(const TqFakeQuantizeArgs* given, TqError* error) {
  return guarded(error, [&]() -> Status {
    TqFakeQuantizeArgs args = {};
    const Format* format = nullptr;
    TQ_RETURN_IF_ERROR(read_struct("args", given, &args));
    TQ_RETURN_IF_ERROR(check_codec_args(args.format_id, args.side, args.head_dim, &format));
    if (args.num_rows < 0) {
      return invalid("args.num_rows is " + std::to_string(args.num_rows) + "; it must not be negative");
    }
    if (args.num_rows > 0 && (args.in == nullptr || args.out == nullptr)) {
      return invalid("args.in or args.out is NULL; both must hold num_rows rows");
    }
    (args.side == TQ_SIDE_KEY ? fake_quantize_key : fake_quantize_value)(*format, args.head_dim, args.num_rows, args.in,
                                                                         args.out);
    return {};
  });
}

int32_t api_kv_cache_spec(const TqLayerDesc* layer, TqKvCacheSpec* out, TqError* error) {
  return guarded(error, [&]() -> Status {
    CheckedLayer checked = {};
    TQ_RETURN_IF_ERROR(check_layer_desc(layer, &checked));
    TQ_RETURN_IF_ERROR(check_struct_size("out", out));
    const TqLayerDesc& d = checked.desc;
    TqKvCacheSpec spec = {};
    spec.format_id = d.format_id;
    spec.slot_bytes = slot_bytes({checked.format, 0, d.num_kv_heads, d.head_dim, d.head_dim_v, 0, 0, -1});
    spec.block_size_multiple = kAtomTokens;
    spec.alignment = kPageAlignment;
    spec.bytes_per_token = int64_t{spec.slot_bytes} * d.num_kv_heads;
    write_struct(spec, out);
    return {};
  });
}

// A row of TqPlanRequest.layers as the planner has it.
Status read_plan_layer(const std::string& name, const TqPlanLayer* given, LayerSpec* out) {
  TqPlanLayer l = {};
  TQ_RETURN_IF_ERROR(read_struct(name, given, &l));
  if (l.shares_pages != 0 && l.shares_pages != 1) {
    return invalid(name + ".shares_pages is " + std::to_string(l.shares_pages) + "; it must be 0 or 1");
  }
  if (l.shares_pages == 1 && l.kv_sharing_target < 0) {
    return invalid(name + ".kv_sharing_target is " + std::to_string(l.kv_sharing_target) +
                   "; with shares_pages it must be the index of a layer");
  }
  if (l.shares_pages == 0 && l.kv_sharing_target != 0) {
    return invalid(name + ".kv_sharing_target is " + std::to_string(l.kv_sharing_target) +
                   "; without shares_pages it must be 0");
  }
  const int target = l.shares_pages == 1 ? l.kv_sharing_target : -1;
  if (l.state_bytes != 0) {
    *out = {nullptr, 0, 0, 0, 0, 0, l.state_bytes, target};
    return {};
  }
  const Format* format = nullptr;
  if (l.format_id != 0) {
    if (Status s = check_format(l.format_id, &format); !s.ok()) return {s.code, name + ": " + s.message};
  }
  *out = {format,
          format != nullptr ? 0 : l.native_bytes,
          l.num_kv_heads,
          l.head_dim,
          l.head_dim_v != 0 ? l.head_dim_v : l.head_dim,
          l.sliding_window,
          0,
          target};
  return {};
}

int32_t api_plan_pages(const TqPlanRequest* given, TqPagePlan* out, int64_t* count, TqPlanSummary* summary,
                       TqError* error) {
  return guarded(error, [&]() -> Status {
    TqPlanRequest request = {};
    TQ_RETURN_IF_ERROR(read_struct("request", given, &request));
    if (request.num_layers < 1 || request.num_layers > kMaxLayers || request.layers == nullptr) {
      return invalid("request.num_layers is " + std::to_string(request.num_layers) + "; there must be from 1 to " +
                     std::to_string(kMaxLayers) + " layers, and layers must point to them");
    }
    if (request.side_by_side != 0 && request.side_by_side != 1) {
      return invalid("request.side_by_side is " + std::to_string(request.side_by_side) + "; it must be 0 or 1");
    }
    Rows<TqPagePlan> rows;
    TQ_RETURN_IF_ERROR(check_capacity(out, count, request.num_layers, "layers"));
    TQ_RETURN_IF_ERROR(Rows<TqPagePlan>::check("out", out, request.num_layers, &rows));
    TQ_RETURN_IF_ERROR(check_struct_size("summary", summary));
    Rows<const TqPlanLayer> given_layers;
    TQ_RETURN_IF_ERROR(
        Rows<const TqPlanLayer>::check("request.layers", request.layers, request.num_layers, &given_layers));
    std::vector<LayerSpec> layers(static_cast<size_t>(request.num_layers));
    for (int64_t i = 0; i < request.num_layers; ++i) {
      const std::string name = "request.layers[" + std::to_string(i) + "]";
      TQ_RETURN_IF_ERROR(read_plan_layer(name, given_layers[i], &layers[static_cast<size_t>(i)]));
    }
    Plan plan;
    if (std::string sentence =
            plan_pages(layers,
                       {request.block_size, request.max_block_size, request.memory_bytes, request.max_model_len,
                        request.max_in_flight_tokens, request.blocks_per_state != 0 ? request.blocks_per_state : 1,
                        request.side_by_side == 1},
                       &plan);
        !sentence.empty()) {
      return invalid(sentence);
    }
    TqPlanSummary totals = {};
    totals.num_groups = plan.num_groups;
    totals.bytes_per_block = plan.bytes_per_block;
    totals.num_blocks = plan.num_blocks;
    totals.kv_tokens = plan.kv_tokens;
    totals.strategy = static_cast<int32_t>(plan.strategy);
    totals.blocks_per_sequence = plan.blocks_per_sequence;
    totals.waste_bytes = plan.waste_bytes;
    totals.longest_sequence = plan.longest_sequence;
    write_struct(totals, summary);
    for (int64_t i = 0; !rows.empty() && i < request.num_layers; ++i) {
      const LayerPlan& from = plan.layers[static_cast<size_t>(i)];
      TqPagePlan row = {};
      row.group = from.group;
      row.block_size = from.block_size;
      row.page_bytes = from.page_bytes;
      row.padding_bytes = from.padding_bytes;
      write_struct(row, rows[i]);
    }
    *count = request.num_layers;
    return {};
  });
}

int32_t api_align_skip_layers(const TqSkipRequest* given, int32_t* out, int64_t* count, TqError* error) {
  return guarded(error, [&]() -> Status {
    TqSkipRequest request = {};
    TQ_RETURN_IF_ERROR(read_struct("request", given, &request));
    if (request.num_layers < 1 || request.num_layers > kMaxLayers) {
      return invalid("request.num_layers is " + std::to_string(request.num_layers) + "; there must be from 1 to " +
                     std::to_string(kMaxLayers) + " layers");
    }
    if (request.num_skip_layers < 0 || (request.num_skip_layers > 0 && request.skip_layers == nullptr)) {
      return invalid("request.num_skip_layers is " + std::to_string(request.num_skip_layers) +
                     "; it must not be negative, and skip_layers must point to so many numbers");
    }
    TQ_RETURN_IF_ERROR(check_capacity(out, count, 0, "layers"));
    std::vector<int32_t> targets(static_cast<size_t>(request.num_layers), -1);
    if (request.kv_sharing_targets != nullptr) {
      std::copy_n(request.kv_sharing_targets, request.num_layers, targets.begin());
    }
    std::vector<int32_t> layers;
    if (std::string sentence =
            align_skip_layers(targets, {request.skip_layers, static_cast<size_t>(request.num_skip_layers)},
                              request.boundary_layers, &layers);
        !sentence.empty()) {
      return invalid(sentence);
    }
    const auto number = static_cast<int64_t>(layers.size());
    TQ_RETURN_IF_ERROR(check_capacity(out, count, number, "layers"));
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
    TQ_RETURN_IF_ERROR(need_backend(backend));
    return query_caps(*backend, out);
  });
}

int32_t api_query_counters(const TqBackend* backend, TqCounters* out, TqError* error) {
  return guarded(error, [&]() -> Status {
    TQ_RETURN_IF_ERROR(need_backend(backend));
    return query_counters(*backend, out);
  });
}

int32_t api_check_layer(const TqBackend* backend, const TqLayerDesc* layer, uint64_t* unmet, TqError* error) {
  return guarded(error, [&]() -> Status {
    TQ_RETURN_IF_ERROR(need_backend(backend));
    return check_layer(*backend, layer, unmet);
  });
}

const char* api_unmet_reason(int32_t bit) { return unmet_reason(bit); }

Status supported(const TqBackend& backend, const PagedCache& cache) {
  return from_kernel(backend.kernels->supports(backend.state, cache.format, cache.layout));
}

int32_t api_workspace_size(const TqBackend* backend, const TqLayerDesc* layer, uint64_t* bytes, TqError* error) {
  return guarded(error, [&]() -> Status {
    TQ_RETURN_IF_ERROR(need_backend(backend));
    if (bytes == nullptr) return invalid("bytes is NULL; it must point to the result");
    CheckedLayer checked = {};
    TQ_RETURN_IF_ERROR(check_layer_desc(layer, &checked));
    TQ_RETURN_IF_ERROR(layer_supported(*backend, checked));
    // The block size does not matter to the workspace; any valid one makes a layout.
    const TqLayerDesc& d = checked.desc;
    const PageLayout layout = make_page_layout(*checked.format, d.head_dim, d.head_dim_v, d.num_kv_heads, kAtomTokens);
    *bytes = backend->kernels->workspace_size(backend->state, layout, d.num_heads);
    return {};
  });
}

int32_t api_store_kv(TqBackend* backend, const TqStoreKvArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    TQ_RETURN_IF_ERROR(need_backend(backend));
    StoreParams params = {};
    TQ_RETURN_IF_ERROR(check_store(args, backend->host_tables(), &params));
    TQ_RETURN_IF_ERROR(supported(*backend, params.cache));
    return from_kernel(backend->kernels->store_kv(backend->state, params));
  });
}

int32_t api_attend(TqBackend* backend, const TqAttendArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    TQ_RETURN_IF_ERROR(need_backend(backend));
    AttendParams params = {};
    TQ_RETURN_IF_ERROR(check_attend(args, backend->host_tables(), &params));
    return from_kernel(backend->kernels->attend(backend->state, params));
  });
}

int32_t api_dequant_kv(TqBackend* backend, const TqDequantKvArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    TQ_RETURN_IF_ERROR(need_backend(backend));
    DequantParams params = {};
    TQ_RETURN_IF_ERROR(check_dequant(args, backend->host_tables(), &params));
    TQ_RETURN_IF_ERROR(supported(*backend, params.cache));
    return from_kernel(backend->kernels->dequant_kv(backend->state, params));
  });
}

int32_t api_copy_pages(TqBackend* backend, const TqCopyPagesArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    TQ_RETURN_IF_ERROR(need_backend(backend));
    CopyParams params = {};
    TQ_RETURN_IF_ERROR(check_copy(args, backend->host_tables(), &params));
    return from_kernel(backend->kernels->copy_pages(backend->state, params));
  });
}

int32_t api_rotate(TqBackend* backend, const TqRotateArgs* args, TqError* error) {
  return guarded(error, [&]() -> Status {
    TQ_RETURN_IF_ERROR(need_backend(backend));
    RotateParams params = {};
    CheckedLayer layer = {};
    TQ_RETURN_IF_ERROR(check_rotate(args, backend->host_tables(), &params, &layer));
    TQ_RETURN_IF_ERROR(layer_supported(*backend, layer));
    return from_kernel(backend->kernels->rotate(backend->state, params));
  });
}

constexpr TqApi kApi = {
    sizeof(TqApi),       TQ_ABI_MAJOR,        TQ_ABI_MINOR,         0,
    &api_build_id,       &api_list_formats,   &api_format_by_name,  &api_codebook,
    &api_fake_quantize,  &api_kv_cache_spec,  &api_plan_pages,      &api_align_skip_layers,
    &api_list_libraries, &api_create_backend, &api_destroy_backend, &api_query_caps,
    &api_query_counters, &api_check_layer,    &api_unmet_reason,    &api_workspace_size,
    &api_store_kv,       &api_attend,         &api_dequant_kv,      &api_copy_pages,
    &api_rotate,
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
TQ_PIN_SLOT(align_skip_layers, 7);
TQ_PIN_SLOT(list_libraries, 8);
TQ_PIN_SLOT(create_backend, 9);
TQ_PIN_SLOT(destroy_backend, 10);
TQ_PIN_SLOT(query_caps, 11);
TQ_PIN_SLOT(query_counters, 12);
TQ_PIN_SLOT(check_layer, 13);
TQ_PIN_SLOT(unmet_reason, 14);
TQ_PIN_SLOT(workspace_size, 15);
TQ_PIN_SLOT(store_kv, 16);
TQ_PIN_SLOT(attend, 17);
TQ_PIN_SLOT(dequant_kv, 18);
TQ_PIN_SLOT(copy_pages, 19);
TQ_PIN_SLOT(rotate, 20);
static_assert(TQ_API_SIZE_1_0 == offsetof(TqApi, rotate) + sizeof(TqApi::rotate), "1.0 ends with rotate");

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
