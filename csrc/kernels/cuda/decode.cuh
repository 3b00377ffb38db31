// decode.cuh - attention of a few query tokens per sequence (decode, multi-token verify) over compressed pages.
//
// One CTA per multiprocessor, warps that work alone: each copies its own stretch of atoms into its own ring in shared
// memory, scores them, and keeps its own running softmax and output; only what crosses a border is merged
// (decode_merge.cuh). No barrier is inside the loop, and a page of 16 tokens costs what a page of 128 does.
#pragma once

#include "kernels/cuda/decode_merge.cuh"
#include "kernels/cuda/decode_ring.cuh"
#include "kernels/cuda/decode_warp.cuh"

namespace tq::cuda {

constexpr int kFoldTokens = 512;  // of a warp, between two calls of fold_zeros

// What a CTA has besides the memory of decode_memory.h. A lane looks at each warp, and at each row.
template <class C>
struct DecodeShared {
  static constexpr int kRows = C::traits().shared_rows(C::kWarps);
  static_assert(C::kWarps <= 32 && kRows >= 1 && kRows <= 32);
  Fragment fragments[C::kWarps];
  Cursor cursors[C::kWarps];
  int prepared_rows[kRows];  // a row is named by its first tile on the line
  MergeShared merge;
};

template <class C>
__global__ void __launch_bounds__(C::kWarps * 32, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  using S = Schedule<C::kTileTokens, C::kColumns>;
  using Warp = DecodeWarp<C>;
  constexpr int kFoldTiles = kFoldTokens / C::kTileTokens;
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ DecodeShared<C> shared;
  static_assert(sizeof(DecodeShared<C>) <= kStaticSharedBytes);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const typename Warp::Shape shape(p.attend.cache.layout);
  const int slot_bytes = C::traits().tile_bytes(shape.atom_bytes());
  const int ring_bytes = C::traits().ring_bytes(p.slots, shape.atom_bytes());
  uint8_t* queries = smem + C::traits().queries_offset(warps, p.slots, shape.atom_bytes());
  auto area = [&](int i) { return QueryArea<C>{queries + i * C::kAreaBytes}; };
  auto* barriers = reinterpret_cast<uint64_t*>(smem + C::traits().barriers_offset(warps, p.slots, shape.atom_bytes())) +
                   warp * p.slots;

  // Arguments are read while the grid before this one ends: each line of them is a miss in a fresh multiprocessor.
  touch_arguments(p);
  wait_for_previous_grid();
  let_next_grid_launch();
  const S schedule(p, lane);
  const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  const auto stretches =
      Stretches::make(p.deal, schedule.total, p.grid.divide(schedule.total + ctas - 1), schedule.row, p.min_tiles);
  const int cta_begin = stretches.begin(cta), cta_end = stretches.end(cta);
  if (cta_begin == cta_end) return;
  // No warp before the last one with tiles may have none: the merge takes neighbours for neighbours on the line.
  const int tiles = cta_end - cta_begin;
  const int begin = cta_begin + (tiles < warps ? min(warp, tiles) : p.warps.divide(tiles * warp));
  const int end = cta_begin + (tiles < warps ? min(warp + 1, tiles) : p.warps.divide(tiles * (warp + 1)));

  // This warp's part of the CTA's first rows. It asks for the query before anything is copied: behind the rings' first
  // copies, which fill the memory's queues, it would arrive microseconds later.
  const int shared_rows = C::traits().shared_rows(warps);
  const int vector = warp * C::kQueryVectors + lane / C::kQueryLanes;
  const int query_row = warp * C::kQueryVectors / C::kColumns;
  float x[16];
  int query_row_begin = -1;
  if (query_row < shared_rows) {
    Cursor c = schedule.find(p, cta_begin, lane);
    query_row_begin = cta_begin - c.tile;
    for (int i = 0; i < query_row; ++i) {
      query_row_begin += c.q.tiles;
      if (query_row_begin >= cta_end) break;
      S::next_row(p, c);
    }
    if (query_row_begin >= cta_end) query_row_begin = -1;
    if (query_row_begin >= 0) load_query<C>(p, c, vector % C::kColumns, lane, x);
    if (lane == 0) shared.prepared_rows[query_row] = query_row_begin;
  }

  Fragment& own = shared.fragments[warp];
  if (lane == 0) own.first = own.last = -1;
  Cursor c = {};
  if (begin < end) {
    c = schedule.find(p, begin, lane);
    if (lane == 0) shared.cursors[warp] = c;
    __syncwarp();
  }
  uint8_t* ring_data = smem + warp * ring_bytes;
  Ring<C> ring(ring_data, barriers, p.slots, slot_bytes, lane);
  PieceStream<C> stream(p, &shared.cursors[warp], end - begin, lane);
  for (int i = 0; i < p.slots; ++i) ring.fill_next(stream);
  if (query_row_begin >= 0) prepare_query<C>(p, area(warps + query_row), vector % C::kColumns, lane, x);
  __syncthreads();

  Warp work(p, lane);
  for (int at = begin; at < end;) {
    const int row_begin = at - c.tile;
    const bool from_start = c.tile == 0;
    const unsigned found = __ballot_sync(kFullMask, lane < shared_rows && shared.prepared_rows[lane] == row_begin);
    if (found == 0) prepare_row<C>(p, c, area(warp), lane);
    work.start_row(c, area(found == 0 ? warp : warps + __ffs(found) - 1));
    const int stop = min(row_begin + c.q.tiles, end);
    for (; at < stop; ++at, ++c.tile) {
      work.tile(c, ring.wait());
      ring.release();
      ring.fill_next(stream);
      if (at % kFoldTiles == kFoldTiles - 1) work.fold_zeros();
    }
    const bool complete = from_start && c.tile == c.q.tiles;
    if (at == end) {  // the ring is free now
      work.dump(reinterpret_cast<float*>(ring_data));
      if (lane == 0) {
        own.last = row_begin;
        own.last_end = row_begin + c.q.tiles;
        own.last_row = output_row(p, c, C::kColumns);
      }
    } else {
      // A whole row is finished at once; it must not overwrite the row that began earlier, which waits for the merge.
      float* to = warp_dump<C>(p, warps, warp, complete ? 1 : 0);
      work.dump(to);
      __syncwarp();
      if (complete) {
        const OutputRow row = output_row(p, c, C::kColumns);
        for (int n = 0; n < row.columns; ++n) {
          Combined<C> column;
          column.read(to + n * C::kDumpPitch, lane);
          column.finish(p, row, n, lane);
        }
        __syncwarp();
      } else if (lane == 0) {
        own.first = row_begin;
        own.first_end = at;
        own.first_row = output_row(p, c, C::kColumns);
      }
      S::next_row(p, c);
    }
  }
  __syncthreads();
  merge_cta<C>(p, shared.fragments, shared.merge, smem, ring_bytes, stretches, cta_begin, cta_end, warp, warps, lane);
}

}  // namespace tq::cuda
