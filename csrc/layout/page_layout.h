// page_layout.h - where every byte of a page lies. The only file with byte offsets; constexpr, host and device.
//
//   page = num_kv_heads runs, head-major; a run = block_size / 16 atoms; an atom = 16 tokens of one KV head:
//
//     [ 16 key rows | 16 value rows | 16 fp16 key norms | 16 fp16 value scales | 16 fp16 value zeros ]
//
//   Norms exist for rotated keys; scales for uniform values, and for rotated ones, whose norms they are; zeros for
//   uniform values. The presets' bytes per token are vLLM's in-tree ones, because the engine's planner assumes them;
//   the order is ours: rows are aligned for wide loads (a 134-byte array-of-structs slot is not), and the atoms of one
//   head are contiguous for bulk copies.
//
//   Rows hold codes in token-major order:
//     8 bits  byte d is dimension d.
//     4 bits  byte d/2; even d in the low nibble.
//     3 bits  two planes: head_dim/4 bytes with bits 0-1 of code d at bit 2(d%4) of byte d/4, then head_dim/8 bytes
//     with bit 2.
//             In the second plane 32 dimensions share a little-endian 32-bit word, dimension 16h + 2i + g at bit 4i +
//             2h + g: then (low >> 2g) & 0x33333333 and (high >> ...) & 0x44444444 meet in the same nibbles, and eight
//             codes become byte-permute selectors in three operations. A trailing half unit (head_dim % 32 == 16) has
//             dimension 2i + g at bit 2i + g.
//     5 bits  two planes: bits 0-3 as 4-bit codes, then head_dim/8 bytes with bit 4. In the second plane dimension
//             16h + 8g + i of 32 is at bit 4i + 2h + g, so that (high >> (2h + g)) & 0x11111111 has the bits of word
//             2h + g of the first plane where its nibbles are. A trailing half unit has 8g + i at bit 2i + g.
//     32 bits floats (test only).
#pragma once

#include <cstdint>

#include "codec/format.h"

#if defined(__CUDACC__) || defined(__HIP__)
#define TQ_HOST_DEVICE __host__ __device__
#else
#define TQ_HOST_DEVICE
#endif

namespace tq {

constexpr int kAtomTokens = 16;
constexpr int kPageAlignment = 16;  // bytes; every row block, atom and page starts at a multiple of it

// Far beyond any model; they keep the bytes of a page and its offsets within their integers.
constexpr int kMaxHeads = 65536;      // of queries or of keys
constexpr int kMaxBlockSize = 65536;  // tokens per page

struct PageLayout {
  int key_bits;
  int value_bits;
  bool has_key_norm;
  bool has_value_scale;
  bool has_value_zero;
  int head_dim;
  int head_dim_v;
  int num_kv_heads;
  int block_size;  // tokens per page, a multiple of kAtomTokens

  TQ_HOST_DEVICE constexpr int key_row_bytes() const { return head_dim * key_bits / 8; }
  TQ_HOST_DEVICE constexpr int value_row_bytes() const { return head_dim_v * value_bits / 8; }
  TQ_HOST_DEVICE constexpr int slot_bytes() const {
    return key_row_bytes() + value_row_bytes() + (has_key_norm ? 2 : 0) + (has_value_scale ? 2 : 0) +
           (has_value_zero ? 2 : 0);
  }
  TQ_HOST_DEVICE constexpr int atom_bytes() const { return kAtomTokens * slot_bytes(); }
  TQ_HOST_DEVICE constexpr int64_t head_bytes() const { return int64_t{block_size} * slot_bytes(); }
  TQ_HOST_DEVICE constexpr int64_t page_bytes() const { return num_kv_heads * head_bytes(); }

  // Within a page: the atom of a head that holds a token of the block.
  TQ_HOST_DEVICE constexpr int64_t atom_offset(int kv_head, int token) const {
    return kv_head * head_bytes() + int64_t{token / kAtomTokens} * atom_bytes();
  }
  // Within an atom, t in [0, 16).
  TQ_HOST_DEVICE constexpr int key_row_offset(int t) const { return t * key_row_bytes(); }
  TQ_HOST_DEVICE constexpr int value_row_offset(int t) const {
    return kAtomTokens * key_row_bytes() + t * value_row_bytes();
  }
  TQ_HOST_DEVICE constexpr int key_norm_offset(int t) const {
    return kAtomTokens * (key_row_bytes() + value_row_bytes()) + 2 * t;
  }
  TQ_HOST_DEVICE constexpr int value_scale_offset(int t) const {
    return kAtomTokens * (key_row_bytes() + value_row_bytes() + (has_key_norm ? 2 : 0)) + 2 * t;
  }
  TQ_HOST_DEVICE constexpr int value_zero_offset(int t) const { return value_scale_offset(t) + 2 * kAtomTokens; }
};

constexpr PageLayout make_page_layout(const Format& format, int head_dim, int head_dim_v, int num_kv_heads,
                                      int block_size) {
  return PageLayout{
      format.key_bits,
      format.value_bits,
      format.has_key_norm(),
      format.has_value_scale(),
      format.has_value_zero(),
      head_dim,
      head_dim_v,
      num_kv_heads,
      block_size,
  };
}

// 3-bit and 5-bit rows. These functions say where everything is. Kernels take whole words apart at once instead of bit
// by bit, so four places also know the order of bits within a word, and the tests of the stores and of attention hold
// them to the functions: key_tile-inl.h and value_tile-inl.h of the CPU, where vectors of words become bytes;
// codes.cuh's join_planes and store.cuh's store_unit of the GPUs, three operations each for 16 codes.
// cuda/key_tile.cuh's load of two units at once still writes high_word_offset out.

// Where the second plane of a row begins, and in it the word of dimensions 16 * unit and on, which two units share.
TQ_HOST_DEVICE constexpr int high_plane_offset(int bits, int head_dim) { return (bits - 1) * head_dim / 8; }
TQ_HOST_DEVICE constexpr int high_word_offset(int bits, int head_dim, int unit) {
  return high_plane_offset(bits, head_dim) + (unit >> 1) * 4;
}

// Bit position, within the second plane, of the highest bit of dimension d's code.
TQ_HOST_DEVICE constexpr int high_plane_bit(int bits, int d, int head_dim) {
  const int word = d / 32;
  const int h = d % 32 / 16;
  const int i = bits == 3 ? d % 16 / 2 : d % 8;
  const int g = bits == 3 ? d % 2 : d % 16 / 8;
  if (32 * word + 32 > head_dim) return 32 * word + 2 * i + g;  // trailing half unit
  return 32 * word + 4 * i + 2 * h + g;
}

// The 16 bits of a trailing half unit, natural order, to and from their places in a full unit's word: bit 2i + g to 4i
// + g.
TQ_HOST_DEVICE constexpr uint32_t spread_half_unit(uint32_t x) {
  x = (x | x << 8) & 0x00FF00FFu;
  x = (x | x << 4) & 0x0F0F0F0Fu;
  return (x | x << 2) & 0x33333333u;
}
TQ_HOST_DEVICE constexpr uint32_t gather_half_unit(uint32_t x) {
  x &= 0x33333333u;
  x = (x | x >> 2) & 0x0F0F0F0Fu;
  x = (x | x >> 4) & 0x00FF00FFu;
  return (x | x >> 8) & 0xFFFFu;
}

// The 4-bit nc preset at head_dim 128: 134 bytes per token and head, atoms of [1024 | 1024 | 96].
static_assert(PageLayout{4, 4, true, true, true, 128, 128, 8, 64}.slot_bytes() == 134);
static_assert(PageLayout{4, 4, true, true, true, 128, 128, 8, 64}.key_norm_offset(0) == 2048);
static_assert(PageLayout{3, 3, true, true, true, 128, 128, 8, 64}.slot_bytes() == 102);
static_assert(PageLayout{5, 4, true, true, false, 128, 128, 8, 64}.slot_bytes() == 148);
static_assert(high_plane_bit(3, 79, 80) == 79 && high_plane_bit(3, 17, 80) == 3 && high_plane_bit(3, 2, 80) == 4);
static_assert(high_plane_bit(5, 79, 80) == 79 && high_plane_bit(5, 17, 80) == 6 && high_plane_bit(5, 9, 80) == 5);

static_assert([] {
  for (int bits : {3, 5}) {
    for (int d = 0; d < 16; ++d) {
      const uint32_t half = uint32_t{1} << high_plane_bit(bits, d, 16),
                     word = uint32_t{1} << high_plane_bit(bits, d, 32);
      if (spread_half_unit(half) != word || gather_half_unit(word) != half) return false;
    }
  }
  return true;
}());

}  // namespace tq
