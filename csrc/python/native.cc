// native.cc - the host half of the C ABI for Python: formats, planner, reference codec, library checks. No torch.
//
// Errors become ValueError, NotImplementedError or RuntimeError with the library's own sentence.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/narrow.h"
#include "tq_backend.h"

namespace py = pybind11;

namespace {

void raise_if(int32_t code, const TqError& error) {
  switch (code) {
    case TQ_OK:
      return;
    case TQ_INVALID_ARGUMENT:
    case TQ_NOT_FOUND:
      throw py::value_error(error.message);
    case TQ_UNIMPLEMENTED:
      PyErr_SetString(PyExc_NotImplementedError, error.message);
      throw py::error_already_set();
    default:
      throw std::runtime_error(error.message);
  }
}

const TqApi& api() {
  static const TqApi* table = [] {
    TqError error = {sizeof(TqError), 0, ""};
    const TqApi* found = tq_get_api(TQ_ABI_MAJOR, &error);
    if (found == nullptr) throw std::runtime_error(error.message);
    return found;
  }();
  return *table;
}

template <class F, class... Args>
void call(F function, Args... args) {
  TqError error = {sizeof(TqError), 0, ""};
  raise_if(function(args..., &error), error);
}

[[noreturn]] void fail(const std::string& sentence) { throw py::value_error(sentence); }

int32_t int32(const std::string& name, int64_t value) { return tq::narrow<int32_t>(name, value, fail); }

// A Python integer of any size.
int64_t int64(const std::string& name, const py::handle& value) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) {
    PyErr_Clear();
    fail(name + " is " + py::repr(value).cast<std::string>() + "; it must be an integer");
  }
  int overflow = 0;
  const int64_t out = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) fail(name + " is beyond 64 bits; no such number is served");
  return out;
}

template <class T>
T sized() {
  T value = {};
  value.struct_size = sizeof(T);
  return value;
}

py::dict to_dict(const TqFormatInfo& f) {
  py::dict d;
  d["format_id"] = f.format_id;
  d["name"] = f.name;
  d["key_bits"] = f.key_bits;
  d["value_bits"] = f.value_bits;
  d["test_only"] = f.test_only != 0;
  d["rotates_keys"] = f.rotates_keys != 0;
  return d;
}

TqFormatInfo find_format(const std::string& name) {
  auto info = sized<TqFormatInfo>();
  call(api().format_by_name, name.c_str(), &info);
  return info;
}

int32_t side_of(const std::string& name) {
  if (name == "key") return TQ_SIDE_KEY;
  if (name == "value") return TQ_SIDE_VALUE;
  throw py::value_error("side is '" + name + "'; it must be key or value");
}

py::list formats() {
  int64_t count = 0;
  call(api().list_formats, static_cast<TqFormatInfo*>(nullptr), &count);
  std::vector<TqFormatInfo> rows(static_cast<size_t>(count), sized<TqFormatInfo>());
  call(api().list_formats, rows.data(), &count);
  py::list out;
  for (const TqFormatInfo& row : rows) out.append(to_dict(row));
  return out;
}

py::dict codebook(const std::string& format, const std::string& side, int64_t head_dim, int64_t group) {
  auto args = sized<TqCodebookArgs>();
  args.format_id = find_format(format).format_id;
  args.side = side_of(side);
  args.head_dim = int32("head_dim", head_dim);
  args.group = int32("group", group);
  auto book = sized<TqCodebook>();
  call(api().codebook, &args, &book, static_cast<float*>(nullptr), static_cast<float*>(nullptr), int64_t{0});
  std::vector<float> levels(static_cast<size_t>(book.num_levels)), midpoints(levels.size());
  call(api().codebook, &args, &book, levels.data(), midpoints.data(), static_cast<int64_t>(levels.size()));
  midpoints.pop_back();
  py::dict d;
  d["num_groups"] = book.num_groups;
  d["first_dim"] = book.first_dim;
  d["num_dims"] = book.num_dims;
  d["bits"] = book.bits;
  d["levels"] = levels;
  d["midpoints"] = midpoints;
  return d;
}

using Rows = py::array_t<float, py::array::c_style | py::array::forcecast>;

Rows fake_quantize(const std::string& format, const std::string& side, const Rows& x) {
  if (x.ndim() != 2) {
    throw py::value_error("x has " + std::to_string(x.ndim()) + " dimensions; it must have 2, rows and head_dim");
  }
  Rows out({x.shape(0), x.shape(1)});
  auto args = sized<TqFakeQuantizeArgs>();
  args.format_id = find_format(format).format_id;
  args.side = side_of(side);
  args.head_dim = int32("head_dim", x.shape(1));
  args.num_rows = x.shape(0);
  args.in = x.data();
  args.out = out.mutable_data();
  call(api().fake_quantize, &args);
  return out;
}

TqLayerDesc make_layer(const std::string& format, int64_t num_kv_heads, int64_t head_dim, int64_t head_dim_v) {
  auto layer = sized<TqLayerDesc>();
  layer.format_id = find_format(format).format_id;
  layer.num_kv_heads = int32("num_kv_heads", num_kv_heads);
  layer.num_heads = layer.num_kv_heads;
  layer.head_dim = int32("head_dim", head_dim);
  layer.head_dim_v = int32("head_dim_v", head_dim_v);
  layer.dtype = TQ_DTYPE_F32;
  layer.attention_kind = TQ_ATTENTION_DECODER;
  return layer;
}

py::dict kv_cache_spec(const std::string& format, int64_t num_kv_heads, int64_t head_dim, int64_t head_dim_v) {
  const TqLayerDesc layer = make_layer(format, num_kv_heads, head_dim, head_dim_v);
  auto spec = sized<TqKvCacheSpec>();
  call(api().kv_cache_spec, &layer, &spec);
  py::dict d;
  d["format_id"] = spec.format_id;
  d["slot_bytes"] = spec.slot_bytes;
  d["bytes_per_token"] = spec.bytes_per_token;
  d["block_size_multiple"] = spec.block_size_multiple;
  d["alignment"] = spec.alignment;
  return d;
}

const char* strategy_name(int strategy) {
  return strategy == TQ_PLAN_UNIFORM        ? "uniform"
         : strategy == TQ_PLAN_SIDE_BY_SIDE ? "side_by_side"
         : strategy == TQ_PLAN_EQUAL_PAGES  ? "equal_pages"
                                            : "padded_pages";
}

// layers: dictionaries with the fields of TqPlanLayer, and format (a name, or None for the native cache) in place of
// its id; what is left out is 0, and -1 for kv_sharing_target.
py::dict plan_pages(const std::vector<py::dict>& layers, int64_t block_size, int64_t memory_bytes,
                    int64_t max_model_len, int64_t max_in_flight_tokens, int64_t max_block_size,
                    int64_t blocks_per_state, bool side_by_side) {
  std::vector<TqPlanLayer> descs;
  for (const py::dict& layer : layers) {
    auto name_of = [&](const char* key) { return "layers[" + std::to_string(descs.size()) + "]." + key; };
    auto get = [&](const char* key, int64_t otherwise) {
      return layer.contains(key) ? int64(name_of(key), layer[key]) : otherwise;
    };
    auto get_int32 = [&](const char* key, int64_t otherwise) { return int32(name_of(key), get(key, otherwise)); };
    auto desc = sized<TqPlanLayer>();
    if (layer.contains("format") && !layer["format"].is_none()) {
      if (!py::isinstance<py::str>(layer["format"])) {
        fail(name_of("format") + " is " + py::repr(layer["format"]).cast<std::string>() +
             "; it must be a format's name, or None");
      }
      desc.format_id = find_format(layer["format"].cast<std::string>()).format_id;
    }
    desc.native_bytes = get_int32("native_bytes", 0);
    desc.num_kv_heads = get_int32("num_kv_heads", 0);
    desc.head_dim = get_int32("head_dim", 0);
    desc.head_dim_v = get_int32("head_dim_v", 0);
    desc.sliding_window = get_int32("sliding_window", 0);
    const int32_t target = get_int32("kv_sharing_target", -1);
    desc.shares_pages = target == -1 ? 0 : 1;
    desc.kv_sharing_target = target == -1 ? 0 : target;
    desc.state_bytes = get("state_bytes", 0);
    descs.push_back(desc);
  }
  auto request = sized<TqPlanRequest>();
  request.block_size = int32("block_size", block_size);
  request.layers = descs.data();
  request.num_layers = static_cast<int64_t>(descs.size());
  request.memory_bytes = memory_bytes;
  request.max_model_len = max_model_len;
  request.max_in_flight_tokens = max_in_flight_tokens;
  request.max_block_size = int32("max_block_size", max_block_size);
  request.blocks_per_state = int32("blocks_per_state", blocks_per_state);
  request.side_by_side = side_by_side ? 1 : 0;
  std::vector<TqPagePlan> rows(descs.size(), sized<TqPagePlan>());
  auto count = static_cast<int64_t>(rows.size());
  auto summary = sized<TqPlanSummary>();
  call(api().plan_pages, &request, rows.data(), &count, &summary);
  py::list per_layer;
  for (const TqPagePlan& row : rows) {
    py::dict d;
    d["group"] = row.group;
    d["block_size"] = row.block_size;
    d["page_bytes"] = row.page_bytes;
    d["padding_bytes"] = row.padding_bytes;
    per_layer.append(d);
  }
  py::dict d;
  d["layers"] = per_layer;
  d["strategy"] = strategy_name(summary.strategy);
  d["num_groups"] = summary.num_groups;
  d["bytes_per_block"] = summary.bytes_per_block;
  d["num_blocks"] = summary.num_blocks;
  d["kv_tokens"] = summary.kv_tokens;
  d["blocks_per_sequence"] = summary.blocks_per_sequence;
  d["waste_bytes"] = summary.waste_bytes;
  d["longest_sequence"] = summary.longest_sequence;
  return d;
}

// kv_sharing_targets: of each layer the index of the one whose cache it reads, or -1.
std::vector<int32_t> align_skip_layers(const std::vector<int64_t>& kv_sharing_targets,
                                       const std::vector<int64_t>& skip_layers, int64_t boundary_layers) {
  const auto int32s = [](const std::string& name, const std::vector<int64_t>& values) {
    std::vector<int32_t> out;
    for (const int64_t value : values) out.push_back(int32(name + "[" + std::to_string(out.size()) + "]", value));
    return out;
  };
  const std::vector<int32_t> targets = int32s("kv_sharing_targets", kv_sharing_targets);
  const std::vector<int32_t> skipped = int32s("skip_layers", skip_layers);
  auto request = sized<TqSkipRequest>();
  request.boundary_layers = int32("boundary_layers", boundary_layers);
  request.kv_sharing_targets = targets.data();
  request.num_layers = static_cast<int64_t>(targets.size());
  request.skip_layers = skipped.data();
  request.num_skip_layers = static_cast<int64_t>(skipped.size());
  std::vector<int32_t> out(kv_sharing_targets.size());
  auto count = static_cast<int64_t>(out.size());
  call(api().align_skip_layers, &request, out.data(), &count);
  out.resize(static_cast<size_t>(count));
  return out;
}

const char* kind_name(int kind) { return kind == TQ_DEVICE_CPU ? "cpu" : kind == TQ_DEVICE_CUDA ? "cuda" : "hip"; }

py::list libraries(const std::optional<std::string>& kernels_dir) {
  int64_t count = 0;
  const char* dir = kernels_dir.has_value() ? kernels_dir->c_str() : nullptr;
  call(api().list_libraries, dir, static_cast<TqLibraryInfo*>(nullptr), &count);
  std::vector<TqLibraryInfo> rows(static_cast<size_t>(count), sized<TqLibraryInfo>());
  call(api().list_libraries, dir, rows.data(), &count);
  py::list out;
  for (const TqLibraryInfo& row : rows) {
    py::dict d;
    d["kind"] = kind_name(row.device_kind);
    d["usable"] = row.usable != 0;
    d["score"] = row.score;
    d["path"] = row.path;
    d["build_id"] = row.build_id;
    d["reason"] = row.reason;
    out.append(d);
  }
  return out;
}

int32_t number_of(const char* argument, const std::string& name,
                  std::initializer_list<std::pair<const char*, int32_t>> known) {
  std::string names;
  for (const auto& [one, number] : known) {
    if (name == one) return number;
    names.append(names.empty() ? "" : ", ").append(one);
  }
  fail(std::string(argument) + " is '" + name + "'; it must be one of " + names);
}

// What check_layer of a backend of this kind ("cpu", "cuda", "hip") finds unmet: a list of sentences, empty if all is
// served.
std::vector<std::string> unmet(const std::string& kind, const std::string& format, int64_t num_heads,
                               int64_t num_kv_heads, int64_t head_dim, int64_t head_dim_v,
                               const std::string& attention_kind) {
  TqLayerDesc layer = make_layer(format, num_kv_heads, head_dim, head_dim_v);
  layer.num_heads = int32("num_heads", num_heads);
  auto options = sized<TqBackendOptions>();
  options.device_kind =
      number_of("kind", kind, {{"cpu", TQ_DEVICE_CPU}, {"cuda", TQ_DEVICE_CUDA}, {"hip", TQ_DEVICE_HIP}});
  TqBackend* backend = nullptr;
  call(api().create_backend, &options, &backend);
  layer.attention_kind = number_of("attention_kind", attention_kind,
                                   {{"decoder", TQ_ATTENTION_DECODER},
                                    {"encoder", TQ_ATTENTION_ENCODER},
                                    {"cross", TQ_ATTENTION_CROSS},
                                    {"mla", TQ_ATTENTION_MLA}});
  uint64_t bits = 0;
  TqError error = {sizeof(TqError), 0, ""};
  const int32_t code = api().check_layer(backend, &layer, &bits, &error);
  api().destroy_backend(backend);
  raise_if(code, error);
  std::vector<std::string> out;
  for (int bit = 0; bit < 64; ++bit) {
    if ((bits >> bit & 1) != 0) out.emplace_back(api().unmet_reason(bit));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Formats, planner, reference codec and checks of libtq_backend.so.";
  m.def("abi_version", [] { return py::make_tuple(tq_abi_version() >> 16, tq_abi_version() & 0xffff); });
  m.def("build_id", [] { return std::string(api().build_id()); });
  m.def("formats", &formats, "All KV formats as dictionaries.");
  m.def("format_by_name", [](const std::string& name) { return to_dict(find_format(name)); }, py::arg("name"));
  m.def("codebook", &codebook, py::arg("format"), py::arg("side"), py::arg("head_dim"), py::arg("group") = 0,
        "Levels and decision thresholds of a codebook; see TqApi.codebook in tq_backend.h.");
  m.def("fake_quantize", &fake_quantize, py::arg("format"), py::arg("side"), py::arg("x"),
        "What float32 rows [rows, head_dim] read back as after a store; keys come back unrotated.");
  m.def("kv_cache_spec", &kv_cache_spec, py::arg("format"), py::arg("num_kv_heads"), py::arg("head_dim"),
        py::arg("head_dim_v") = 0);
  m.def("plan_pages", &plan_pages, py::arg("layers"), py::arg("block_size"), py::arg("memory_bytes"),
        py::arg("max_model_len") = 0, py::arg("max_in_flight_tokens") = 0, py::arg("max_block_size") = 0,
        py::arg("blocks_per_state") = 1, py::arg("side_by_side") = false,
        "Block sizes, page sizes and KV tokens of a model; see TqPlanRequest and TqPlanLayer in tq_backend.h.");
  m.def(
      "align_skip_layers", &align_skip_layers, py::arg("kv_sharing_targets"),
      py::arg("skip_layers") = std::vector<int32_t>(), py::arg("boundary_layers") = 0,
      "The layers that keep the native cache: those named, so many at both ends, and all that share a cache with one.");
  m.def("libraries", &libraries, py::arg("kernels_dir") = std::nullopt);
  m.def("unmet", &unmet, py::arg("kind"), py::arg("format"), py::arg("num_heads"), py::arg("num_kv_heads"),
        py::arg("head_dim"), py::arg("head_dim_v") = 0, py::arg("attention_kind") = "decoder");
}
