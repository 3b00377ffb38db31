#include "planner/planner.h"

#include <algorithm>
#include <array>
#include <optional>

#include "layout/page_layout.h"
#include "planner/checked.h"
#include "planner/groups.h"
#include "planner/skip_layers.h"

namespace tq {
namespace {

constexpr int kMaxNativeHeadDim = 1 << 16;
constexpr int64_t kMaxPageBytes = int64_t{1} << 40;
constexpr int64_t kMaxModelLen = int64_t{1} << 40;
constexpr double kMaxSequenceBytes = 0x1p62;

std::string text(int64_t x) { return std::to_string(x); }

LayerKind kind_of(const LayerSpec& layer) {
  if (layer.state_bytes > 0) return LayerKind::kState;
  return layer.sliding_window > 0 ? LayerKind::kSliding : LayerKind::kFull;
}

bool same_pages(const LayerSpec& a, const LayerSpec& b) {
  return a.format == b.format && a.native_bytes == b.native_bytes && a.num_kv_heads == b.num_kv_heads &&
         a.head_dim == b.head_dim && a.head_dim_v == b.head_dim_v && a.state_bytes == b.state_bytes;
}

std::string check_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return "";
  return name + " is " + text(value) + "; it must be from " + text(low) + " to " + text(high);
}

std::string check_layer(const LayerSpec& layer, const std::string& who) {
  if (std::string s = check_range(who + ".state_bytes", layer.state_bytes, 0, kMaxPageBytes); !s.empty()) return s;
  if (layer.state_bytes > 0) return "";
  const bool packed = layer.format != nullptr;
  const int most = packed ? kMaxHeadDim : kMaxNativeHeadDim;
  if (std::string s = check_range(who + ".num_kv_heads", layer.num_kv_heads, 1, kMaxHeads); !s.empty()) return s;
  for (const auto& [name, dim] : {std::pair{".head_dim", layer.head_dim}, {".head_dim_v", layer.head_dim_v}}) {
    if (std::string s = check_range(who + name, dim, 1, most); !s.empty()) return s;
    if (packed && dim % kHeadDimMultiple != 0) {
      return who + name + " is " + text(dim) + "; a compressed layer needs a multiple of " + text(kHeadDimMultiple) +
             ", so add it to the layers to skip";
    }
  }
  if (!packed) {
    if (std::string s = check_range(who + ".native_bytes", layer.native_bytes, 1, 8); !s.empty()) return s;
  }
  return layer.sliding_window < 0
             ? who + ".sliding_window is " + text(layer.sliding_window) + "; it must not be negative"
             : "";
}

std::string check_request(std::span<const LayerSpec> layers, const PlanRequest& r) {
  if (layers.empty()) return "layers is empty; there must be at least one";
  if (r.block_size < kAtomTokens || r.block_size > kMaxBlockSize || r.block_size % kAtomTokens != 0) {
    return "block_size is " + text(r.block_size) + " tokens; it must be a multiple of " + text(kAtomTokens) + " from " +
           text(kAtomTokens) + " to " + text(kMaxBlockSize);
  }
  if (r.max_block_size != 0) {
    if (std::string s = check_range("max_block_size", r.max_block_size, r.block_size, kMaxBlockSize); !s.empty()) {
      return s + ", or 0";
    }
  }
  if (r.memory_bytes < 0) return "memory_bytes is " + text(r.memory_bytes) + "; it must not be negative";
  if (std::string s = check_range("max_model_len", r.max_model_len, 0, kMaxModelLen); !s.empty()) return s;
  if (std::string s = check_range("max_in_flight_tokens", r.max_in_flight_tokens, 0, kMaxModelLen); !s.empty()) {
    return s;
  }
  if (std::string s = check_range("blocks_per_state", r.blocks_per_state, 1, 1024); !s.empty()) return s;

  std::vector<int32_t> targets;
  for (const LayerSpec& layer : layers) targets.push_back(layer.kv_sharing_target);
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string who = "layers[" + std::to_string(i) + "]";
    if (std::string s = check_layer(layers[i], who); !s.empty()) return s;
    if (std::string s = check_sharing_target(targets, i); !s.empty()) return s;
    // A layer that reads another's pages must find in them what it would have written itself.
    if (targets[i] != -1 && !same_pages(layers[i], layers[targets[i]])) {
      return who + ".kv_sharing_target is " + text(targets[i]) +
             ", whose format, KV heads or head dimensions differ; layers that share pages must agree in all of them";
    }
    if (r.max_model_len == 0 && kind_of(layers[i]) != LayerKind::kFull) {
      return who +
             " has a window or a state and max_model_len is 0; how many tokens fit depends on the length of a "
             "sequence, so it must be at least 1";
    }
  }
  return "";
}

// The layers that own pages, with what does not depend on block sizes.
struct Owners {
  std::vector<int> layer;            // index of the layer
  std::vector<PageSpec> specs;       // block_size and page_bytes are filled in by each candidate
  std::vector<int64_t> token_bytes;  // 0 for a state
  std::vector<int64_t> state_bytes;  // 0 for attention
  int64_t largest_state = 0;

  int64_t content_bytes(size_t i, int block_size) const {
    return state_bytes[i] > 0 ? state_bytes[i] : times(token_bytes[i], block_size);
  }
};

Owners owners_of(std::span<const LayerSpec> layers) {
  Owners owners;
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerSpec& layer = layers[i];
    if (layer.kv_sharing_target != -1) continue;
    // The first layer with the same pages names the geometry.
    const auto first =
        std::find_if(layers.begin(), layers.end(), [&](const LayerSpec& l) { return same_pages(l, layer); });
    const LayerKind kind = kind_of(layer);
    owners.layer.push_back(static_cast<int>(i));
    owners.specs.push_back(
        {kind, static_cast<int>(first - layers.begin()), kind == LayerKind::kSliding ? layer.sliding_window : 0, 0, 0});
    owners.token_bytes.push_back(bytes_per_token(layer));
    owners.state_bytes.push_back(layer.state_bytes);
    owners.largest_state = std::max(owners.largest_state, layer.state_bytes);
  }
  return owners;
}

struct Candidate {
  Strategy strategy;
  std::vector<PageSpec> specs;
  Groups groups;
  double sequence_bytes;  // that a sequence of max_model_len tokens holds; the measure of a plan
};

int64_t blocks_of(const PageSpec& spec, int64_t tokens, const PlanRequest& r) {
  switch (spec.kind) {
    case LayerKind::kState:
      return r.blocks_per_state;
    case LayerKind::kSliding:
      // One more, as a window need not begin where a page does.
      return plus(ceil_div(std::min(plus(spec.window - 1, r.max_in_flight_tokens), tokens), spec.block_size), 1);
    default:
      return ceil_div(tokens, spec.block_size);
  }
}

int64_t blocks_per_sequence(const std::vector<PageSpec>& specs, const Groups& groups, int64_t tokens,
                            const PlanRequest& r) {
  int64_t sum = 0;
  for (const auto& group : groups) sum = plus(sum, blocks_of(specs[group[0]], tokens, r));
  return sum;
}

double measure(const std::vector<PageSpec>& specs, const Groups& groups, const PlanRequest& r) {
  return static_cast<double>(bytes_per_block(specs, groups)) *
         static_cast<double>(blocks_per_sequence(specs, groups, std::max<int64_t>(r.max_model_len, 1), r));
}

void keep_better(Candidate candidate, std::optional<Candidate>* best) {
  if (!best->has_value() || candidate.sequence_bytes < (*best)->sequence_bytes) *best = std::move(candidate);
}

// Every layer with pages of block_size tokens, in pages of their own sizes.
std::vector<PageSpec> own_pages(const Owners& owners, int block_size) {
  std::vector<PageSpec> specs = owners.specs;
  for (size_t i = 0; i < specs.size(); ++i) {
    specs[i].block_size = block_size;
    specs[i].page_bytes = owners.content_bytes(i, block_size);
  }
  return specs;
}

void try_side_by_side(const Owners& owners, const PlanRequest& r, int bound, std::optional<Candidate>* best) {
  for (int block_size = r.block_size; block_size <= bound; block_size += r.block_size) {
    std::vector<PageSpec> specs = own_pages(owners, block_size);
    std::optional<Groups> groups = group_side_by_side(specs);
    // A state of odd size as the widest group would move every second block off the kernels' alignment.
    if (!groups.has_value() || bytes_per_block(specs, *groups) % kPageAlignment != 0) continue;
    const double bytes = measure(specs, *groups, r);
    keep_better({Strategy::kSideBySide, std::move(specs), std::move(*groups), bytes}, best);
  }
}

// Block sizes that divide a common multiple, each the largest whose content fits the page; the page is that of one of
// them. Prefix-cache hits come in units of the common multiple, hence the bound.
void try_equal_pages(const Owners& owners, const PlanRequest& r, int bound, std::optional<Candidate>* best) {
  std::vector<int64_t> sizes;  // distinct bytes per token
  for (const int64_t bytes : owners.token_bytes) {
    if (bytes > 0 && std::find(sizes.begin(), sizes.end(), bytes) == sizes.end()) sizes.push_back(bytes);
  }
  const Groups groups = group_equal_pages(owners.specs);
  for (int multiple = r.block_size; multiple <= bound; multiple += r.block_size) {
    std::vector<int> divisors;
    for (int d = r.block_size; d <= multiple; d += r.block_size) {
      if (multiple % d == 0) divisors.push_back(d);
    }
    for (const int64_t size : sizes) {
      for (const int block_size : divisors) {
        const int64_t page_bytes = times(size, block_size);
        if (page_bytes < owners.largest_state) continue;
        std::vector<PageSpec> specs = owners.specs;
        bool fits = true, padded = false;
        for (size_t i = 0; fits && i < specs.size(); ++i) {
          specs[i].page_bytes = page_bytes;
          specs[i].block_size = multiple;
          if (owners.token_bytes[i] > 0) {
            const auto above = std::upper_bound(divisors.begin(), divisors.end(), page_bytes / owners.token_bytes[i]);
            fits = above != divisors.begin();
            if (fits) specs[i].block_size = *(above - 1);
          }
          padded = padded || owners.content_bytes(i, specs[i].block_size) != page_bytes;
        }
        if (!fits) continue;
        const double bytes = measure(specs, groups, r);
        keep_better({padded ? Strategy::kPaddedPages : Strategy::kEqualPages, std::move(specs), groups, bytes}, best);
      }
    }
  }
}

// Why no page holds the largest state.
std::string no_plan(const Owners& owners, const PlanRequest& r, int bound) {
  std::string names;
  int64_t count = 0, widest = 0;
  for (size_t i = 0; i < owners.layer.size(); ++i) {
    widest = std::max(widest, owners.token_bytes[i]);
    if (owners.state_bytes[i] <= 0) continue;
    if (++count <= 4) names += (names.empty() ? "" : ", ") + text(owners.layer[i]);
  }
  names = "layers " + names + (count > 4 ? " and " + text(count - 4) + " more" : "");
  if (widest == 0) {
    return names + " hold states of different sizes, up to " + text(owners.largest_state) +
           " bytes, and no layer has keys and values whose page could hold them; state_bytes must be equal";
  }
  const int64_t most = times(widest, bound / r.block_size * r.block_size);
  const int64_t needed = times(ceil_div(ceil_div(owners.largest_state, widest), r.block_size), r.block_size);
  return names + " hold a state of up to " + text(owners.largest_state) +
         " bytes, and the largest page of a layer with keys and values has " + text(most) +
         " bytes at max_block_size " + text(bound) +
         (needed <= kMaxBlockSize ? "; allow " + text(needed) + " tokens or more per page, or 0 to let it be chosen"
                                  : "; no page has more than " + text(kMaxBlockSize) + " tokens");
}

// The bound of the search: the request's, or the default raised to where the narrowest layer's page holds a state.
int block_size_bound(const Owners& owners, const PlanRequest& r) {
  if (r.max_block_size != 0) return r.max_block_size;
  int64_t bound = std::max(kDefaultMaxBlockSize, r.block_size);
  for (const int64_t bytes : owners.token_bytes) {
    if (bytes > 0)
      bound = std::max(bound, times(ceil_div(ceil_div(owners.largest_state, bytes), r.block_size), r.block_size));
  }
  return static_cast<int>(std::min<int64_t>(bound, kMaxBlockSize));
}

// As engines compute it, in double: the product of the rounded quotient can fall just below a whole number.
int64_t kv_tokens(int64_t num_blocks, int64_t blocks_per_sequence, int64_t max_model_len) {
  const double tokens =
      static_cast<double>(num_blocks) / static_cast<double>(blocks_per_sequence) * static_cast<double>(max_model_len);
  if (tokens >= 0x1p63) throw OutOfRange();
  return static_cast<int64_t>(tokens);
}

void fill_capacity(const Candidate& c, const Owners& owners, const PlanRequest& r, Plan* plan) {
  plan->bytes_per_block = bytes_per_block(c.specs, c.groups);
  plan->num_blocks = r.memory_bytes / plan->bytes_per_block;
  if (r.max_model_len == 0) {
    plan->kv_tokens = times(plan->num_blocks, c.specs[0].block_size);
    plan->longest_sequence = times(std::max<int64_t>(plan->num_blocks - 1, 0), c.specs[0].block_size);
    return;
  }
  plan->blocks_per_sequence = blocks_per_sequence(c.specs, c.groups, r.max_model_len, r);
  plan->kv_tokens = kv_tokens(plan->num_blocks, plan->blocks_per_sequence, r.max_model_len);
  for (const auto& group : c.groups) {
    int64_t content = 0;
    for (const int i : group) content = plus(content, owners.content_bytes(i, c.specs[i].block_size));
    const int64_t waste = minus(plan->bytes_per_block, content);
    plan->waste_bytes = plus(plan->waste_bytes, times(waste, blocks_of(c.specs[group[0]], r.max_model_len, r)));
  }
  int64_t low = 0, high = r.max_model_len;  // low fits, more than high does not
  while (low < high) {
    const int64_t mid = low + (high - low + 1) / 2;
    if (blocks_per_sequence(c.specs, c.groups, mid, r) < plan->num_blocks) {
      low = mid;
    } else {
      high = mid - 1;
    }
  }
  plan->longest_sequence = low;
}

void fill_layers(const Candidate& c, const Owners& owners, std::span<const LayerSpec> layers, Plan* plan) {
  plan->layers.resize(layers.size());
  for (size_t g = 0; g < c.groups.size(); ++g) {
    for (const int i : c.groups[g]) {
      const PageSpec& spec = c.specs[i];
      plan->layers[owners.layer[i]] = {static_cast<int>(g), spec.block_size, spec.page_bytes,
                                       minus(spec.page_bytes, owners.content_bytes(i, spec.block_size))};
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].kv_sharing_target == -1) continue;
    const LayerPlan& target = plan->layers[layers[i].kv_sharing_target];
    plan->layers[i] = {target.group, target.block_size, 0, 0};
  }
}

std::string search(std::span<const LayerSpec> layers, const PlanRequest& request, Plan* plan) {
  const Owners owners = owners_of(layers);
  const int bound = block_size_bound(owners, request);
  for (size_t i = 0; i < owners.layer.size(); ++i) {
    if (owners.content_bytes(i, bound) > kMaxPageBytes) {
      return "layers[" + text(owners.layer[i]) + "] has " + text(owners.token_bytes[i]) +
             " bytes per token; a page of " + text(bound) + " tokens must not exceed " + text(kMaxPageBytes) + " bytes";
    }
  }

  std::optional<Candidate> best;
  std::vector<PageSpec> specs = own_pages(owners, request.block_size);
  if (is_uniform(specs)) {
    Groups one(1);
    for (size_t i = 0; i < specs.size(); ++i) one[0].push_back(static_cast<int>(i));
    const double bytes = measure(specs, one, request);
    best = Candidate{Strategy::kUniform, std::move(specs), std::move(one), bytes};
  } else {
    try_equal_pages(owners, request, bound, &best);
    if (request.side_by_side) try_side_by_side(owners, request, bound, &best);
  }
  if (!best.has_value()) return no_plan(owners, request, bound);
  if (best->sequence_bytes > kMaxSequenceBytes) {
    return "a sequence of max_model_len tokens needs more than 2^62 bytes; that is no real model";
  }

  Plan found = {};
  found.strategy = best->strategy;
  found.num_groups = static_cast<int>(best->groups.size());
  fill_layers(*best, owners, layers, &found);
  fill_capacity(*best, owners, request, &found);
  *plan = std::move(found);
  return "";
}

}  // namespace

int slot_bytes(const LayerSpec& layer) {
  return make_page_layout(*layer.format, layer.head_dim, layer.head_dim_v, layer.num_kv_heads, kAtomTokens)
      .slot_bytes();
}

int64_t bytes_per_token(const LayerSpec& layer) {
  if (layer.state_bytes > 0) return 0;
  if (layer.format != nullptr) return times(slot_bytes(layer), layer.num_kv_heads);
  return times(times(layer.num_kv_heads, plus(layer.head_dim, layer.head_dim_v)), layer.native_bytes);
}

std::string plan_pages(std::span<const LayerSpec> layers, const PlanRequest& request, Plan* plan) {
  if (std::string sentence = check_request(layers, request); !sentence.empty()) return sentence;
  try {
    return search(layers, request, plan);
  } catch (const OutOfRange&) {
    return "memory_bytes is " + text(request.memory_bytes) + " and max_model_len " + text(request.max_model_len) +
           "; for these layers they must give less than 2^63 KV tokens and bytes";
  }
}

}  // namespace tq
