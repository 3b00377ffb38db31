// launch.cc - from a call to kernel launches: chooses instances, sizes grids.
#include <algorithm>
#include <cstdio>
#include <iterator>

#include "hip/device.h"
#include "hip/instances.h"
#include "kernels/gpu/arguments.h"
#include "kernels/gpu/formats.h"

namespace tq::hip {
namespace {

// Blocks that a device should have to work on, whatever its number of compute units (64 to 304 today; asking the
// runtime for it would need attribute numbers, which differ between versions). Fewer columns than that split the
// context.
constexpr int64_t kTargetBlocks = 512;
constexpr int64_t kMaxSplits = 64;

#define TQ_TRAITS(name, F) gpu::traits_of<gpu::F>(),
constexpr gpu::FormatTraits kFormats[] = {TQ_HIP_FORMATS(TQ_TRAITS)};
static_assert(std::size(kFormats) == kFormatCount);
// Every format but the test-only ones, which supports refuses, is in the table.
int format_of(const PageLayout& layout) {
  int row = kFormatCount - 1;
  while (row > 0 && !(kFormats[row] == gpu::traits_of(layout))) --row;
  return row;
}

// Vectors of 16 * lanes dimensions: 0 for 4 lanes, 1 for 8, 2 for 16, 3 for 32; and dimensions 64, 128, 256, 512 alike.
int size_of(int dim) { return dim <= 64 ? 0 : dim <= 128 ? 1 : dim <= 256 ? 2 : 3; }
int size_of(const PageLayout& layout) { return size_of(std::max(layout.head_dim, layout.head_dim_v)); }
int lanes_of(int size) { return 4 << size; }

int part_dim_of(const DeviceState& state, int size) { return std::min(64 << size, gpu::max_part_dim(state.wave)); }

bool aligned(const void* base, int64_t token_stride, int64_t head_stride, int bytes, int element) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && token_stride * element % bytes == 0 &&
         head_stride * element % bytes == 0;
}

int element_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

// Blocks of waves that hold `rows` rows of one of the vectors that a token has.
unsigned row_blocks(const DeviceState& state, int rows, int64_t tokens, int per_token, int threads) {
  const int64_t waves = (tokens + rows - 1) / rows * per_token;
  const int per_block = threads / state.wave;
  return static_cast<unsigned>((waves + per_block - 1) / per_block);
}

}  // namespace

KernelStatus supports(const DeviceState*, const Format& format, const PageLayout& layout) {
  KernelStatus status = {kUnimplemented, ""};
  if (format.test_only) {
    std::snprintf(status.message, sizeof(status.message),
                  "format_id is %s, which is for tests on the CPU; the HIP kernels serve all others", format.name);
    return status;
  }
  if (std::max(layout.head_dim, layout.head_dim_v) > 512) {
    std::snprintf(status.message, sizeof(status.message), "head_dim is %d; the HIP kernels serve up to 512",
                  std::max(layout.head_dim, layout.head_dim_v));
    return status;
  }
  return {0, ""};
}

uint64_t workspace_size(const DeviceState* state, const PageLayout& layout, int) {
  // Partial results of blocks that share a sequence: never more than the target, whatever the batch, but for those of
  // one tile of columns.
  const int size = size_of(layout), part_dim = part_dim_of(*state, size);
  const int64_t of_a_tile = int64_t{layout.num_kv_heads} * ((64 << size) / part_dim);
  return static_cast<uint64_t>(std::max(kTargetBlocks, of_a_tile)) * gpu::partial_floats(part_dim) * sizeof(float);
}

KernelStatus attend(DeviceState* state, const AttendParams& p) {
  if (const KernelStatus s = supports(state, p.cache.format, p.cache.layout); s.code != 0) return s;
  if (const uint64_t needed = workspace_size(state, p.cache.layout, p.num_heads); p.workspace_bytes < needed) {
    return workspace_too_small(p, needed);
  }
  if (p.num_seqs == 0 || p.num_tokens == 0) return {0, ""};
  state->attend_calls += 1;
  state->query_tokens += static_cast<uint64_t>(p.num_tokens);
  const PageLayout& layout = p.cache.layout;
  const int size = size_of(layout), part_dim = part_dim_of(*state, size), parts = (64 << size) / part_dim;
  // An upper bound: every sequence may end in a tile of columns that is not full. The real number is known on the
  // device.
  const int64_t columns = p.num_tokens * (p.num_heads / layout.num_kv_heads);
  const int64_t tiles = columns / gpu::kColumns + std::min<int64_t>(p.num_seqs, p.num_tokens);
  const int64_t blocks = tiles * layout.num_kv_heads * parts;
  gpu::AttendArgs a = {};
  a.attend = p;
  a.key_book = gpu::make_key_book(p.cache);
  a.value_book = gpu::make_value_book(p.cache);
  a.splits = static_cast<int>(std::clamp<int64_t>(kTargetBlocks / blocks, 1, kMaxSplits));
  a.partial = static_cast<float*>(p.workspace);
  const int element = element_bytes(p.dtype);
  a.vector_query = element == 2 && aligned(p.query, p.query_token_stride, p.query_head_stride, 16, element);
  a.vector_out = element == 2 && aligned(p.out, p.out_token_stride, p.out_head_stride, 8, element);
  const bool rotated = p.cache.format.rotates_values();
  const bool merges = rotated ? gpu::merges_rotated(a.splits, parts) : a.splits > 1;
  // Where all that is left is to join parts, there may be more of them than the workspace holds at once.
  const int64_t of_a_tile = int64_t{layout.num_kv_heads} * parts;
  const int64_t at_once = merges && a.splits == 1 ? std::max<int64_t>(1, kTargetBlocks / of_a_tile) : tiles;
  for (int64_t first = 0; first < tiles; first += at_once) {
    a.first_tile = static_cast<int>(first);
    const Grid grid = {static_cast<unsigned>(std::min(at_once, tiles - first)), static_cast<unsigned>(of_a_tile),
                       static_cast<unsigned>(a.splits)};
    if (const KernelStatus s = launch(state, state->attend[format_of(layout)][size], grid,
                                      gpu::kAttendWarps * state->wave, &a, p.stream, "the attention kernel");
        s.code != 0) {
      return s;
    }
    if (!merges) continue;
    const gpu::MergeArgs m = {a, part_dim, parts};
    const Grid rows = {grid.x, rotated ? static_cast<unsigned>(layout.num_kv_heads) : grid.y, 1};
    if (const KernelStatus s = launch(state, rotated ? state->merge_rotated : state->merge, rows, gpu::kMergeThreads,
                                      &m, p.stream, "the merge kernel");
        s.code != 0) {
      return s;
    }
  }
  return {0, ""};
}

KernelStatus store_kv(DeviceState* state, const StoreParams& p) {
  state->store_calls += 1;
  state->stored_tokens += static_cast<uint64_t>(p.num_tokens);
  if (p.num_tokens == 0) return {0, ""};
  const int size = size_of(p.cache.layout);
  gpu::StoreArgs a = {};
  a.store = p;
  a.key_book = gpu::make_key_book(p.cache);
  a.value_book = gpu::make_value_book(p.cache);
  const int element = element_bytes(p.dtype);
  a.vector_key = element == 2 && aligned(p.key, p.key_token_stride, p.key_head_stride, 16, element);
  a.vector_value = element == 2 && aligned(p.value, p.value_token_stride, p.value_head_stride, 16, element);
  const unsigned blocks = row_blocks(*state, state->wave / lanes_of(size), p.num_tokens,
                                     2 * p.cache.layout.num_kv_heads, gpu::kStoreThreads);
  return launch(state, state->store[format_of(p.cache.layout)][size], {blocks, 1, 1}, gpu::kStoreThreads, &a, p.stream,
                "the store kernel");
}

KernelStatus dequant_kv(DeviceState* state, const DequantParams& p) {
  if (p.num_seqs == 0 || p.num_tokens == 0 || (p.key_out == nullptr && p.value_out == nullptr)) return {0, ""};
  const int size = size_of(p.cache.layout);
  gpu::DequantArgs a = {};
  a.dequant = p;
  a.key_book = gpu::make_key_book(p.cache);
  a.value_book = gpu::make_value_book(p.cache);
  // Rows are multiples of 16 elements, so only the buffers may be out of line.
  a.vector_out = (reinterpret_cast<uintptr_t>(p.key_out) | reinterpret_cast<uintptr_t>(p.value_out)) % 16 == 0;
  const int rows = state->wave / lanes_of(size) * gpu::row_unroll(lanes_of(size));
  const unsigned blocks = row_blocks(*state, rows, p.num_tokens, p.cache.layout.num_kv_heads, gpu::kDequantThreads);
  return launch(state, state->dequant[format_of(p.cache.layout)][size], {blocks, 1, 1}, gpu::kDequantThreads, &a,
                p.stream, "the dequantization kernel");
}

KernelStatus rotate(DeviceState* state, const RotateParams& p) {
  if (p.num_tokens == 0) return {0, ""};
  const int size = size_of(p.head_dim);
  gpu::RotateArgs a = {};
  a.rotate = p;
  const int element = element_bytes(p.dtype);
  a.vector_x = element == 2 && aligned(p.x, p.x_token_stride, p.x_head_stride, 16, element);
  a.vector_out = element == 2 && aligned(p.out, p.out_token_stride, p.out_head_stride, 16, element);
  const int vectors = state->wave / lanes_of(size) * gpu::row_unroll(lanes_of(size));
  const unsigned blocks = row_blocks(*state, vectors, p.num_tokens * p.num_heads, 1, gpu::kRotateThreads);
  return launch(state, state->rotate[size], {blocks, 1, 1}, gpu::kRotateThreads, &a, p.stream, "the rotation kernel");
}

KernelStatus copy_pages(DeviceState* state, const CopyParams& p) {
  if (p.num_pairs == 0) return {0, ""};
  const int64_t chunks = p.cache.layout.page_bytes() / 16;
  const auto y = static_cast<unsigned>(std::clamp<int64_t>(chunks / 1024, 1, 16));
  return launch(state, state->copy_pages, {static_cast<unsigned>(p.num_pairs), y, 1}, gpu::kCopyThreads, &p, p.stream,
                "the page copy kernel");
}

}  // namespace tq::hip
