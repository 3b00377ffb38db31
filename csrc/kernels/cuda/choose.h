// choose.h - which kernels of the tables serve a layer, and the shape of a decode launch. The order of a table does not
// matter.
#pragma once

#include <algorithm>
#include <tuple>

#include "kernels/cuda/instances.h"

namespace tq::cuda {

constexpr int largest_dim(const PageLayout& layout) { return std::max(layout.head_dim, layout.head_dim_v); }

// The row of the smallest size, or null. size(row): negative where it does not serve; never the same for two that do.
template <class Instance, class Size>
constexpr const Instance* smallest(std::span<const Instance> table, const Size& size) {
  const Instance* best = nullptr;
  for (const Instance& i : table) {
    if (size(i) >= 0 && (best == nullptr || size(i) < size(*best))) best = &i;
  }
  return best;
}

// The kernels of one layer's decode calls, or nulls.
struct DecodeKernels {
  const DecodeInstance *narrow, *wide;  // of the fewest and of the most query columns; may be the same

  constexpr const DecodeInstance& of(int columns) const { return columns <= narrow->traits.columns ? *narrow : *wide; }
};

// One with the layer's own dimensions before one for a range of them, then the smallest range.
constexpr DecodeKernels find_decode(std::span<const DecodeInstance> table, const PageLayout& layout) {
  DecodeKernels found = {nullptr, nullptr};
  auto fit = [](const DecodeInstance& i) { return std::tuple(!i.exact, i.dim); };
  for (const DecodeInstance& i : table) {
    if (i.exact ? i.dim != layout.head_dim || i.dim != layout.head_dim_v : i.dim < largest_dim(layout)) continue;
    if (found.narrow == nullptr || fit(i) < fit(*found.narrow)) {
      found = {&i, &i};
    } else if (fit(i) == fit(*found.narrow)) {
      if (i.traits.columns < found.narrow->traits.columns) found.narrow = &i;
      if (i.traits.columns > found.wide->traits.columns) found.wide = &i;
    }
  }
  return found;
}

constexpr const PrefillInstance* find_prefill(std::span<const PrefillInstance> table, const PageLayout& layout) {
  return smallest(table, [&](const PrefillInstance& i) {
    return i.format == gpu::traits_of(layout) && i.dim >= largest_dim(layout) ? i.dim : -1;
  });
}

// Vectors of 16 * lanes dimensions hold the layer's.
constexpr const RowInstance* find_rows(std::span<const RowInstance> table, const PageLayout& layout) {
  return smallest(table, [&](const RowInstance& i) {
    return i.format == gpu::traits_of(layout) && 16 * i.lanes >= largest_dim(layout) ? i.lanes : -1;
  });
}

constexpr const RotateInstance* find_rotate(std::span<const RotateInstance> table, int head_dim) {
  return smallest(table, [&](const RotateInstance& i) { return 16 * i.lanes >= head_dim ? i.lanes : -1; });
}

// Of a decode launch.
struct DecodeShape {
  int warps, slots, shared_bytes;
};

constexpr int kRingBytes = 160 * 1024;  // of all warps; deeper rings read slower (docs/kernels.md)

// The most warps, and the deepest rings, that fit; all zero where nothing does.
constexpr DecodeShape decode_shape(const DecodeTraits& t, int atom_bytes, int shared_limit, bool bulk_copies) {
  const int tile = t.tile_bytes(atom_bytes);
  for (int warps = t.max_warps; warps >= 1; warps = warps > 4 ? warps - 4 : warps / 2) {
    for (int slots = bulk_copies ? kMaxSlots : kMaxSlotsWithoutBulkCopies; slots >= kMinSlots; --slots) {
      if (slots > kMinSlots && warps * slots * tile > kRingBytes) continue;
      if (slots == kMinSlots && warps > 4 && bulk_copies && kMinSlots * tile * warps < 48 * 1024) continue;
      const int bytes = t.shared_bytes(warps, slots, atom_bytes);
      if (bytes <= shared_limit) return {warps, slots, bytes};
    }
  }
  return {0, 0, 0};
}

}  // namespace tq::cuda
