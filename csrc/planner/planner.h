// planner.h - block sizes, page sizes and KV tokens of a model whose layers need not be alike: integers in, integers
// out.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "codec/format.h"

namespace tq {

constexpr int kDefaultMaxBlockSize = 1024;

struct LayerSpec {
  const Format* format;  // nullptr: the engine's native cache
  int native_bytes;      // of one element of a native cache
  int num_kv_heads;
  int head_dim;
  int head_dim_v;
  int sliding_window;     // 0: full attention
  int64_t state_bytes;    // > 0: a recurrent state of so many bytes instead of keys and values (Mamba, GDN)
  int kv_sharing_target;  // index of the layer whose pages are read, or -1
};

struct PlanRequest {
  int block_size;         // tokens of the smallest page; every other page has a multiple of it
  int max_block_size;     // bound of the common multiple of block sizes; 0: kDefaultMaxBlockSize or what a state needs
  int64_t memory_bytes;   // for all pages of all layers
  int64_t max_model_len;  // of one sequence; 0: not known, which only a model without windows and states allows
  int64_t max_in_flight_tokens;  // scheduled and not yet settled: a window's old pages are freed only behind them
  int blocks_per_state;          // of one sequence; more than 1 with checkpoints or speculation
  bool side_by_side;             // pages of several sizes may share a block (the block is the outermost dimension)
};

// How pages of several sizes come to share a pool of blocks, in the order of preference at the same memory.
enum class Strategy : uint8_t {
  kUniform = 1,     // one group: every layer needs as many blocks as any other, and pages keep their own sizes
  kSideBySide = 2,  // several groups, pages keep their own sizes
  kEqualPages = 3,  // block sizes make all pages equal
  kPaddedPages = 4  // block sizes make all pages nearly equal, the rest is padding
};

struct LayerPlan {
  int group;
  int block_size;         // of a state: the tokens that the engine counts per page, which is not part of its size
  int64_t page_bytes;     // 0 for a layer that reads another layer's pages
  int64_t padding_bytes;  // of page_bytes, unused
};

struct Plan {
  std::vector<LayerPlan> layers;
  Strategy strategy;
  int num_groups;
  int64_t bytes_per_block;      // one page of every layer of the widest group
  int64_t num_blocks;           // that fit in the memory
  int64_t kv_tokens;            // as an engine reports them: sequences of max_model_len that fit, times max_model_len
  int64_t blocks_per_sequence;  // of max_model_len tokens; 0 if that is not known
  int64_t waste_bytes;          // in those blocks: padding, and what groups narrower than the widest leave
  int64_t longest_sequence;     // <= max_model_len, beside the one block that engines keep back
};

int64_t bytes_per_token(const LayerSpec& layer);  // 0 for a state
int slot_bytes(const LayerSpec& layer);           // of one token and one KV head of a compressed layer

// The plan with which one sequence of max_model_len tokens needs the least memory. Returns an empty string and fills
// plan, or one sentence that names the argument, what came and what is allowed.
std::string plan_pages(std::span<const LayerSpec> layers, const PlanRequest& request, Plan* plan);

}  // namespace tq
