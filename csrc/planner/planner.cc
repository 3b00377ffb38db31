#include "planner/planner.h"

#include <limits>
#include <map>

#include "layout/page_layout.h"
#include "planner/skip_layers.h"

namespace tq {
namespace {

PageLayout layout_of(const LayerSpec& layer, int block_size) {
  return make_page_layout(*layer.format, layer.head_dim, layer.head_dim_v, layer.num_kv_heads, block_size);
}

// A layer that reads another's pages must find in them what it would have written itself.
std::string check_sharing(std::span<const LayerSpec> layers, std::span<const int32_t> targets, size_t i) {
  if (std::string sentence = check_sharing_target(targets, i); !sentence.empty()) return sentence;
  if (targets[i] == -1) return "";
  const LayerSpec& a = layers[i];
  const LayerSpec& b = layers[targets[i]];
  if (a.format->id != b.format->id || a.num_kv_heads != b.num_kv_heads || a.head_dim != b.head_dim ||
      a.head_dim_v != b.head_dim_v) {
    return "layers[" + std::to_string(i) + "].kv_sharing_target is " + std::to_string(targets[i]) +
           ", whose format, KV heads or head dimensions differ; layers that share pages must agree in all of them";
  }
  return "";
}

}  // namespace

int slot_bytes(const LayerSpec& layer) { return layout_of(layer, kAtomTokens).slot_bytes(); }

std::string plan_pages(std::span<const LayerSpec> layers, int block_size, int64_t memory_bytes, Plan* plan) {
  if (layers.empty()) return "layers is empty; there must be at least one";
  if (block_size < kAtomTokens || block_size > 65536 || block_size % kAtomTokens != 0) {
    return "block_size is " + std::to_string(block_size) + " tokens; it must be a multiple of 16 from 16 to 65536";
  }
  if (memory_bytes < 0) return "memory_bytes is " + std::to_string(memory_bytes) + "; it must not be negative";
  *plan = {};
  std::vector<int32_t> targets;
  for (const LayerSpec& layer : layers) targets.push_back(layer.kv_sharing_target);
  std::map<int64_t, int> group_of_page_bytes;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (std::string sentence = check_sharing(layers, targets, i); !sentence.empty()) return sentence;
    const int64_t page_bytes = layout_of(layers[i], block_size).page_bytes();
    const int next_group = static_cast<int>(group_of_page_bytes.size());
    const int group = group_of_page_bytes.try_emplace(page_bytes, next_group).first->second;
    const bool owns = layers[i].kv_sharing_target == -1;
    plan->layers.push_back({group, block_size, owns ? page_bytes : 0, 0});
    if (!owns) continue;
    if (plan->bytes_per_block > std::numeric_limits<int64_t>::max() - page_bytes) {
      return "layers need more than 2^63 bytes per block; that is no real model";
    }
    plan->bytes_per_block += page_bytes;
  }
  plan->num_groups = static_cast<int>(group_of_page_bytes.size());
  plan->num_blocks = memory_bytes / plan->bytes_per_block;
  plan->kv_tokens = plan->num_blocks * block_size;
  return "";
}

}  // namespace tq
