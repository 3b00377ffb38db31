// attend.cc - cuts one attend call into tasks for the threads, and carves the caller's workspace.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "kernels/cpu/attend_task.h"
#include "kernels/cpu/device.h"

namespace tq {
namespace {

// A tile's KV range is split when it holds more than this many times the fair share of a thread: then one long sequence
// at batch 1 keeps all threads busy, while a prefill, which has tiles enough, is never split.
constexpr int kTasksPerThread = 4;
constexpr int64_t kMinSplitTokens = 4 * kChunkTokens;

// A range is split in pieces of at least the fair share total / (kTasksPerThread * threads), so there are at most twice
// as many pieces of split tiles as kTasksPerThread * threads.
int64_t max_partials(int num_threads) { return 2 * int64_t{kTasksPerThread} * num_threads; }

struct Carver {
  uint8_t* base;
  uint64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (static_cast<uint64_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
};

Partial carve_partial(Carver& carver, int rows, int dim_v) {
  Partial p;
  p.acc = carver.take<float>(int64_t{rows} * dim_v);
  p.max = carver.take<float>(rows);
  p.sum = carver.take<float>(rows);
  return p;
}

struct Tile {
  AttendTask whole;  // with the range that any of its queries sees
  int first_partial = 0;
  int num_partials = 0;  // 0: not split
};

std::vector<Tile> make_tiles(const AttendParams& p) {
  const int kv_heads = p.cache.layout.num_kv_heads;
  const int tile_tokens = tile_query_tokens(p.num_heads / kv_heads);
  std::vector<Tile> tiles;
  for (int seq = 0; seq < p.num_seqs; ++seq) {
    const int query_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
    // The last tiles of a causal prefill see most, so they go first.
    for (int first = (query_len - 1) / tile_tokens * tile_tokens; query_len > 0 && first >= 0; first -= tile_tokens) {
      const int count = std::min(tile_tokens, query_len - first);
      KvRange seen = visible_range(p, seq, query_len, first);
      for (int q = first + 1; q < first + count; ++q) {
        const KvRange range = visible_range(p, seq, query_len, q);
        seen = {std::min(seen.begin, range.begin), std::max(seen.end, range.end)};
      }
      for (int head = 0; head < kv_heads; ++head) {
        tiles.push_back({{&p, seq, head, first, count, seen.begin / kAtomTokens * kAtomTokens, seen.end, nullptr}});
      }
    }
  }
  return tiles;
}

uint64_t count_kv_reads(const AttendParams& p) {
  uint64_t reads = 0;
  for (int seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t query_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
    for (int64_t q = 0; q < query_len; ++q) {
      const KvRange range = visible_range(p, seq, query_len, q);
      reads += static_cast<uint64_t>(range.end - range.begin);
    }
  }
  return reads;
}

}  // namespace

uint64_t carve_attend_scratch(const PageLayout& layout, int rows, uint8_t* base, AttendScratch* out) {
  const int dim = layout.head_dim;
  const int dim_v = layout.head_dim_v;
  // The widest vectors (64 bytes of codes) pad most.
  const int codes_per_byte = layout.value_bits == 4 ? 2 : 4;
  const int padded_v = (dim_v / codes_per_byte + 63) / 64 * 64 * codes_per_byte;
  Carver carver{base};
  AttendScratch s;
  s.row = carver.take<float>(2 * (kMaxHeadDim + kVectorPad));
  s.query = carver.take<float>(int64_t{rows} * dim);
  s.query8 = carver.take<int8_t>(int64_t{rows} * dim * 2);
  s.query_bias = carver.take<int32_t>(rows);
  s.query_scale = carver.take<float>(rows);
  s.acc_stride = std::max(dim_v, padded_v);
  s.acc = carver.take<float>(int64_t{rows} * s.acc_stride);
  s.max = carver.take<float>(rows);
  s.sum = carver.take<float>(rows);
  s.zero_sum = carver.take<float>(rows);
  s.scores = carver.take<float>(int64_t{rows} * kChunkTokens);
  s.weights8 = carver.take<int8_t>(int64_t{rows} * 2 * kChunkTokens);
  s.weight_scale = carver.take<float>(rows);
  s.key_norm = carver.take<float>(kChunkTokens);
  s.value_scale = carver.take<float>(kChunkTokens);
  s.value_zero = carver.take<float>(kChunkTokens);
  s.key_tile = carver.take<float>(int64_t{kAtomTokens} * dim);
  s.value_tile = carver.take<float>(int64_t{kChunkTokens} * std::max(dim_v, s.acc_stride / 4));
  if (out != nullptr) *out = s;
  return carver.used;
}

uint64_t cpu_workspace_size(const DeviceState* state, const PageLayout& layout, int num_heads) {
  // Independent of the batch and the context: scratch of each thread, then the partial results of split tiles.
  const int rows = tile_rows(num_heads / layout.num_kv_heads);
  Carver partial{nullptr};
  carve_partial(partial, rows, layout.head_dim_v);
  const int threads = state->parallel_for.num_threads;
  return threads * carve_attend_scratch(layout, rows, nullptr, nullptr) + max_partials(threads) * partial.used;
}

KernelStatus cpu_attend(DeviceState* state, const AttendParams& p) {
  const PageLayout& layout = p.cache.layout;
  if (const uint64_t needed = cpu_workspace_size(state, layout, p.num_heads); p.workspace_bytes < needed) {
    return workspace_too_small(p, needed);
  }
  const int threads = state->parallel_for.num_threads;
  const int rows = tile_rows(p.num_heads / layout.num_kv_heads);
  std::vector<Tile> tiles = make_tiles(p);

  int64_t total = 0;
  for (const Tile& tile : tiles) total += tile.whole.kv_end - tile.whole.kv_begin;
  const int64_t share = std::max(kMinSplitTokens, total / (int64_t{kTasksPerThread} * threads) + 1);

  Carver carver{static_cast<uint8_t*>(p.workspace)};
  std::vector<AttendScratch> scratch(threads);
  for (AttendScratch& s : scratch) {
    carver.used += carve_attend_scratch(layout, rows, carver.base + carver.used, &s);
  }
  std::vector<Partial> partials(max_partials(threads));
  for (Partial& partial : partials) partial = carve_partial(carver, rows, layout.head_dim_v);

  std::vector<AttendTask> tasks;
  int used_partials = 0;
  for (Tile& tile : tiles) {
    const int64_t length = tile.whole.kv_end - tile.whole.kv_begin;
    const int64_t pieces = length / share;
    if (pieces < 2) {
      tasks.push_back(tile.whole);
      continue;
    }
    const int64_t step = ((length + pieces - 1) / pieces + kChunkTokens - 1) / kChunkTokens * kChunkTokens;
    tile.first_partial = used_partials;
    for (int64_t begin = tile.whole.kv_begin; begin < tile.whole.kv_end; begin += step) {
      AttendTask task = tile.whole;
      task.kv_begin = begin;
      task.kv_end = std::min(begin + step, tile.whole.kv_end);
      task.partial = &partials.at(used_partials++);
      ++tile.num_partials;
      tasks.push_back(task);
    }
  }

  for_each_index(state->parallel_for, static_cast<int64_t>(tasks.size()),
                 [&](int64_t worker, int64_t i) { run_attend_task(tasks[i], scratch[worker]); });
  if (used_partials > 0) {
    for_each_index(state->parallel_for, static_cast<int64_t>(tiles.size()), [&](int64_t worker, int64_t i) {
      const Tile& tile = tiles[i];
      if (tile.num_partials == 0) return;
      merge_partials(tile.whole, &partials[tile.first_partial], tile.num_partials, scratch[worker].row);
    });
  }
  state->attend_calls += 1;
  state->query_tokens += p.num_seqs > 0 ? p.query_start_loc[p.num_seqs] : 0;
  state->compressed_kv_reads += count_kv_reads(p);
  return {0, ""};
}

}  // namespace tq
