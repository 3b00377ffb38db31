// decode_memory.h - the memory of a decode launch: a CTA's shared memory and the workspace. The host allocates and the
// kernel places by these functions alone.
//
//   shared memory   [ a ring of tiles for each warp | prepared query rows | the rings' barriers ]
//   workspace       [ counters | partial results of CTAs | partial results of warps ]
//
// The counters outlive a launch, so they come first, where no instance moves them: every layer may use one workspace.
#pragma once

#include <cstdint>

#include "layout/page_layout.h"

namespace tq::cuda {

constexpr int kMaxCtas = 1024;  // of a launch, one for each multiprocessor
constexpr int kMinSlots = 2, kMaxSlots = 6;
constexpr int kMaxSlotsWithoutBulkCopies = 3;  // a ring that counts groups of copies waits for two tiles ahead
constexpr int kStaticSharedBytes = 2048;       // of a CTA, besides what is asked for at the launch

// What the memory of an instance depends on.
struct DecodeTraits {
  int columns;        // query columns of a row
  int atoms;          // of a tile
  int max_warps;      // of a CTA
  int dump_pitch;     // floats of a column of a partial result
  int query_bytes;    // of a prepared row
  int query_vectors;  // that a warp prepares at once

  TQ_HOST_DEVICE constexpr int tile_bytes(int atom_bytes) const { return atoms * atom_bytes; }
  // A partial result ("dump") of a row.
  TQ_HOST_DEVICE constexpr int dump_floats() const { return columns * dump_pitch; }
  // Rows that a CTA of so many warps prepares together.
  TQ_HOST_DEVICE constexpr int shared_rows(int warps) const { return warps * query_vectors / columns; }

  // A warp's ring, which holds a dump in the end.
  TQ_HOST_DEVICE constexpr int ring_bytes(int slots, int atom_bytes) const {
    const int ring = slots * tile_bytes(atom_bytes), dump = 4 * dump_floats();
    return ((ring > dump ? ring : dump) + 127) / 128 * 128;
  }
  // Offsets in shared memory: a row for each warp, then the shared ones; behind them a barrier for each slot.
  TQ_HOST_DEVICE constexpr int queries_offset(int warps, int slots, int atom_bytes) const {
    return warps * ring_bytes(slots, atom_bytes);
  }
  TQ_HOST_DEVICE constexpr int barriers_offset(int warps, int slots, int atom_bytes) const {
    return queries_offset(warps, slots, atom_bytes) + (warps + shared_rows(warps)) * query_bytes;
  }
  TQ_HOST_DEVICE constexpr int shared_bytes(int warps, int slots, int atom_bytes) const {
    return barriers_offset(warps, slots, atom_bytes) + warps * slots * static_cast<int>(sizeof(uint64_t));
  }

  // In floats, of the two dumps of a CTA: 0 of the row that began in an earlier one, 1 of the row that goes on.
  TQ_HOST_DEVICE constexpr int64_t cta_dump(int cta, int which) const {
    return int64_t{2 * cta + which} * dump_floats();
  }
  // Of the two of a warp: 0 of the row that ended in its stretch, 1 of a whole row within it.
  TQ_HOST_DEVICE constexpr int64_t warp_dump(int cta, int warps, int warp, int which) const {
    return int64_t{2 * (cta * warps + warp) + which} * dump_floats();
  }
};

// The counters, an int32 for each CTA, are zero between launches: the caller's zeros before the first, and since then
// each launch's own, which counts in them and leaves zeros.
constexpr uint64_t kCounterBytes = sizeof(int32_t) * kMaxCtas;

// Where the parts of a workspace begin, and its size, in bytes.
struct DecodeWorkspace {
  uint64_t of_ctas, of_warps, bytes;
};

constexpr DecodeWorkspace decode_workspace(const DecodeTraits& t, int ctas) {
  const uint64_t of_warps = kCounterBytes + sizeof(float) * static_cast<uint64_t>(t.cta_dump(ctas, 0));
  return {kCounterBytes, of_warps,
          of_warps + sizeof(float) * static_cast<uint64_t>(t.warp_dump(ctas, t.max_warps, 0, 0))};
}

}  // namespace tq::cuda
