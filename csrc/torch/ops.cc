// ops.cc - the kernels as LibTorch operators, through the stable ABI: one binary for every torch from 2.10 on.
//
// Checks what only torch knows (rank, dtype, device, contiguity), then hands pointers to the C ABI, whose sentences
// become the exceptions' texts. Tensors: query, out [tokens, heads, head_dim], key, value [tokens, kv_heads, head_dim],
// float32, float16 or bfloat16 with a contiguous last dimension; pages uint8 [blocks, ...], each block one contiguous
// run of bytes; slot_mapping int64 [tokens]; query_start_loc int32 [seqs + 1]; seq_lens int32 [seqs]; block_table int32
// [seqs, blocks]; spans int32 [seqs, max_spans, 2]. All tensors of a call are on one device, the CPU or a GPU; on a GPU
// the work goes onto torch's current stream of it. A device_index is a GPU's, or -1 for the CPU.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/narrow.h"
#include "tq_backend.h"

// libtorch_cuda.so and libtorch_hip.so export it under this one name; null in a torch built for CPUs only.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& sentence) { throw std::runtime_error("tq_backend: " + sentence); }

int32_t int32(const char* name, int64_t value) { return tq::narrow<int32_t>(name, value, fail); }

const TqApi& api() {
  static const TqApi* table = [] {
    TqError error = {sizeof(TqError), 0, ""};
    const TqApi* found = tq_get_api(TQ_ABI_MAJOR, &error);
    if (found == nullptr) fail(error.message);
    return found;
  }();
  return *table;
}

// Calls an ABI function and throws its sentence.
template <class F, class... Args>
void call(F function, Args... args) {
  TqError error = {sizeof(TqError), 0, ""};
  if (function(args..., &error) != TQ_OK) fail(error.message);
}

// The process's CPU backend, on torch's own threads: the engine has already bound them to cores.
TqBackend* cpu_backend() {
  static TqBackend* backend = [] {
    static TqParallelFor pool = {};
    pool.struct_size = sizeof(pool);
    pool.num_threads = int32("torch's number of threads", torch::stable::get_num_threads());
    pool.run = [](void*, int64_t count, void (*task)(void*, int64_t), void* arg) {
      torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) task(arg, i);
      });
    };
    TqBackendOptions options = {};
    options.struct_size = sizeof(options);
    options.device_kind = TQ_DEVICE_CPU;
    options.parallel_for = &pool;
    TqBackend* made = nullptr;
    call(api().create_backend, &options, &made);
    return made;
  }();
  return backend;
}

// What torch calls "cuda" here: its ROCm builds use that name for AMD's GPUs.
int32_t gpu_kind() {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    fail("this torch was built for CPUs only; tensors and a device_index of a GPU need one built for CUDA or ROCm");
  }
  static const int32_t kind = [] {
    Dl_info library = {};
    const bool found = dladdr(reinterpret_cast<const void*>(&aoti_torch_get_current_cuda_stream), &library) != 0;
    const bool rocm =
        found && library.dli_fname != nullptr && std::strstr(library.dli_fname, "libtorch_hip") != nullptr;
    return rocm ? TQ_DEVICE_HIP : TQ_DEVICE_CUDA;
  }();
  return kind;
}

// One backend per GPU, made on first use. An engine asks for workspace_size() before it captures a CUDA graph, so none
// is made during a capture.
TqBackend* gpu_backend(int32_t device_index) {
  static std::mutex mutex;
  static std::map<int32_t, TqBackend*> backends;
  const std::lock_guard<std::mutex> lock(mutex);
  TqBackend*& backend = backends[device_index];
  if (backend == nullptr) {
    TqBackendOptions options = {};
    options.struct_size = sizeof(options);
    options.device_kind = gpu_kind();
    options.device_index = device_index;
    call(api().create_backend, &options, &backend);
  }
  return backend;
}

TqBackend* backend_of(int64_t device_index) {
  if (device_index == -1) return cpu_backend();
  if (device_index < 0 || device_index > std::numeric_limits<int8_t>::max()) {
    fail("device_index is " + std::to_string(device_index) + "; it must be -1 for the CPU, or a GPU's index");
  }
  return gpu_backend(static_cast<int32_t>(device_index));
}

// The device of a call: where its first tensor is.
struct Place {
  const char* tensor;
  bool is_gpu;
  int32_t index;  // of the GPU
};

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "the CPU";
  return t.is_cuda() ? "GPU " + std::to_string(t.get_device_index()) : "neither the CPU nor a CUDA or ROCm device";
}

Place place_of(const char* name, const Tensor& t) {
  if (!t.is_cpu() && !t.is_cuda()) fail(std::string(name) + " is on " + device_text(t));
  return {name, t.is_cuda(), t.is_cuda() ? t.get_device_index() : -1};
}

void need_place(const Place& place, const char* name, const Tensor& t) {
  if (place.is_gpu ? t.is_cuda() && t.get_device_index() == place.index : t.is_cpu()) return;
  fail(std::string(name) + " is on " + device_text(t) + " and " + place.tensor + " on " +
       (place.is_gpu ? "GPU " + std::to_string(place.index) : "the CPU") + "; they must be on one device");
}

// What a launch needs: the backend, torch's stream, and the device made the current one for as long as this lives.
class Launch {
 public:
  explicit Launch(const Place& place) : backend(backend_of(place.index)) {
    if (!place.is_gpu) return;
    device_.emplace(place.index);
    if (aoti_torch_get_current_cuda_stream(place.index, &stream) != AOTI_TORCH_SUCCESS) {
      fail("torch gave no current stream of GPU " + std::to_string(place.index));
    }
  }

  TqBackend* backend;
  void* stream = nullptr;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> device_;
};

int32_t dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return TQ_DTYPE_F32;
    case ScalarType::Half:
      return TQ_DTYPE_F16;
    case ScalarType::BFloat16:
      return TQ_DTYPE_BF16;
    default:
      fail(std::string(name) + " has another dtype than float32, float16 or bfloat16");
  }
}

void need(const Place& place, const char* name, const Tensor& t, int64_t rank, ScalarType type, const char* type_name) {
  need_place(place, name, t);
  if (t.dim() != rank) {
    fail(std::string(name) + " has " + std::to_string(t.dim()) + " dimensions; it must have " + std::to_string(rank));
  }
  if (t.scalar_type() != type) fail(std::string(name) + " has another dtype than " + type_name);
  if (rank > 0 && t.numel() > 1 && t.stride(rank - 1) != 1) {
    fail(std::string(name) + " is strided in its last dimension; it must be contiguous there");
  }
}

void need_heads(const Place& place, const char* name, const Tensor& t, int32_t dtype) {
  if (dtype_of(name, t) != dtype)
    fail(std::string(name) + " has another dtype than the other tensors; they must agree");
  need(place, name, t, 3, t.scalar_type(), "itself");
}

void need_size(const char* name, const Tensor& t, int64_t dim, int64_t size) {
  if (t.size(dim) != size) {
    fail(std::string(name) + " has size " + std::to_string(t.size(dim)) + " in dimension " + std::to_string(dim) +
         "; it must be " + std::to_string(size));
  }
}

void need_rows(const char* name, const Tensor& t, int64_t num_seqs) {
  if (t.size(0) < num_seqs) {
    fail(std::string(name) + " has " + std::to_string(t.size(0)) + " rows; there are " + std::to_string(num_seqs) +
         " sequences");
  }
}

// A per-head float vector, or null.
const float* head_floats(const Place& place, const char* name, const std::optional<Tensor>& t, int64_t num_heads) {
  if (!t.has_value()) return nullptr;
  need(place, name, *t, 1, ScalarType::Float, "float32");
  need_size(name, *t, 0, num_heads);
  return static_cast<const float*>(t->data_ptr());
}

TqLayerDesc make_layer(int64_t format_id, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t head_dim_v,
                       int32_t dtype) {
  TqLayerDesc layer = {};
  layer.struct_size = sizeof(layer);
  layer.format_id = tq::narrow<uint32_t>("format_id", format_id, fail);
  layer.num_heads = int32("num_heads", num_heads);
  layer.num_kv_heads = int32("num_kv_heads", num_kv_heads);
  layer.head_dim = int32("head_dim", head_dim);
  layer.head_dim_v = int32("head_dim_v", head_dim_v);
  layer.dtype = dtype;
  layer.attention_kind = TQ_ATTENTION_DECODER;
  return layer;
}

TqPages make_pages(const Place& place, const Tensor& t, const TqLayerDesc& layer, int64_t block_size) {
  need_place(place, "pages", t);
  if (t.scalar_type() != ScalarType::Byte) fail("pages has another dtype than uint8");
  if (t.dim() < 2)
    fail("pages has " + std::to_string(t.dim()) + " dimensions; it must have at least 2, the first for blocks");
  // Within a block the bytes must be one run, whatever the dimensions are called.
  int64_t run = 1;
  for (int64_t d = t.dim() - 1; d > 0; --d) {
    if (t.size(d) != 1 && t.stride(d) != run)
      fail("pages is not contiguous within a block; each block must be one run of bytes");
    run *= t.size(d);
  }
  TqKvCacheSpec spec = {};
  spec.struct_size = sizeof(spec);
  call(api().kv_cache_spec, &layer, &spec);
  TqPages pages = {};
  pages.struct_size = sizeof(pages);
  pages.block_size = int32("block_size", block_size);
  if (block_size <= 0 || run < spec.bytes_per_token * block_size) {
    fail("pages has " + std::to_string(run) + " bytes in a block; " + std::to_string(block_size) +
         " tokens of this layer need " + std::to_string(spec.bytes_per_token * block_size));
  }
  pages.format_id = layer.format_id;
  pages.data = t.data_ptr();
  pages.num_blocks = t.size(0);
  pages.block_stride_bytes = t.size(0) > 1 ? t.stride(0) : run;
  return pages;
}

void store_kv(Tensor key, Tensor value, Tensor pages, Tensor slot_mapping, int64_t format_id, int64_t block_size,
              std::optional<Tensor> key_offset) {
  const Place place = place_of("key", key);
  const int32_t dtype = dtype_of("key", key);
  need_heads(place, "key", key, dtype);
  need_heads(place, "value", value, dtype);
  need(place, "slot_mapping", slot_mapping, 1, ScalarType::Long, "int64");
  // Engines pad key and value beyond the slots they give.
  const int64_t tokens = slot_mapping.size(0);
  if (key.size(0) < tokens || value.size(0) < tokens) {
    fail("key and value have " + std::to_string(key.size(0)) + " and " + std::to_string(value.size(0)) +
         " tokens; slot_mapping has " + std::to_string(tokens));
  }
  need_size("value", value, 1, key.size(1));
  const TqLayerDesc layer = make_layer(format_id, key.size(1), key.size(1), key.size(2), value.size(2), dtype);
  const TqPages cache = make_pages(place, pages, layer, block_size);
  TqStoreKvArgs args = {};
  args.struct_size = sizeof(args);
  args.layer = &layer;
  args.pages = &cache;
  args.num_tokens = tokens;
  args.key = key.data_ptr();
  args.key_token_stride = key.stride(0);
  args.key_head_stride = key.stride(1);
  args.value = value.data_ptr();
  args.value_token_stride = value.stride(0);
  args.value_head_stride = value.stride(1);
  args.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  if (key_offset.has_value()) {
    need(place, "key_offset", *key_offset, 2, ScalarType::Float, "float32");
    need_size("key_offset", *key_offset, 0, key.size(1));
    need_size("key_offset", *key_offset, 1, key.size(2));
    if (key.size(1) > 1 && key_offset->stride(0) != key.size(2)) fail("key_offset is strided; it must be contiguous");
    args.key_offset = static_cast<const float*>(key_offset->data_ptr());
  }
  const Launch launch(place);
  args.stream = launch.stream;
  call(api().store_kv, launch.backend, &args);
}

void attend(Tensor query, Tensor out, Tensor pages, Tensor query_start_loc, Tensor seq_lens, Tensor block_table,
            int64_t format_id, int64_t block_size, int64_t num_kv_heads, double scale, bool causal,
            int64_t sliding_window, double soft_cap, std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
            std::optional<Tensor> lse, Tensor workspace, int64_t max_query_len, std::optional<Tensor> spans) {
  const Place place = place_of("query", query);
  const int32_t dtype = dtype_of("query", query);
  need_heads(place, "query", query, dtype);
  need_heads(place, "out", out, dtype);
  need_size("out", out, 0, query.size(0));
  need_size("out", out, 1, query.size(1));
  need(place, "query_start_loc", query_start_loc, 1, ScalarType::Int, "int32");
  need(place, "seq_lens", seq_lens, 1, ScalarType::Int, "int32");
  need(place, "block_table", block_table, 2, ScalarType::Int, "int32");
  need(place, "workspace", workspace, 1, ScalarType::Byte, "uint8");
  const int64_t num_seqs = seq_lens.size(0);
  need_size("query_start_loc", query_start_loc, 0, num_seqs + 1);
  need_rows("block_table", block_table, num_seqs);
  TqLayerDesc layer = make_layer(format_id, query.size(1), num_kv_heads, query.size(2), out.size(2), dtype);
  layer.sliding_window = int32("sliding_window", sliding_window);
  layer.soft_cap = tq::narrow_float("soft_cap", soft_cap, fail);
  const TqPages cache = make_pages(place, pages, layer, block_size);
  TqAttendArgs args = {};
  args.struct_size = sizeof(args);
  args.num_seqs = int32("the number of sequences", num_seqs);
  args.layer = &layer;
  args.pages = &cache;
  args.num_tokens = query.size(0);
  args.query = query.data_ptr();
  args.query_token_stride = query.stride(0);
  args.query_head_stride = query.stride(1);
  args.out = out.data_ptr();
  args.out_token_stride = out.stride(0);
  args.out_head_stride = out.stride(1);
  args.query_start_loc = static_cast<const int32_t*>(query_start_loc.data_ptr());
  args.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  args.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  args.block_table_stride = block_table.stride(0);
  args.max_blocks_per_seq = int32("block_table's number of columns", block_table.size(1));
  args.scale = tq::narrow_float("scale", scale, fail);
  args.causal = causal ? 1 : 0;
  args.max_query_len = int32("max_query_len", max_query_len);
  args.sinks = head_floats(place, "sinks", sinks, query.size(1));
  args.alibi_slopes = head_floats(place, "alibi_slopes", alibi_slopes, query.size(1));
  if (lse.has_value()) {
    need(place, "lse", *lse, 2, ScalarType::Float, "float32");
    need_size("lse", *lse, 0, query.size(0));
    need_size("lse", *lse, 1, query.size(1));
    if (!lse->is_contiguous()) fail("lse is not contiguous");
    args.lse = static_cast<float*>(lse->data_ptr());
  }
  if (spans.has_value()) {
    need(place, "spans", *spans, 3, ScalarType::Int, "int32");
    need_size("spans", *spans, 0, num_seqs);
    need_size("spans", *spans, 2, 2);
    if (!spans->is_contiguous()) fail("spans is not contiguous");
    args.max_spans = int32("the number of spans", spans->size(1));
    if (args.max_spans > 0) args.spans = static_cast<const int32_t*>(spans->data_ptr());
  }
  args.workspace = workspace.data_ptr();
  args.workspace_bytes = static_cast<uint64_t>(workspace.size(0));
  const Launch launch(place);
  args.stream = launch.stream;
  call(api().attend, launch.backend, &args);
}

void dequant_kv(Tensor pages, Tensor block_table, Tensor first_tokens, Tensor token_start_loc, int64_t format_id,
                int64_t block_size, Tensor key_out, Tensor value_out, bool keep_rotated,
                std::optional<Tensor> token_counts) {
  const Place place = place_of("key_out", key_out);
  const int32_t dtype = dtype_of("key_out", key_out);
  need_heads(place, "key_out", key_out, dtype);
  need_heads(place, "value_out", value_out, dtype);
  need_size("value_out", value_out, 0, key_out.size(0));
  need_size("value_out", value_out, 1, key_out.size(1));
  if (!key_out.is_contiguous() || !value_out.is_contiguous()) fail("key_out or value_out is not contiguous");
  need(place, "block_table", block_table, 2, ScalarType::Int, "int32");
  need(place, "first_tokens", first_tokens, 1, ScalarType::Int, "int32");
  need(place, "token_start_loc", token_start_loc, 1, ScalarType::Int, "int32");
  const int64_t num_seqs = first_tokens.size(0);
  need_size("token_start_loc", token_start_loc, 0, num_seqs + 1);
  need_rows("block_table", block_table, num_seqs);
  const TqLayerDesc layer =
      make_layer(format_id, key_out.size(1), key_out.size(1), key_out.size(2), value_out.size(2), dtype);
  const TqPages cache = make_pages(place, pages, layer, block_size);
  TqDequantKvArgs args = {};
  args.struct_size = sizeof(args);
  args.keep_rotated = keep_rotated ? 1 : 0;
  args.layer = &layer;
  args.pages = &cache;
  args.num_seqs = int32("the number of sequences", num_seqs);
  args.max_blocks_per_seq = int32("block_table's number of columns", block_table.size(1));
  args.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  args.block_table_stride = block_table.stride(0);
  args.first_tokens = static_cast<const int32_t*>(first_tokens.data_ptr());
  args.token_start_loc = static_cast<const int32_t*>(token_start_loc.data_ptr());
  if (token_counts.has_value()) {
    need(place, "token_counts", *token_counts, 1, ScalarType::Int, "int32");
    need_size("token_counts", *token_counts, 0, num_seqs);
    args.token_counts = static_cast<const int32_t*>(token_counts->data_ptr());
  }
  args.num_tokens = key_out.size(0);
  args.key_out = key_out.data_ptr();
  args.value_out = value_out.data_ptr();
  const Launch launch(place);
  args.stream = launch.stream;
  call(api().dequant_kv, launch.backend, &args);
}

// Of queries and keys, whose rotation is one for all formats that this library has.
void rotate(Tensor x, Tensor out, int64_t format_id) {
  const Place place = place_of("x", x);
  const int32_t dtype = dtype_of("x", x);
  need_heads(place, "x", x, dtype);
  need_heads(place, "out", out, dtype);
  for (int64_t d = 0; d < 3; ++d) need_size("out", out, d, x.size(d));
  const TqLayerDesc layer = make_layer(format_id, x.size(1), x.size(1), x.size(2), x.size(2), dtype);
  TqRotateArgs args = {};
  args.struct_size = sizeof(args);
  args.num_heads = layer.num_heads;
  args.side = TQ_SIDE_KEY;
  args.layer = &layer;
  args.num_tokens = x.size(0);
  args.x = x.data_ptr();
  args.x_token_stride = x.stride(0);
  args.x_head_stride = x.stride(1);
  args.out = out.data_ptr();
  args.out_token_stride = out.stride(0);
  args.out_head_stride = out.stride(1);
  const Launch launch(place);
  args.stream = launch.stream;
  call(api().rotate, launch.backend, &args);
}

// Bytes of workspace for any attend call. dtype does not matter.
int64_t workspace_size(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t head_dim_v, int64_t format_id,
                       int64_t device_index) {
  const TqLayerDesc layer = make_layer(format_id, num_heads, num_kv_heads, head_dim, head_dim_v, TQ_DTYPE_F32);
  uint64_t bytes = 0;
  call(api().workspace_size, backend_of(device_index), &layer, &bytes);
  return static_cast<int64_t>(bytes);
}

// [store_calls, stored_tokens, attend_calls, query_tokens, compressed_kv_reads] of this process's backend of a device.
std::vector<int64_t> counters(int64_t device_index) {
  TqCounters c = {};
  c.struct_size = sizeof(c);
  call(api().query_counters, backend_of(device_index), &c);
  return {static_cast<int64_t>(c.store_calls), static_cast<int64_t>(c.stored_tokens),
          static_cast<int64_t>(c.attend_calls), static_cast<int64_t>(c.query_tokens),
          static_cast<int64_t>(c.compressed_kv_reads)};
}

}  // namespace

STABLE_TORCH_LIBRARY(tq_backend, m) {
  m.def(
      "store_kv(Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping, int format_id, int block_size, "
      "Tensor? key_offset=None) -> ()");
  m.def(
      "attend(Tensor query, Tensor(a!) out, Tensor pages, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, "
      "int format_id, int block_size, int num_kv_heads, float scale, bool causal, int sliding_window, float soft_cap, "
      "Tensor? sinks, Tensor? alibi_slopes, Tensor(b!)? lse, Tensor(c!) workspace, int max_query_len=0, Tensor? "
      "spans=None) -> ()");
  m.def(
      "dequant_kv(Tensor pages, Tensor block_table, Tensor first_tokens, Tensor token_start_loc, int format_id, "
      "int block_size, Tensor(a!) key_out, Tensor(b!) value_out, bool keep_rotated, Tensor? token_counts=None) -> ()");
  m.def("rotate(Tensor x, Tensor(a!) out, int format_id) -> ()");
  m.def(
      "workspace_size(int num_heads, int num_kv_heads, int head_dim, int head_dim_v, int format_id, "
      "int device_index=-1) -> int");
  m.def("counters(int device_index=-1) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(tq_backend, CPU, m) {
  m.impl("store_kv", TORCH_BOX(&store_kv));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("dequant_kv", TORCH_BOX(&dequant_kv));
  m.impl("rotate", TORCH_BOX(&rotate));
}

// AMD's GPUs too: torch's ROCm builds dispatch them by the same key.
STABLE_TORCH_LIBRARY_IMPL(tq_backend, CUDA, m) {
  m.impl("store_kv", TORCH_BOX(&store_kv));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("dequant_kv", TORCH_BOX(&dequant_kv));
  m.impl("rotate", TORCH_BOX(&rotate));
}

// No tensor to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(tq_backend, CompositeExplicitAutograd, m) {
  m.impl("workspace_size", TORCH_BOX(&workspace_size));
  m.impl("counters", TORCH_BOX(&counters));
}
