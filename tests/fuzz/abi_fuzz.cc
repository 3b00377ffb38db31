// abi_fuzz.cc - every function of the ABI with structs of any size and any numbers: an answer or a sentence. No crash,
// no byte read or written outside what the caller owns, and after an error no output is touched.
//
// Pointers are good or NULL, since no library can test them, and arrays are as large as the caller's numbers say.
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <tuple>

#include "caller.h"
#include "tq_backend.h"

namespace tq::fuzz {
namespace {

const TqApi& api() {
  static const TqApi* table = tq_get_api(TQ_ABI_MAJOR, nullptr);
  return *table;
}

TqBackend* backend() {
  static TqBackend* made = [] {
    static TqParallelFor serial = {sizeof(serial), 2, nullptr,
                                   [](void*, int64_t n, void (*task)(void*, int64_t), void* arg) {
                                     for (int64_t i = 0; i < n; ++i) task(arg, i);
                                   }};
    TqBackendOptions options = {sizeof(options), TQ_DEVICE_CPU, 0, 0, TQ_LIB_DIR, &serial};
    TqError error = {sizeof(error), 0, ""};
    TqBackend* out = nullptr;
    if (api().create_backend(&options, &out, &error) != TQ_OK) {
      std::fprintf(stderr, "%s\n", error.message);
      std::abort();
    }
    return out;
  }();
  return made;
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// Calls function(error) and looks at what came back. unchanged: the outputs, which an error must leave alone.
class Call {
 public:
  explicit Call(FuzzedDataProvider& data) : error_(data, TqError{}) {}

  template <class Outputs, class F>
  int32_t operator()(Outputs outputs, F function) {
    const auto before = outputs();
    const int32_t code = function(error_.get());
    static constexpr int32_t kCodes[] = {TQ_OK,
                                         TQ_INVALID_ARGUMENT,
                                         TQ_NOT_FOUND,
                                         TQ_RESOURCE_EXHAUSTED,
                                         TQ_FAILED_PRECONDITION,
                                         TQ_UNIMPLEMENTED,
                                         TQ_UNAVAILABLE};
    if (std::find(std::begin(kCodes), std::end(kCodes), code) == std::end(kCodes)) fail("a code that means a bug");
    if (code == TQ_OK) return code;
    if (outputs() != before) fail("an error, and an output has been written");
    const TqError& error = *error_.get();
    if (error.struct_size >= sizeof(TqError) && (error.code != code || error.message[0] == '\0')) fail("no sentence");
    return code;
  }
  template <class F>
  int32_t operator()(F function) {
    return (*this)([] { return 0; }, function);
  }

 private:
  Struct<TqError> error_;
};

// Elements of a strided [tokens, heads, dim] tensor.
__int128 extent(int64_t tokens, int64_t token_stride, int64_t heads, int64_t head_stride, int64_t dim) {
  if (tokens <= 0 || heads <= 0 || dim <= 0) return 0;
  const __int128 elements = static_cast<__int128>(tokens - 1) * std::max<int64_t>(token_stride, 0) +
                            static_cast<__int128>(heads - 1) * std::max<int64_t>(head_stride, 0) + dim;
  return std::min(elements, __int128{kMostBytes} + 1);  // more is no memory anyway, and its bytes must fit 128 bits
}

TqLayerDesc any_layer(FuzzedDataProvider& data) {
  static constexpr uint32_t kIds[] = {TQ_FORMAT_TURBOQUANT_K8V4,
                                      TQ_FORMAT_TURBOQUANT_4BIT_NC,
                                      TQ_FORMAT_TURBOQUANT_K3V4_NC,
                                      TQ_FORMAT_TURBOQUANT_3BIT_NC,
                                      TQ_FORMAT_TQ_8,
                                      TQ_FORMAT_TQ_K5V4,
                                      TQ_FORMAT_TQ_4,
                                      TQ_FORMAT_RAW_F32};
  TqLayerDesc d = {};
  d.format_id = data.PickValueInArray(kIds);
  d.num_kv_heads = data.ConsumeIntegralInRange<int>(1, 3);
  d.num_heads = d.num_kv_heads * data.ConsumeIntegralInRange<int>(1, 3);
  d.head_dim = 16 * data.ConsumeIntegralInRange<int>(1, 9);
  d.head_dim_v = data.ConsumeBool() ? 0 : 16 * data.ConsumeIntegralInRange<int>(1, 9);
  d.dtype = data.ConsumeIntegralInRange<int>(1, 3);
  d.attention_kind = TQ_ATTENTION_DECODER;
  d.sliding_window = data.ConsumeBool() ? 0 : data.ConsumeIntegralInRange<int>(1, 40);
  spoil(data, &d);
  return d;
}

// A layer and its pages, as far as numbers go; the pages' memory is as large as they say.
struct Cache {
  TqLayerDesc desc;
  Struct<TqLayerDesc> layer;
  TqPages numbers;
  Memory data;
  Struct<TqPages> pages;
  int64_t heads, kv_heads, dim, dim_v, element;

  static TqPages any_pages(FuzzedDataProvider& data, const TqLayerDesc& d) {
    TqKvCacheSpec spec = {};
    spec.struct_size = sizeof(spec);
    TqLayerDesc full = d;
    full.struct_size = sizeof(full);
    const bool known = api().kv_cache_spec(&full, &spec, nullptr) == TQ_OK;
    TqPages p = {};
    p.format_id = d.format_id;
    p.block_size = 16 * data.ConsumeIntegralInRange<int>(1, 3);
    p.num_blocks = data.ConsumeIntegralInRange<int>(1, 8);
    p.block_stride_bytes =
        (known ? spec.bytes_per_token : 64) * p.block_size + 16 * data.ConsumeIntegralInRange<int>(0, 2);
    spoil(data, &p);
    return p;
  }
  static TqPages with(TqPages p, void* memory) {
    p.data = memory;
    return p;
  }
  explicit Cache(FuzzedDataProvider& fuzz)
      : desc(any_layer(fuzz)),
        layer(fuzz, desc),
        numbers(any_pages(fuzz, desc)),
        data(static_cast<__int128>(std::max<int64_t>(numbers.num_blocks, 0)) *
             std::max<int64_t>(numbers.block_stride_bytes, 0)),
        pages(fuzz, with(numbers, data.as<void>())),
        heads(desc.num_heads),
        kv_heads(desc.num_kv_heads),
        dim(desc.head_dim),
        dim_v(desc.head_dim_v != 0 ? desc.head_dim_v : desc.head_dim),
        element(desc.dtype == TQ_DTYPE_F32 ? 4 : 2) {}
};

// An array of numbers that are usually in [low, high].
template <class T>
Memory numbers_of(FuzzedDataProvider& data, __int128 count, int64_t low, int64_t high) {
  Memory memory(count > 4096 ? __int128{kMostBytes} + 1 : count * static_cast<int>(sizeof(T)));
  for (__int128 i = 0; memory.as<T>() != nullptr && i < count; ++i) {
    memory.as<T>()[i] = static_cast<T>(mostly(data, data.ConsumeIntegralInRange<int64_t>(low, high)));
  }
  return memory;
}

// Ascending from 0, usually.
Memory starts_of(FuzzedDataProvider& data, int64_t sequences, int64_t tokens) {
  Memory memory = numbers_of<int32_t>(data, static_cast<__int128>(sequences) + 1, 0, 3);
  int32_t* at = memory.as<int32_t>();
  if (at == nullptr || sequences < 0) return memory;
  at[0] = data.ConsumeIntegralInRange<int>(0, 15) == 0 ? at[0] : 0;
  for (int64_t i = 1; i <= sequences; ++i) at[i] = static_cast<int32_t>(int64_t{at[i]} + at[i - 1]);
  if (data.ConsumeBool()) at[sequences] = static_cast<int32_t>(tokens);
  return memory;
}

template <class T>
const T* or_null(FuzzedDataProvider& data, const T* p) {
  return data.ConsumeIntegralInRange<int>(0, 31) == 0 ? nullptr : p;
}

void store(FuzzedDataProvider& data) {
  const Cache c(data);
  TqStoreKvArgs a = {};
  a.num_tokens = data.ConsumeIntegralInRange<int>(0, 20);
  a.key_head_stride = c.dim + data.ConsumeIntegralInRange<int>(0, 1);
  a.key_token_stride = a.key_head_stride * c.kv_heads;
  a.value_head_stride = c.dim_v;
  a.value_token_stride = a.value_head_stride * c.kv_heads;
  spoil(data, &a);
  const Memory key(extent(a.num_tokens, a.key_token_stride, c.kv_heads, a.key_head_stride, c.dim) * c.element);
  const Memory value(extent(a.num_tokens, a.value_token_stride, c.kv_heads, a.value_head_stride, c.dim_v) * c.element);
  const Memory key_offset(extent(1, 0, c.kv_heads, c.dim, c.dim) * static_cast<int64_t>(sizeof(float)));
  const int64_t slots = std::clamp<int64_t>(c.numbers.num_blocks, 1, 1000) * c.numbers.block_size;
  const Memory slot_mapping = numbers_of<int64_t>(data, a.num_tokens, -1, std::max<int64_t>(slots, 0));
  a.layer = or_null(data, c.layer.get());
  a.pages = or_null(data, c.pages.get());
  a.key = key.as<void>();
  a.value = value.as<void>();
  a.slot_mapping = slot_mapping.as<int64_t>();
  a.stream = nullptr;
  a.key_offset = data.ConsumeBool() ? key_offset.as<float>() : nullptr;
  const Struct<TqStoreKvArgs> args(data, a);
  Call{data}([&](TqError* e) { return api().store_kv(backend(), args.get(), e); });
}

void attend(FuzzedDataProvider& data) {
  const Cache c(data);
  TqAttendArgs a = {};
  a.num_seqs = data.ConsumeIntegralInRange<int>(0, 3);
  a.num_tokens = data.ConsumeIntegralInRange<int>(0, 8);
  a.query_head_stride = c.dim;
  a.query_token_stride = c.dim * c.heads;
  a.out_head_stride = c.dim_v;
  a.out_token_stride = c.dim_v * c.heads;
  a.max_blocks_per_seq = data.ConsumeIntegralInRange<int>(0, 4);
  a.block_table_stride = a.max_blocks_per_seq;
  a.scale = 0.125f;
  a.causal = data.ConsumeIntegralInRange<int>(0, 1);
  a.max_query_len = data.ConsumeBool() ? 0 : 8;
  a.max_spans = data.ConsumeIntegralInRange<int>(0, 2);
  uint64_t bytes = 0;
  Call{data}([&](TqError* e) { return api().workspace_size(backend(), c.layer.get(), &bytes, e); });
  a.workspace_bytes = bytes;
  spoil(data, &a);
  const Memory query(extent(a.num_tokens, a.query_token_stride, c.heads, a.query_head_stride, c.dim) * c.element);
  const Memory out(extent(a.num_tokens, a.out_token_stride, c.heads, a.out_head_stride, c.dim_v) * c.element);
  const Memory starts = starts_of(data, a.num_seqs, a.num_tokens);
  const Memory lens = numbers_of<int32_t>(data, a.num_seqs, 0, 64);
  const Memory table = numbers_of<int32_t>(data, extent(a.num_seqs, a.block_table_stride, 1, 0, a.max_blocks_per_seq),
                                           0, std::clamp<int64_t>(c.numbers.num_blocks, 0, 1000));
  const Memory sinks = numbers_of<float>(data, c.heads, 0, 3);
  const Memory lse(static_cast<__int128>(a.num_tokens) * c.heads * 4);
  const Memory spans = numbers_of<int32_t>(data, __int128{2} * a.num_seqs * a.max_spans, 0, 40);
  const Memory workspace(std::min<uint64_t>(a.workspace_bytes, kMostBytes * 64) > kMostBytes
                             ? __int128{kMostBytes} + 1
                             : __int128{a.workspace_bytes});
  a.layer = or_null(data, c.layer.get());
  a.pages = or_null(data, c.pages.get());
  a.query = query.as<void>();
  a.out = out.as<void>();
  a.query_start_loc = or_null(data, starts.as<int32_t>());
  a.seq_lens = lens.as<int32_t>();
  a.block_table = table.as<int32_t>();
  a.sinks = data.ConsumeBool() ? nullptr : sinks.as<float>();
  a.alibi_slopes = data.ConsumeBool() ? nullptr : sinks.as<float>();
  a.lse = data.ConsumeBool() ? nullptr : lse.as<float>();
  a.spans = a.max_spans > 0 ? spans.as<int32_t>() : nullptr;
  a.workspace = workspace.as<void>();
  a.stream = nullptr;
  const Struct<TqAttendArgs> args(data, a);
  Call{data}([&](TqError* e) { return api().attend(backend(), args.get(), e); });
}

void dequant(FuzzedDataProvider& data) {
  const Cache c(data);
  TqDequantKvArgs a = {};
  a.num_seqs = data.ConsumeIntegralInRange<int>(0, 3);
  a.max_blocks_per_seq = data.ConsumeIntegralInRange<int>(0, 4);
  a.block_table_stride = a.max_blocks_per_seq;
  a.num_tokens = data.ConsumeIntegralInRange<int>(0, 12);
  a.keep_rotated = data.ConsumeIntegralInRange<int>(0, 1);
  spoil(data, &a);
  const Memory table = numbers_of<int32_t>(data, extent(a.num_seqs, a.block_table_stride, 1, 0, a.max_blocks_per_seq),
                                           0, std::clamp<int64_t>(c.numbers.num_blocks, 0, 1000));
  const Memory first = numbers_of<int32_t>(data, a.num_seqs, 0, 40);
  const Memory starts = starts_of(data, a.num_seqs, a.num_tokens);
  const Memory counts = numbers_of<int32_t>(data, a.num_seqs, 0, 3);
  const Memory key(static_cast<__int128>(a.num_tokens) * c.kv_heads * c.dim * c.element);
  const Memory value(static_cast<__int128>(a.num_tokens) * c.kv_heads * c.dim_v * c.element);
  a.layer = or_null(data, c.layer.get());
  a.pages = or_null(data, c.pages.get());
  a.block_table = table.as<int32_t>();
  a.first_tokens = first.as<int32_t>();
  a.token_start_loc = starts.as<int32_t>();
  a.token_counts = data.ConsumeBool() ? nullptr : counts.as<int32_t>();
  a.key_out = data.ConsumeBool() ? nullptr : key.as<void>();
  a.value_out = data.ConsumeBool() ? nullptr : value.as<void>();
  a.stream = nullptr;
  const Struct<TqDequantKvArgs> args(data, a);
  Call{data}([&](TqError* e) { return api().dequant_kv(backend(), args.get(), e); });
}

void copy_pages(FuzzedDataProvider& data) {
  const Cache c(data);
  TqCopyPagesArgs a = {};
  a.num_pairs = data.ConsumeIntegralInRange<int>(0, 4);
  spoil(data, &a);
  const Memory pairs =
      numbers_of<int64_t>(data, __int128{2} * a.num_pairs, 0, std::clamp<int64_t>(c.numbers.num_blocks, 0, 1000));
  a.layer = or_null(data, c.layer.get());
  a.pages = or_null(data, c.pages.get());
  a.src_dst = pairs.as<int64_t>();
  a.stream = nullptr;
  const Struct<TqCopyPagesArgs> args(data, a);
  Call{data}([&](TqError* e) { return api().copy_pages(backend(), args.get(), e); });
}

void rotate(FuzzedDataProvider& data) {
  const TqLayerDesc desc = any_layer(data);
  const Struct<TqLayerDesc> layer(data, desc);
  TqRotateArgs a = {};
  a.side = data.ConsumeIntegralInRange<int>(1, 4);
  a.num_heads = data.ConsumeIntegralInRange<int>(1, 4);
  a.num_tokens = data.ConsumeIntegralInRange<int>(0, 4);
  const bool of_values = a.side == TQ_SIDE_VALUE || a.side == TQ_SIDE_OUTPUT;
  const int dim = of_values && desc.head_dim_v != 0 ? desc.head_dim_v : desc.head_dim;
  a.x_head_stride = a.out_head_stride = dim;
  a.x_token_stride = a.out_token_stride = int64_t{dim} * a.num_heads;
  const int32_t side = a.side;
  spoil(data, &a);
  a.side = a.side >= 1 && a.side <= 4 ? side : a.side;  // the memory is that of this side
  const int element = desc.dtype == TQ_DTYPE_F32 ? 4 : 2;
  const Memory x(extent(a.num_tokens, a.x_token_stride, a.num_heads, a.x_head_stride, dim) * element);
  const Memory out(extent(a.num_tokens, a.out_token_stride, a.num_heads, a.out_head_stride, dim) * element);
  a.layer = or_null(data, layer.get());
  a.x = x.as<void>();
  a.out = out.as<void>();
  a.stream = nullptr;
  const Struct<TqRotateArgs> args(data, a);
  Call{data}([&](TqError* e) { return api().rotate(backend(), args.get(), e); });
}

void plan(FuzzedDataProvider& data) {
  std::vector<TqPlanLayer> rows(data.ConsumeIntegralInRange<size_t>(1, 5));
  for (TqPlanLayer& row : rows) {
    row = {};
    row.format_id = data.ConsumeBool() ? 0 : TQ_FORMAT_TURBOQUANT_4BIT_NC;
    row.native_bytes = 2;
    row.num_kv_heads = 2;
    row.head_dim = 64;
    spoil(data, &row);
  }
  const Structs<TqPlanLayer> layers(data, rows);
  TqPlanRequest r = {};
  r.block_size = 16;
  r.memory_bytes = 1 << 24;
  r.max_model_len = 4096;
  r.max_in_flight_tokens = 512;
  r.max_block_size = 64;
  spoil(data, &r);
  r.layers = or_null(data, layers.get());
  // A number of layers that the caller does not have cannot be told from one that it has.
  if (r.num_layers != static_cast<int64_t>(rows.size()) && r.num_layers > 0)
    r.num_layers = static_cast<int64_t>(rows.size());
  const Struct<TqPlanRequest> request(data, r);
  const Structs<TqPagePlan> out(data, std::vector<TqPagePlan>(rows.size()));
  const Struct<TqPlanSummary> summary(data, TqPlanSummary{});
  int64_t count = mostly(data, static_cast<int64_t>(rows.size()));
  count = std::min(count, static_cast<int64_t>(rows.size()));
  TqPagePlan* rows_out = data.ConsumeBool() ? out.get() : nullptr;
  Call{data}([&] { return std::tuple(out.copy(), summary.copy(), count); },
             [&](TqError* e) { return api().plan_pages(request.get(), rows_out, &count, summary.get(), e); });
}

void skip_layers(FuzzedDataProvider& data) {
  TqSkipRequest r = {};
  r.boundary_layers = static_cast<int32_t>(mostly(data, 2));
  r.num_layers = data.ConsumeIntegralInRange<int>(0, 12);
  r.num_skip_layers = data.ConsumeIntegralInRange<int>(0, 4);
  const Memory targets = numbers_of<int32_t>(data, r.num_layers, -1, 4);
  const Memory skip = numbers_of<int32_t>(data, r.num_skip_layers, 0, 12);
  r.kv_sharing_targets = or_null(data, targets.as<int32_t>());
  r.skip_layers = or_null(data, skip.as<int32_t>());
  const Struct<TqSkipRequest> request(data, r);
  int64_t count = data.ConsumeIntegralInRange<int>(0, 12);
  const Memory out(__int128{4} * count);
  int32_t* rows = data.ConsumeBool() ? out.as<int32_t>() : nullptr;
  Call{data}([&] { return count; },
             [&](TqError* e) { return api().align_skip_layers(request.get(), rows, &count, e); });
}

void formats(FuzzedDataProvider& data) {
  const std::vector<TqFormatInfo> infos(data.ConsumeIntegralInRange<size_t>(0, 6));
  const Structs<TqFormatInfo> rows(data, infos);
  auto count = static_cast<int64_t>(infos.size());
  Call{data}([&] { return std::pair(rows.copy(), count); },
             [&](TqError* e) { return api().list_formats(data.ConsumeBool() ? rows.get() : nullptr, &count, e); });
  const Struct<TqFormatInfo> info(data, TqFormatInfo{});
  const Struct<TqCodebook> book(data, TqCodebook{});
  TqCodebookArgs c = {};
  c.format_id = 0x0100 * data.ConsumeIntegralInRange<uint32_t>(1, 7) + 1;
  c.side = TQ_SIDE_KEY;
  c.head_dim = 64;
  spoil(data, &c);
  const Struct<TqCodebookArgs> book_args(data, c);
  const int64_t capacity = data.ConsumeIntegralInRange<int64_t>(-1, 20);
  const Memory levels(4 * capacity), midpoints(4 * capacity);
  float* levels_out = data.ConsumeBool() ? levels.as<float>() : nullptr;
  float* midpoints_out = data.ConsumeBool() ? midpoints.as<float>() : nullptr;
  const std::string name = data.ConsumeBool() ? "turboquant_4bit_nc" : data.ConsumeRandomLengthString(40);
  Call{data}([&] { return info.copy(); },
             [&](TqError* e) { return api().format_by_name(name.c_str(), info.get(), e); });
  Call{data}(
      [&] { return book.copy(); },
      [&](TqError* e) { return api().codebook(book_args.get(), book.get(), levels_out, midpoints_out, capacity, e); });
}

void layers(FuzzedDataProvider& data) {
  const Struct<TqLayerDesc> layer(data, any_layer(data));
  const Struct<TqKvCacheSpec> spec(data, TqKvCacheSpec{});
  Call{data}([&] { return spec.copy(); }, [&](TqError* e) { return api().kv_cache_spec(layer.get(), spec.get(), e); });
  uint64_t unmet = 0;
  Call{data}([&] { return unmet; }, [&](TqError* e) { return api().check_layer(backend(), layer.get(), &unmet, e); });
  api().unmet_reason(static_cast<int32_t>(number(data)));
}

void backends(FuzzedDataProvider& data) {
  const Struct<TqCaps> caps(data, TqCaps{});
  const Struct<TqCounters> counters(data, TqCounters{});
  Call{data}([&] { return caps.copy(); }, [&](TqError* e) { return api().query_caps(backend(), caps.get(), e); });
  Call{data}([&] { return counters.copy(); },
             [&](TqError* e) { return api().query_counters(backend(), counters.get(), e); });
  const Structs<TqLibraryInfo> rows(data, std::vector<TqLibraryInfo>(3));
  int64_t count = 3;
  const std::string folder = data.ConsumeRandomLengthString(300);
  Call{data}([&] { return std::pair(rows.copy(), count); },
             [&](TqError* e) { return api().list_libraries(folder.c_str(), rows.get(), &count, e); });
  TqBackendOptions o = {};
  o.device_kind = TQ_DEVICE_CPU;
  spoil(data, &o);
  o.kernels_dir = folder.c_str();
  o.parallel_for = nullptr;
  const Struct<TqBackendOptions> options(data, o);
  TqBackend* made = nullptr;
  Call{data}([&] { return made; }, [&](TqError* e) { return api().create_backend(options.get(), &made, e); });
  api().destroy_backend(made);
  const Struct<TqError> error(data, TqError{});
  tq_get_api(static_cast<uint32_t>(number(data)), error.get());
}

void quantize(FuzzedDataProvider& data) {
  TqFakeQuantizeArgs a = {};
  a.format_id = 0x0100 * data.ConsumeIntegralInRange<uint32_t>(1, 7) + 1;
  a.side = data.ConsumeIntegralInRange<int>(2, 3);
  a.head_dim = 16 * data.ConsumeIntegralInRange<int>(1, 32);
  a.num_rows = 2;
  spoil(data, &a);
  const __int128 bytes = static_cast<__int128>(std::max(a.head_dim, 0)) * std::max<int64_t>(a.num_rows, 0) * 4;
  const Memory in(bytes);
  const Memory out(bytes);
  const std::string noise = data.ConsumeRandomLengthString(64);  // any bits are a float: NaN, infinities, subnormals
  if (in.as<char>() != nullptr && bytes > 0) {
    std::memcpy(in.as<char>(), noise.data(), std::min<size_t>(noise.size(), static_cast<size_t>(bytes)));
  }
  a.in = in.as<float>();
  a.out = out.as<float>();
  const Struct<TqFakeQuantizeArgs> args(data, a);
  Call{data}([&](TqError* e) { return api().fake_quantize(args.get(), e); });
}

}  // namespace
}  // namespace tq::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  using namespace tq::fuzz;  // NOLINT(google-build-using-namespace)
  static constexpr void (*kFunctions[])(FuzzedDataProvider&) = {
      store, attend, dequant, copy_pages, rotate, plan, skip_layers, formats, layers, backends, quantize};
  FuzzedDataProvider data(bytes, size);
  data.PickValueInArray(kFunctions)(data);
  return 0;
}
