// planner.h - bytes per token, page bytes and KV tokens for a memory budget: integers in, integers out.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "codec/format.h"

namespace tq {

struct LayerSpec {
  const Format* format;
  int num_kv_heads;
  int head_dim;
  int head_dim_v;
  int kv_sharing_target;  // index of the layer whose pages are read, or -1
};

struct LayerPlan {
  int group;  // layers of one group have pages of one size
  int block_size;
  int64_t page_bytes;  // 0 for a layer that reads another layer's pages
  int64_t padding_bytes;
};

struct Plan {
  std::vector<LayerPlan> layers;
  int num_groups;
  int64_t bytes_per_block;  // one page of every layer
  int64_t num_blocks;       // that fit in the memory
  int64_t kv_tokens;
};

int slot_bytes(const LayerSpec& layer);  // of one token and one KV head

// Returns an empty string and fills plan, or one sentence that names the argument, what came and what is allowed.
std::string plan_pages(std::span<const LayerSpec> layers, int block_size, int64_t memory_bytes, Plan* plan);

}  // namespace tq
