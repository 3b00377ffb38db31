// launch.cu - from a call to kernel launches: chooses instances from the tables, sizes grids and shared memory.
#include <algorithm>
#include <cstdio>

#include "kernels/gpu/dequant.cuh"
#include "kernels/cuda/device.h"
#include "kernels/cuda/instances.h"
#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/schedule.cuh"
#include "kernels/gpu/store.cuh"

namespace tq::cuda {
namespace {

// Query tokens per sequence up to which the decode kernel is used: it splits the context over the whole device, while
// the prefill kernel reads it once for more rows.
constexpr int kMaxDecodeQueryLen = 16;
constexpr int kMinTilesPerWarp = 1;     // a CTA for less than a tile a warp is not worth its merge
constexpr int kRingBytes = 160 * 1024;  // deeper rings read slower (docs/kernels.md)

std::span<const DecodeInstance> decode_table_of(const PageLayout& layout) {
  if (layout.key_bits == 8) return decode_k8v4();
  if (layout.key_bits == 4) return decode_k4v4();
  return layout.value_bits == 4 ? decode_k3v4() : decode_k3v3();
}

const DecodeInstance* find_decode(const PageLayout& layout, int columns) {
  const int dim = std::max(layout.head_dim, layout.head_dim_v);
  const DecodeInstance* best = nullptr;
  for (const DecodeInstance& i : decode_table_of(layout)) {
    if (i.exact ? (i.dim != layout.head_dim || i.dim != layout.head_dim_v) : i.dim < dim) continue;
    if (best == nullptr) {
      best = &i;
    } else if (i.exact == best->exact && i.dim == best->dim && columns > best->columns) {
      best = &i;
    } else if (i.exact == best->exact && i.dim < best->dim) {
      best = &i;
    }
  }
  return best;
}

// Warps of a CTA and tiles of each ring that fit.
struct DecodeShape {
  int warps, slots, shared_bytes;
};

DecodeShape decode_shape(const DeviceState& state, const DecodeInstance& i, int atom_bytes) {
  const int tile = i.atoms * atom_bytes;
  const int dump = i.columns * i.dump_pitch * 4;
  const int most = state.hopper_code ? 6 : 3;  // without bulk copies a ring waits for at most two tiles ahead
  auto bytes = [&](int warps, int slots) {
    const int ring = (std::max(slots * tile, dump) + 127) / 128 * 128;
    const int rows = warps + warps * i.query_vectors / i.columns;
    return warps * (ring + 8 * slots) + rows * i.query_bytes;
  };
  for (int warps = i.max_warps; warps >= 1; warps = warps > 4 ? warps - 4 : warps / 2) {
    for (int slots = most; slots >= 2; --slots) {
      if (slots > 2 && warps * slots * tile > kRingBytes) continue;
      if (slots == 2 && warps > 4 && state.hopper_code && 2 * tile * warps < 48 * 1024) continue;
      if (bytes(warps, slots) <= state.shared_limit) return {warps, slots, bytes(warps, slots)};
    }
  }
  return {0, 0, 0};
}

int group_of(const PageLayout& layout, int num_heads) { return num_heads / layout.num_kv_heads; }

struct Workspace {
  uint64_t partial, first, total;  // bytes
};

Workspace decode_workspace(const DeviceState& state, const DecodeInstance& i) {
  const uint64_t dump = uint64_t(i.columns) * i.dump_pitch * 4;
  const uint64_t partial = uint64_t(state.multiprocessors) * 2 * dump;
  const uint64_t first = uint64_t(state.multiprocessors) * i.max_warps * 2 * dump;
  return {partial, first, partial + first};
}

int* counters_for(DeviceState* state, const void* workspace) {
  const std::lock_guard lock(state->mutex);
  const auto [at, added] = state->counter_set.try_emplace(
      workspace, static_cast<int>(state->counter_set.size() % DeviceState::kCounterSets));
  return state->counters + int64_t{at->second} * state->multiprocessors;
}

bool aligned(const void* base, int64_t token_stride, int64_t head_stride, int bytes, int element) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && token_stride * element % bytes == 0 &&
         head_stride * element % bytes == 0;
}

int element_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

KernelStatus launch_decode(DeviceState* state, const AttendParams& p, int max_query_len) {
  const DecodeInstance* i = find_decode(p.cache.layout, max_query_len * group_of(p.cache.layout, p.num_heads));
  const DecodeShape shape = decode_shape(*state, *i, p.cache.layout.atom_bytes());
  DecodeParams d = {};
  d.attend = p;
  d.book = make_device_book(p.cache.codebook);
  d.group = make_divisor(group_of(p.cache.layout, p.num_heads));
  d.kv_heads = make_divisor(p.cache.layout.num_kv_heads);
  d.block_size = make_divisor(p.cache.layout.block_size);
  d.grid = make_divisor(state->multiprocessors);
  d.warps = make_divisor(shape.warps);
  const int column_tiles = (max_query_len * group_of(p.cache.layout, p.num_heads) + i->columns - 1) / i->columns;
  d.deal = make_deal(int64_t{p.num_seqs} * p.cache.layout.num_kv_heads * column_tiles, state->multiprocessors);
  d.counters = counters_for(state, p.workspace);
  d.partial = static_cast<float*>(p.workspace);
  d.first = d.partial + decode_workspace(*state, *i).partial / 4;
  d.slots = shape.slots;
  d.max_query_len = max_query_len;
  d.min_tiles = kMinTilesPerWarp * shape.warps;
  const int element = element_bytes(p.dtype);
  d.vector_query = element == 2 && aligned(p.query, p.query_token_stride, p.query_head_stride, 16, element);
  d.vector_out = element == 2 && aligned(p.out, p.out_token_stride, p.out_head_stride, 8, element);
  return launch(state, i->function, dim3(static_cast<unsigned>(state->multiprocessors)), 32 * shape.warps,
                shape.shared_bytes, &d, p.stream, "the decode kernel");
}

const PrefillInstance* find_prefill(const PageLayout& layout) {
  const PrefillInstance* best = nullptr;
  for (const PrefillInstance& i : prefill_instances()) {
    if (i.key_bits != layout.key_bits || i.value_bits != layout.value_bits) continue;
    if (i.dim < std::max(layout.head_dim, layout.head_dim_v)) continue;
    if (best == nullptr || i.dim < best->dim) best = &i;
  }
  return best;
}

KernelStatus launch_prefill(DeviceState* state, const AttendParams& p, int min_query_len) {
  const PrefillInstance* i = find_prefill(p.cache.layout);
  PrefillParams f = {};
  f.attend = p;
  f.book = make_device_book(p.cache.codebook);
  f.min_query_len = min_query_len;
  const int element = element_bytes(p.dtype);
  f.vector_query = element == 2 && aligned(p.query, p.query_token_stride, p.query_head_stride, 16, element);
  // An upper bound: every sequence may end in a tile that is not full.
  const int64_t rows = p.num_tokens * group_of(p.cache.layout, p.num_heads);
  const int64_t tiles = rows / i->rows + std::min<int64_t>(p.num_seqs, p.num_tokens / min_query_len + 1);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.cache.layout.num_kv_heads));
  return launch(state, i->function, grid, i->threads, i->shared_bytes, &f, p.stream, "the prefill kernel");
}

// The kernel of a table whose vectors of 16 * lanes dimensions hold these.
const RowInstance* find_rows(std::span<const RowInstance> table, const PageLayout& layout) {
  for (const RowInstance& i : table) {
    if (i.key_bits == layout.key_bits && i.value_bits == layout.value_bits &&
        16 * i.lanes >= std::max(layout.head_dim, layout.head_dim_v)) {
      return &i;
    }
  }
  return nullptr;
}

// Blocks of warps that hold `rows` rows of one of the vectors that a token has.
unsigned row_blocks(int rows, int64_t tokens, int per_token, int threads) {
  const int64_t warps = (tokens + rows - 1) / rows * per_token;
  return static_cast<unsigned>((warps + threads / 32 - 1) / (threads / 32));
}

}  // namespace

KernelStatus supports(const DeviceState* state, const Format& format, const PageLayout& layout, int) {
  KernelStatus status = {kUnimplemented, ""};
  if (format.test_only) {
    std::snprintf(status.message, sizeof(status.message),
                  "format_id is %s, which is for tests on the CPU; the CUDA kernels serve the turboquant_* presets",
                  format.name);
    return status;
  }
  const PrefillInstance* prefill = find_prefill(layout);
  const DecodeInstance* decode = find_decode(layout, 1);
  if (prefill == nullptr || decode == nullptr) {
    std::snprintf(status.message, sizeof(status.message), "head_dim is %d; the CUDA kernels serve up to 512",
                  std::max(layout.head_dim, layout.head_dim_v));
    return status;
  }
  if (prefill->shared_bytes > state->shared_limit || decode_shape(*state, *decode, layout.atom_bytes()).warps == 0) {
    std::snprintf(status.message, sizeof(status.message),
                  "head_dim is %d; its kernels need %d bytes of shared memory in a block, %s has %d",
                  std::max(layout.head_dim, layout.head_dim_v), prefill->shared_bytes, state->name,
                  state->shared_limit);
    return status;
  }
  return {0, ""};
}

uint64_t workspace_size(const DeviceState* state, const PageLayout& layout, int num_heads, int64_t, int64_t) {
  // Independent of the batch and the context: partial results of the CTAs that are resident at once.
  uint64_t bytes = 0;
  for (const int tokens : {1, kMaxDecodeQueryLen}) {
    bytes = std::max(bytes, decode_workspace(*state, *find_decode(layout, tokens * group_of(layout, num_heads))).total);
  }
  return bytes;
}

KernelStatus attend(DeviceState* state, const AttendParams& p) {
  if (p.num_seqs == 0 || p.num_tokens == 0) return {0, ""};
  state->attend_calls += 1;
  state->query_tokens += static_cast<uint64_t>(p.num_tokens);
  if (const KernelStatus s = launch_decode(state, p, std::min(p.max_query_len, kMaxDecodeQueryLen)); s.code != 0) {
    return s;
  }
  if (p.max_query_len <= kMaxDecodeQueryLen) return {0, ""};
  return launch_prefill(state, p, kMaxDecodeQueryLen + 1);
}

KernelStatus store_kv(DeviceState* state, const StoreParams& p) {
  state->store_calls += 1;
  state->stored_tokens += static_cast<uint64_t>(p.num_tokens);
  if (p.num_tokens == 0) return {0, ""};
  const RowInstance* i = find_rows(store_instances(), p.cache.layout);
  StoreArgs a = {};
  a.store = p;
  a.book = make_device_book(p.cache.codebook);
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
  a.book = make_device_book(p.cache.codebook);
  // Rows are multiples of 16 elements, so only the buffers may be out of line.
  a.vector_out = (reinterpret_cast<uintptr_t>(p.key_out) | reinterpret_cast<uintptr_t>(p.value_out)) % 16 == 0;
  const int rows = 32 / i->lanes * row_unroll(i->lanes);
  const unsigned blocks = row_blocks(rows, p.num_tokens, p.cache.layout.num_kv_heads, kDequantThreads);
  return launch(state, i->function, dim3(blocks), kDequantThreads, 0, &a, p.stream, "the dequantization kernel");
}

KernelStatus rotate(DeviceState* state, const RotateParams& p) {
  if (p.num_tokens == 0) return {0, ""};
  const RotateInstance* i = nullptr;
  for (const RotateInstance& candidate : rotate_instances()) {
    if (i == nullptr && 16 * candidate.lanes >= p.head_dim) i = &candidate;
  }
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
