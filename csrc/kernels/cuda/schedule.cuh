// schedule.cuh - who reads which tokens in a decode launch. Computed by every warp from the lengths in device memory,
// so that a captured graph serves any lengths at replay and nothing is read back to the host.
//
// A row is (sequence, KV head, tile of query columns); it reads the sequence's visible tokens in tiles of a fixed
// number. All tiles of all rows form one line, sequence-major; each CTA takes a stretch of it (stretches.h), each warp
// an equal part of that, and only partial results of rows that cross a border are merged.
#pragma once

#include "kernels/cuda/stretches.h"
#include "kernels/gpu/device_book.h"
#include "kernels/gpu/row_lanes.cuh"
#include "kernels/kernels.h"

namespace tq::cuda {

struct DecodeParams {
  AttendParams attend;
  DeviceBook key_book, value_book;
  Divisor group, kv_heads, block_size, grid, warps;  // group: query heads of a KV head
  Deal deal;
  uint32_t* counters;         // the workspace, as decode_memory.h divides it
  float *of_ctas, *of_warps;  // dumps
  int slots;                  // of a warp's ring, in tiles
  int max_query_len;          // longer sequences are another kernel's
  int min_tiles;              // of a CTA: less is not worth a merge
  bool vector_query, vector_out;
};

// Reads a word of each 64 bytes.
TQ_DEVICE void touch_arguments(const DecodeParams& p) {
  const auto* words = reinterpret_cast<const uint32_t*>(&p);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(DecodeParams) / 4); i += 16) touch(words[i]);
}

struct Sequence {
  int q_start, q_len, len;
  int first;  // first token of the first tile, a multiple of a tile's
  int tiles;  // of one row
  int rows;   // KV heads * column tiles
};

template <int kTileTokens, int kColumns>
TQ_DEVICE Sequence read_sequence(const DecodeParams& p, int s) {
  const AttendParams& a = p.attend;
  Sequence q = {};
  if (s >= a.num_seqs) return q;
  q.q_start = a.query_start_loc[s];
  q.q_len = a.query_start_loc[s + 1] - q.q_start;
  q.len = a.seq_lens[s];
  if (q.q_len <= 0 || q.q_len > p.max_query_len) {
    q.q_len = 0;
    return q;
  }
  if (a.sliding_window > 0 && a.spans == nullptr) {
    q.first = max(0, q.len - q.q_len - a.sliding_window + 1) / kTileTokens * kTileTokens;
  }
  q.tiles = max(1, (q.len - q.first + kTileTokens - 1) / kTileTokens);
  const int columns = q.q_len * static_cast<int>(p.group.value);
  q.rows = static_cast<int>(p.kv_heads.value) * ((columns + kColumns - 1) / kColumns);
  return q;
}

// A position on the line: tile `tile` of row `row` of sequence `seq`.
struct Cursor {
  int seq, row, tile;
  Sequence q;
};

template <int kTileTokens, int kColumns>
struct Schedule {
  Sequence first;  // sequence `lane`
  int first_end;   // tiles of sequences 0 to `lane`
  int total;       // tiles of the whole launch
  int row;         // tiles of each row of it, 0 if they differ

  TQ_DEVICE Schedule(const DecodeParams& p, int lane) {
    first = read_sequence<kTileTokens, kColumns>(p, lane);
    first_end = running_sum(first.tiles * first.rows, lane);
    total = __shfl_sync(kFullMask, first_end, 31);
    row = __shfl_sync(kFullMask, first.tiles, 0);
    int sum = 0;
    bool same = first.rows == 0 || first.tiles == row;
    for (int s = lane + 32; s < p.attend.num_seqs; s += 32) {
      const Sequence q = read_sequence<kTileTokens, kColumns>(p, s);
      sum += q.tiles * q.rows;
      same = same && (q.rows == 0 || q.tiles == row);
    }
    if (!__all_sync(kFullMask, same)) row = 0;
    if (p.attend.num_seqs > 32) total += reduce_row<32>(sum, [](int a, int b) { return a + b; });
  }

  TQ_DEVICE static int running_sum(int x, int lane) {
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int below = __shfl_up_sync(kFullMask, x, o);
      if (lane >= o) x += below;
    }
    return x;
  }

  // The cursor at tile `target` of the line, which exists.
  TQ_DEVICE Cursor find(const DecodeParams& p, int target, int lane) const {
    Sequence q = first;
    int end = first_end;
    for (int base = 0;; base += 32) {
      const unsigned past = __ballot_sync(kFullMask, end > target);
      if (past != 0) {
        const int owner = __ffs(past) - 1;
        auto of_owner = [owner](int x) { return __shfl_sync(kFullMask, x, owner); };
        Cursor c;
        c.seq = base + owner;
        c.q = {of_owner(q.q_start), of_owner(q.q_len), of_owner(q.len),
               of_owner(q.first),   of_owner(q.tiles), of_owner(q.rows)};
        const int offset = target - of_owner(end - q.tiles * q.rows);
        c.row = offset / c.q.tiles;
        c.tile = offset - c.row * c.q.tiles;
        return c;
      }
      target -= __shfl_sync(kFullMask, end, 31);
      q = read_sequence<kTileTokens, kColumns>(p, base + 32 + lane);
      end = running_sum(q.tiles * q.rows, lane);
    }
  }

  // To the first tile of the next row; there must be one.
  TQ_DEVICE static void next_row(const DecodeParams& p, Cursor& c) {
    c.tile = 0;
    if (++c.row < c.q.rows) return;
    c.row = 0;
    do c.q = read_sequence<kTileTokens, kColumns>(p, ++c.seq);
    while (c.q.rows == 0);
  }
};

}  // namespace tq::cuda
