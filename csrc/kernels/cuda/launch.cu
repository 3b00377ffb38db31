// launch.cu - from a call to kernel launches: finds the kernels, sizes grids.
#include <algorithm>
#include <cstdio>

#include "kernels/gpu/dequant.cuh"
#include "kernels/cuda/choose.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/schedule.cuh"
#include "kernels/gpu/store.cuh"

namespace tq::cuda {
namespace {

// Query tokens per sequence up to which the decode kernel is used: it splits the context over the whole device, while
// the prefill kernel reads it once for more rows.
constexpr int kMaxDecodeQueryLen = 16;
constexpr int kMinTilesPerWarp = 1;  // a CTA for less than a tile a warp is not worth its merge

// The kernels of attend calls over a layer; nulls where a head dimension is too large.
struct AttendKernels {
  DecodeKernels decode;
  const PrefillInstance* prefill;
};

struct DecodeTable {
  gpu::FormatTraits format;
  std::span<const DecodeInstance> (*instances)();
};
constexpr DecodeTable kDecodeTables[] = {
    {gpu::traits_of<K8V4>(), decode_k8v4}, {gpu::traits_of<K4V4>(), decode_k4v4},
    {gpu::traits_of<K3V4>(), decode_k3v4}, {gpu::traits_of<K3V3>(), decode_k3v3},
    {gpu::traits_of<Tq8>(), decode_tq8},   {gpu::traits_of<TqK5V4>(), decode_tqk5v4},
    {gpu::traits_of<Tq4>(), decode_tq4},
};

AttendKernels find_attend(const PageLayout& layout) {
  AttendKernels found = {{nullptr, nullptr}, find_prefill(prefill_instances(), layout)};
  for (const DecodeTable& table : kDecodeTables) {
    if (table.format == gpu::traits_of(layout)) found.decode = find_decode(table.instances(), layout);
  }
  return found;
}

KernelStatus check_served(const DeviceState& state, const Format& format, const PageLayout& layout,
                          const AttendKernels& kernels) {
  KernelStatus status = {kUnimplemented, ""};
  if (format.test_only) {
    std::snprintf(status.message, sizeof(status.message),
                  "format_id is %s, which is for tests on the CPU; the CUDA kernels serve all others", format.name);
    return status;
  }
  if (kernels.prefill == nullptr || kernels.decode.wide == nullptr) {
    std::snprintf(status.message, sizeof(status.message), "head_dim is %d; the CUDA kernels serve up to 512",
                  largest_dim(layout));
    return status;
  }
  // The decode kernels fit every GPU (decode_instances.cuh).
  if (kernels.prefill->shared_bytes > state.shared_limit) {
    std::snprintf(status.message, sizeof(status.message),
                  "head_dim is %d; its kernels need %d bytes of shared memory in a block, %s has %d",
                  largest_dim(layout), kernels.prefill->shared_bytes, state.name, state.shared_limit);
    return status;
  }
  return {0, ""};
}

int group_of(const PageLayout& layout, int num_heads) { return num_heads / layout.num_kv_heads; }

// Of any batch and context: partial results of the CTAs that are resident at once.
uint64_t workspace_bytes(const DeviceState& state, const DecodeKernels& decode, int group) {
  uint64_t bytes = 0;
  for (const int query_len : {1, kMaxDecodeQueryLen}) {
    bytes = std::max(bytes, decode_workspace(decode.of(query_len * group).traits, state.multiprocessors).bytes);
  }
  return bytes;
}

bool aligned(const void* base, int64_t token_stride, int64_t head_stride, int bytes, int element) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && token_stride * element % bytes == 0 &&
         head_stride * element % bytes == 0;
}

int element_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

KernelStatus launch_decode(DeviceState* state, const AttendParams& p, const DecodeInstance& i, int max_query_len) {
  const int ctas = state->multiprocessors, columns = max_query_len * group_of(p.cache.layout, p.num_heads);
  const DecodeShape shape =
      decode_shape(i.traits, p.cache.layout.atom_bytes(), state->shared_limit, state->hopper_code);
  const DecodeWorkspace parts = decode_workspace(i.traits, ctas);
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  DecodeParams d = {};
  d.attend = p;
  d.key_book = make_key_book(p.cache);
  d.value_book = make_value_book(p.cache);
  d.group = make_divisor(group_of(p.cache.layout, p.num_heads));
  d.kv_heads = make_divisor(p.cache.layout.num_kv_heads);
  d.block_size = make_divisor(p.cache.layout.block_size);
  d.grid = make_divisor(ctas);
  d.warps = make_divisor(shape.warps);
  const int column_tiles = (columns + i.traits.columns - 1) / i.traits.columns;
  d.deal = make_deal(int64_t{p.num_seqs} * p.cache.layout.num_kv_heads * column_tiles, ctas);
  d.counters = reinterpret_cast<uint32_t*>(workspace);
  d.of_ctas = reinterpret_cast<float*>(workspace + parts.of_ctas);
  d.of_warps = reinterpret_cast<float*>(workspace + parts.of_warps);
  d.slots = shape.slots;
  d.max_query_len = max_query_len;
  d.min_tiles = kMinTilesPerWarp * shape.warps;
  const int element = element_bytes(p.dtype);
  d.vector_query = element == 2 && aligned(p.query, p.query_token_stride, p.query_head_stride, 16, element);
  d.vector_out = element == 2 && aligned(p.out, p.out_token_stride, p.out_head_stride, 8, element);
  return launch(state, i.function, dim3(static_cast<unsigned>(ctas)), 32 * shape.warps, shape.shared_bytes, &d,
                p.stream, "the decode kernel");
}

KernelStatus launch_prefill(DeviceState* state, const AttendParams& p, const PrefillInstance& i, int min_query_len) {
  PrefillParams f = {};
  f.attend = p;
  f.key_book = make_key_book(p.cache);
  f.value_book = make_value_book(p.cache);
  f.min_query_len = min_query_len;
  const int element = element_bytes(p.dtype);
  f.vector_query = element == 2 && aligned(p.query, p.query_token_stride, p.query_head_stride, 16, element);
  // An upper bound: every sequence may end in a tile that is not full.
  const int64_t rows = p.num_tokens * group_of(p.cache.layout, p.num_heads);
  const int64_t tiles = rows / i.rows + std::min<int64_t>(p.num_seqs, p.num_tokens / min_query_len + 1);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.cache.layout.num_kv_heads));
  return launch(state, i.function, grid, i.threads, i.shared_bytes, &f, p.stream, "the prefill kernel");
}

// Blocks of warps that hold `rows` rows of one of the vectors that a token has.
unsigned row_blocks(int rows, int64_t tokens, int per_token, int threads) {
  const int64_t warps = (tokens + rows - 1) / rows * per_token;
  return static_cast<unsigned>((warps + threads / 32 - 1) / (threads / 32));
}

}  // namespace

KernelStatus supports(const DeviceState* state, const Format& format, const PageLayout& layout) {
  return check_served(*state, format, layout, find_attend(layout));
}

uint64_t workspace_size(const DeviceState* state, const PageLayout& layout, int num_heads) {
  return workspace_bytes(*state, find_attend(layout).decode, group_of(layout, num_heads));
}

KernelStatus attend(DeviceState* state, const AttendParams& p) {
  const PageLayout& layout = p.cache.layout;
  const AttendKernels kernels = find_attend(layout);
  if (const KernelStatus s = check_served(*state, p.cache.format, layout, kernels); s.code != 0) return s;
  const int group = group_of(layout, p.num_heads);
  if (const uint64_t needed = workspace_bytes(*state, kernels.decode, group); p.workspace_bytes < needed) {
    return workspace_too_small(p, needed);
  }
  if (p.num_seqs == 0 || p.num_tokens == 0) return {0, ""};
  state->attend_calls += 1;
  state->query_tokens += static_cast<uint64_t>(p.num_tokens);
  const int decode_len = std::min(p.max_query_len, kMaxDecodeQueryLen);
  if (const KernelStatus s = launch_decode(state, p, kernels.decode.of(decode_len * group), decode_len); s.code != 0) {
    return s;
  }
  if (p.max_query_len <= kMaxDecodeQueryLen) return {0, ""};
  return launch_prefill(state, p, *kernels.prefill, kMaxDecodeQueryLen + 1);
}

KernelStatus store_kv(DeviceState* state, const StoreParams& p) {
  state->store_calls += 1;
  state->stored_tokens += static_cast<uint64_t>(p.num_tokens);
  if (p.num_tokens == 0) return {0, ""};
  const RowInstance* i = find_rows(store_instances(), p.cache.layout);
  StoreArgs a = {};
  a.store = p;
  a.key_book = make_key_book(p.cache);
  a.value_book = make_value_book(p.cache);
  const int element = element_bytes(p.dtype);
  a.vector_key = element == 2 && aligned(p.key, p.key_token_stride, p.key_head_stride, 16, element);
  a.vector_value = element == 2 && aligned(p.value, p.value_token_stride, p.value_head_stride, 16, element);
  const unsigned blocks = row_blocks(32 / i->lanes, p.num_tokens, 2 * p.cache.layout.num_kv_heads, kStoreThreads);
  return launch(state, i->function, dim3(blocks), kStoreThreads, 0, &a, p.stream, "the store kernel");
}

KernelStatus dequant_kv(DeviceState* state, const DequantParams& p) {
  if (p.num_seqs == 0 || p.num_tokens == 0 || (p.key_out == nullptr && p.value_out == nullptr)) return {0, ""};
  const RowInstance* i = find_rows(dequant_instances(), p.cache.layout);
  DequantArgs a = {};
  a.dequant = p;
  a.key_book = make_key_book(p.cache);
  a.value_book = make_value_book(p.cache);
  // Rows are multiples of 16 elements, so only the buffers may be out of line.
  a.vector_out = (reinterpret_cast<uintptr_t>(p.key_out) | reinterpret_cast<uintptr_t>(p.value_out)) % 16 == 0;
  const int rows = 32 / i->lanes * row_unroll(i->lanes);
  const unsigned blocks = row_blocks(rows, p.num_tokens, p.cache.layout.num_kv_heads, kDequantThreads);
  return launch(state, i->function, dim3(blocks), kDequantThreads, 0, &a, p.stream, "the dequantization kernel");
}

KernelStatus rotate(DeviceState* state, const RotateParams& p) {
  if (p.num_tokens == 0) return {0, ""};
  const RotateInstance* i = find_rotate(rotate_instances(), p.head_dim);
  RotateArgs a = {};
  a.rotate = p;
  const int element = element_bytes(p.dtype);
  a.vector_x = element == 2 && aligned(p.x, p.x_token_stride, p.x_head_stride, 16, element);
  a.vector_out = element == 2 && aligned(p.out, p.out_token_stride, p.out_head_stride, 16, element);
  const int vectors = 32 / i->lanes * row_unroll(i->lanes);
  const unsigned blocks = row_blocks(vectors, p.num_tokens * p.num_heads, 1, kRotateThreads);
  return launch(state, i->function, dim3(blocks), kRotateThreads, 0, &a, p.stream, "the rotation kernel");
}

KernelStatus copy_pages(DeviceState* state, const CopyParams& p) {
  if (p.num_pairs == 0) return {0, ""};
  CopyParams a = p;
  const int64_t chunks = p.cache.layout.page_bytes() / 16;
  const unsigned y = static_cast<unsigned>(std::clamp<int64_t>(chunks / 1024, 1, 16));
  return launch(state, copy_pages_function(), dim3(static_cast<unsigned>(p.num_pairs), y), 256, 0, &a, p.stream,
                "the page copy kernel");
}

}  // namespace tq::cuda
