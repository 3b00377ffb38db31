// decode_ring.cuh - how a warp's tiles come into shared memory: their addresses, read ahead from the block table, and
// the ring of slots that they are copied into.
//
// A piece is what one copy brings: a whole tile where a page holds whole tiles, otherwise an atom.
#pragma once

#include "kernels/cuda/decode_memory.h"
#include "kernels/cuda/schedule.cuh"

namespace tq::cuda {

// The stream of pieces of one warp: the addresses of up to 32 of them in the lanes, and the next 32 on their way.
template <class C>
struct PieceStream {
  using S = Schedule<C::kTileTokens, C::kColumns>;
  const DecodeParams& p;
  const int lane;
  Cursor* cursor;                           // in shared memory: touched once in 32 pieces
  int left;                                 // tiles not yet addressed
  const int pieces;                         // of a tile
  int used = 0, count = 0, next_count = 0;  // in tiles
  const uint8_t* address = nullptr;
  int next_block = 0;
  int64_t next_offset = 0;

  TQ_DEVICE PieceStream(const DecodeParams& params, Cursor* c, int tiles, int lane_)
      : p(params),
        lane(lane_),
        cursor(c),
        left(tiles),
        pieces(params.attend.cache.layout.block_size % C::kTileTokens == 0 ? 1 : C::kAtoms) {
    prefetch();
  }

  TQ_DEVICE void prefetch() {
    next_count = 0;
    if (left <= 0) return;
    const AttendParams& a = p.attend;
    Cursor c = *cursor;
    if (c.tile == c.q.tiles) S::next_row(p, c);
    next_count = min(min(32 / pieces, c.q.tiles - c.tile), left);
    // Beyond the sequence's last piece that one is read again, and masked.
    const int tokens = C::kTileTokens / pieces;
    const int last = max(c.q.first, (c.q.len - 1) / tokens * tokens);
    const int token = min(c.q.first + c.tile * C::kTileTokens + lane * tokens, last);
    const PageLayout& layout = a.cache.layout;
    const int entry = p.block_size.divide(token);
    const int head = p.kv_heads.rest(c.row);
    next_block = a.block_table[c.seq * a.block_table_stride + entry];
    next_offset = layout.atom_offset(head, token - entry * layout.block_size);
    c.tile += next_count;
    left -= next_count;
    __syncwarp();
    if (lane == 0) *cursor = c;
    __syncwarp();
  }

  // Makes the addresses of the next tile's pieces available: piece i is in lane `at() + i`.
  TQ_DEVICE bool advance() {
    if (used == count) {
      if (next_count == 0) return false;
      // A block that does not exist is a caller's error that a GPU cannot report; it must not become a wild read.
      const int64_t block = min(max(int64_t{next_block}, int64_t{0}), p.attend.cache.num_blocks - 1);
      address = p.attend.cache.data + block * p.attend.cache.block_stride + next_offset;
      count = next_count;
      used = 0;
      prefetch();
    }
    ++used;
    return true;
  }
  TQ_DEVICE int at() const { return (used - 1) * pieces; }
};

template <class C>
struct Ring {
  const uint32_t data, barriers;  // addresses in shared memory
  const int slots, slot_bytes, lane;
  uint32_t head, tail;  // next slot to fill, next to read
  uint32_t head_barrier, tail_barrier;
  uint32_t parity = 0;

  TQ_DEVICE Ring(uint8_t* ring_data, uint64_t* ring_barriers, int num_slots, int bytes, int lane_)
      : data(opaque(shared_address(ring_data))),
        barriers(opaque(shared_address(ring_barriers))),
        slots(num_slots),
        slot_bytes(bytes),
        lane(lane_),
        head(data),
        tail(data),
        head_barrier(barriers),
        tail_barrier(barriers) {
#if TQ_HAS_BULK_COPY
    static_assert(kMaxSlots <= 32);
    if (lane < slots) ring_init(barriers + 8 * lane);
    ring_init_done();
    __syncwarp();
#endif
  }

  // Fills the next slot if the stream goes on.
  TQ_DEVICE void fill_next(PieceStream<C>& stream) {
    if (!stream.advance()) {
      async_copy_commit();  // wait() counts groups
      return;
    }
    const int bytes = stream.pieces == 1 ? slot_bytes : slot_bytes / C::kAtoms;
#if TQ_HAS_BULK_COPY
    if (lane == 0) ring_expect(head_barrier, slot_bytes);
    const int i = lane - stream.at();
    if (i >= 0 && i < stream.pieces) ring_copy(head + i * bytes, stream.address, bytes, head_barrier);
#else
    for (int i = 0; i < stream.pieces; ++i) {
      const auto address = reinterpret_cast<uint64_t>(stream.address);
      const uint32_t lo = __shfl_sync(kFullMask, static_cast<uint32_t>(address), stream.at() + i);
      const uint32_t hi = __shfl_sync(kFullMask, static_cast<uint32_t>(address >> 32), stream.at() + i);
      const auto* from = reinterpret_cast<const uint8_t*>(uint64_t{hi} << 32 | lo);
      for (int b = 16 * lane; b < bytes; b += 512) async_copy_16(head + i * bytes + b, from + b);
    }
    async_copy_commit();
#endif
    head += slot_bytes;
    head_barrier += 8;
    if (head_barrier == barriers + 8 * slots) {
      head = data;
      head_barrier = barriers;
    }
  }

  // The address of the oldest filled slot, whose data has landed. Without bulk copies `slots` groups of copies are
  // under way, the oldest of which must have landed.
  TQ_DEVICE uint32_t wait() {
#if TQ_HAS_BULK_COPY
    ring_wait(tail_barrier, parity);
#else
    static_assert(kMinSlots == 2 && kMaxSlotsWithoutBulkCopies == 3);
    if (slots > 2) {
      async_copy_wait<2>();
    } else {
      async_copy_wait<1>();
    }
    __syncwarp();
#endif
    return tail;
  }

  TQ_DEVICE void release() {
    __syncwarp();
    tail += slot_bytes;
    tail_barrier += 8;
    if (tail_barrier == barriers + 8 * slots) {
      tail = data;
      tail_barrier = barriers;
      parity ^= 1;
    }
  }
};

}  // namespace tq::cuda
