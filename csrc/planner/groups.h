// groups.h - how a block pool is shared by layers that need different numbers of blocks.
//
// An engine with one pool gives each group of layers a block table of its own, and a block of the pool holds one page
// of every layer of a group. All blocks have the size of the widest group, so what a narrower one leaves is waste. The
// arithmetic is that of vLLM 0.32's v1/core/kv_cache_utils.py and 0.33's kv_cache_planning.py, on which the engine's
// own count of KV tokens rests; tests/python/test_plan_engine.py compares the two.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace tq {

enum class LayerKind : uint8_t { kFull, kSliding, kState };

// The pages of one layer that owns its pages.
struct PageSpec {
  LayerKind kind;
  int geometry;  // equal for layers whose pages hold the same things: format, heads, head dimensions
  int window;    // tokens; of sliding layers
  int block_size;
  int64_t page_bytes;
};

using Groups = std::vector<std::vector<int>>;  // indices of specs

// All layers need the same number of blocks, so one group holds them all, whatever their page sizes.
bool is_uniform(std::span<const PageSpec> specs);

// Pages are all of one size. Layers of one kind, geometry and window are split into groups of (about) as many layers as
// the rarest kind has.
Groups group_equal_pages(std::span<const PageSpec> specs);

// Pages of several sizes lie side by side in a block (the block is the outermost dimension of the cache). Empty if the
// engine would lose layers: it splits layers of several page sizes only if there are equally many of each.
std::optional<Groups> group_side_by_side(std::span<const PageSpec> specs);

// Bytes of one block: the pages of the widest group.
int64_t bytes_per_block(std::span<const PageSpec> specs, const Groups& groups);

}  // namespace tq
