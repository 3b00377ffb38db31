#include "planner/groups.h"

#include <algorithm>

#include "planner/checked.h"

namespace tq {
namespace {

bool same_blocks(const PageSpec& a, const PageSpec& b) {
  return a.kind == b.kind && a.block_size == b.block_size && a.window == b.window &&
         (a.kind != LayerKind::kState || a.page_bytes == b.page_bytes);
}

bool same_pages(const PageSpec& a, const PageSpec& b) {
  return same_blocks(a, b) && a.geometry == b.geometry && a.page_bytes == b.page_bytes;
}

// Specs in the order of the layers, each in the first bucket whose first member it is like.
template <class Like>
Groups buckets_of(std::span<const PageSpec> specs, Like like) {
  Groups buckets;
  for (size_t i = 0; i < specs.size(); ++i) {
    auto found = std::find_if(buckets.begin(), buckets.end(),
                              [&](const std::vector<int>& bucket) { return like(specs[bucket[0]], specs[i]); });
    if (found == buckets.end()) found = buckets.insert(buckets.end(), std::vector<int>());
    found->push_back(static_cast<int>(i));
  }
  return buckets;
}

// Every n-th member, beginning with the i-th: stages of a pipeline then hold members of each group.
std::vector<int> every_nth(const std::vector<int>& members, int64_t i, int64_t n) {
  std::vector<int> out;
  for (auto at = static_cast<size_t>(i); at < members.size(); at += static_cast<size_t>(n)) out.push_back(members[at]);
  return out;
}

// A bucket of layers that need the same number of blocks, by page size.
struct Bucket {
  PageSpec first;
  Groups by_page_size;
  size_t size = 0;       // layers
  size_t repeats = 0;    // layers of the commonest page size
  bool balanced = true;  // as many layers of each page size

  int64_t page_bytes_of_widest(std::span<const PageSpec> specs, int64_t num_groups) const {
    int64_t sum = 0;
    for (const auto& layers : by_page_size) {
      sum = plus(sum, times(ceil_div(static_cast<int64_t>(layers.size()), num_groups), specs[layers[0]].page_bytes));
    }
    return sum;
  }
};

Bucket make_bucket(std::span<const PageSpec> specs, const std::vector<int>& members) {
  Bucket bucket{specs[members[0]], {}, members.size(), 0, true};
  for (const int i : members) {
    auto found = std::find_if(bucket.by_page_size.begin(), bucket.by_page_size.end(),
                              [&](const auto& layers) { return specs[layers[0]].page_bytes == specs[i].page_bytes; });
    if (found == bucket.by_page_size.end()) found = bucket.by_page_size.insert(found, std::vector<int>());
    found->push_back(i);
  }
  for (const auto& layers : bucket.by_page_size) {
    bucket.repeats = std::max(bucket.repeats, layers.size());
    bucket.balanced = bucket.balanced && layers.size() == bucket.by_page_size[0].size();
  }
  return bucket;
}

// The group size from floor to the largest count for which rounding every count up to a multiple adds least; the
// largest such.
size_t common_repeats(const std::vector<size_t>& counts, size_t floor) {
  const size_t largest = *std::max_element(counts.begin(), counts.end());
  size_t best = floor, best_padding = SIZE_MAX;
  for (size_t d = floor; d <= largest; ++d) {
    size_t padding = 0;
    for (const size_t n : counts) padding += (d - n % d) % d;
    if (padding <= best_padding) {
      best = d;
      best_padding = padding;
    }
  }
  return best;
}

}  // namespace

bool is_uniform(std::span<const PageSpec> specs) {
  return std::all_of(specs.begin(), specs.end(), [&](const PageSpec& s) { return same_blocks(specs[0], s); });
}

Groups group_equal_pages(std::span<const PageSpec> specs) {
  const Groups buckets = buckets_of(specs, same_pages);
  size_t least = SIZE_MAX, most = 1;
  for (const auto& bucket : buckets) {
    least = std::min(least, bucket.size());
    most = std::max(most, bucket.size());
  }
  // Few layers more than the rarest kind has are better padded than split: 12 and 13 make 2 groups, not 3.
  const size_t group_size = 2 * most < 3 * least ? most : least;
  Groups groups;
  for (const auto& bucket : buckets) {
    const int64_t num_groups = ceil_div(static_cast<int64_t>(bucket.size()), static_cast<int64_t>(group_size));
    for (int64_t i = 0; i < num_groups; ++i) groups.push_back(every_nth(bucket, i, num_groups));
  }
  return groups;
}

std::optional<Groups> group_side_by_side(std::span<const PageSpec> specs) {
  std::vector<Bucket> buckets;
  for (const auto& members : buckets_of(specs, same_blocks)) buckets.push_back(make_bucket(specs, members));

  size_t floor = 0;  // layers per group that a repeating pattern of several page sizes asks for
  std::vector<size_t> counts;
  for (const Bucket& bucket : buckets) {
    if (!bucket.balanced) continue;
    counts.push_back(bucket.repeats);
    if (bucket.by_page_size.size() > 1) floor = std::max(floor, bucket.repeats);
  }
  const size_t repeats = floor == 0 ? 0 : common_repeats(counts, floor);

  // Layers that hold few blocks per sequence are split until they fit the block that the others need anyway.
  auto is_small = [&](const Bucket& bucket) {
    return bucket.first.kind == LayerKind::kState || (repeats == 0 && bucket.first.kind == LayerKind::kSliding);
  };
  auto groups_by_pattern = [&](const Bucket& bucket) -> int64_t {
    if (!bucket.balanced || repeats == 0) return 1;
    return ceil_div(static_cast<int64_t>(bucket.repeats), static_cast<int64_t>(repeats));
  };
  int64_t anchor_bytes = 0;
  for (const Bucket& bucket : buckets) {
    const int64_t n = is_small(bucket) ? static_cast<int64_t>(bucket.size) : groups_by_pattern(bucket);
    anchor_bytes = std::max(anchor_bytes, bucket.page_bytes_of_widest(specs, n));
  }

  Groups groups;
  for (const Bucket& bucket : buckets) {
    int64_t num_groups = groups_by_pattern(bucket);
    if (is_small(bucket)) {
      const int64_t per_block = std::max<int64_t>(anchor_bytes / bucket.first.page_bytes, 1);
      num_groups = std::max(num_groups, ceil_div(static_cast<int64_t>(bucket.size), per_block));
    }
    if (num_groups > 1 && !bucket.balanced) return std::nullopt;
    for (int64_t i = 0; i < num_groups; ++i) {
      std::vector<int> group;
      for (const auto& layers : bucket.by_page_size) {
        const std::vector<int> part = every_nth(layers, i, num_groups);
        group.insert(group.end(), part.begin(), part.end());
      }
      if (group.empty()) return std::nullopt;
      groups.push_back(std::move(group));
    }
  }
  return groups;
}

int64_t bytes_per_block(std::span<const PageSpec> specs, const Groups& groups) {
  int64_t widest = 0;
  for (const auto& group : groups) {
    int64_t bytes = 0;
    for (const int i : group) bytes = plus(bytes, specs[i].page_bytes);
    widest = std::max(widest, bytes);
  }
  return widest;
}

}  // namespace tq
