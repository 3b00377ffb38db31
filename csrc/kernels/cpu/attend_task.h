// attend_task.h - one unit of attention work on one thread, and the scratch memory it needs.
//
// A task is a tile of query tokens of one sequence times all query heads of one KV head ("Pack-GQA": they read the same
// pages), over a range of KV tokens. A range that is a part of what the tile sees ("split-KV") leaves a partial result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kernels.h"

namespace tq {

constexpr int kChunkTokens = 64;  // KV tokens between two updates of the running softmax
constexpr int kMaxTileRows = 64;  // query tokens x query heads of a tile, if one token has no more heads than that
constexpr int kVectorPad = 64;    // elements of slack behind a row

inline int tile_query_tokens(int heads_per_kv_head) {
  return heads_per_kv_head >= kMaxTileRows ? 1 : kMaxTileRows / heads_per_kv_head;
}
inline int tile_rows(int heads_per_kv_head) { return tile_query_tokens(heads_per_kv_head) * heads_per_kv_head; }

// Softmax state of a tile over a part of its KV range. Rows are r = query token * heads_per_kv_head + head.
struct Partial {
  float* acc;  // [rows, head_dim_v], not normalised
  float* max;  // [rows], -inf if the row saw nothing
  float* sum;  // [rows], sum of exp(score - max)
};

struct AttendTask {
  const AttendParams* params;
  int seq;
  int kv_head;
  int first_query;  // of the tile, in the sequence's query tokens
  int num_queries;
  int64_t kv_begin;  // [kv_begin, kv_end), kv_begin a multiple of kAtomTokens
  int64_t kv_end;
  const Partial* partial;  // null: this task sees the whole range and writes out and lse
};

// The positions that query token q (of the query_len of sequence seq, with seq_len tokens) may see: [begin, end). The
// causal range and each bidirectional span that q lies in contain q itself, so that together they are one range. A span
// may end behind the sequence: a chunk of a prefill has only the beginning of an image.
struct KvRange {
  int64_t begin;
  int64_t end;
};
inline KvRange visible_range(const AttendParams& p, int seq, int64_t query_len, int64_t q) {
  const int64_t seq_len = p.seq_lens[seq];
  const int64_t position = seq_len - query_len + q;
  KvRange range;
  range.begin = p.sliding_window > 0 && position + 1 > p.sliding_window ? position + 1 - p.sliding_window : 0;
  range.end = p.causal ? position + 1 : seq_len;
  for (int i = 0; i < p.max_spans; ++i) {
    const int32_t* span = p.spans + (int64_t{seq} * p.max_spans + i) * 2;
    if (position < span[0] || position >= span[1]) continue;
    range.begin = std::min<int64_t>(range.begin, std::max(span[0], 0));
    range.end = std::max(range.end, std::min<int64_t>(span[1], seq_len));
  }
  return range;
}

// Scratch of one thread, carved out of the caller's workspace. Sizes in elements; every array starts at 64 bytes.
struct AttendScratch {
  float* row;           // [2, kMaxHeadDim + pad] rows being converted
  float* query;         // [rows, head_dim] queries (float keys only)
  int8_t* query8;       // [rows, head_dim / 4, 2 planes, 4] quantized queries (coded keys only)
  int32_t* query_bias;  // [rows] what the level offset added to an integer score, negated
  float* query_scale;   // [rows] what an integer or float score is multiplied by, the softmax scale included
  int acc_stride;       // floats; at least head_dim_v, with the padding of any instruction set
  float* acc;           // [rows, acc_stride], in the order of the value operands
  float* max;           // [rows]
  float* sum;           // [rows]
  float* zero_sum;      // [rows] sum of p * value zero
  float* scores;        // [rows, kChunkTokens], int32 before the softmax where keys are coded
  int8_t* weights8;     // [rows, 2 planes, kChunkTokens] quantized p * value scale
  float* weight_scale;  // [rows]
  float* key_norm;      // [kChunkTokens]
  float* value_scale;   // [kChunkTokens]
  float* value_zero;    // [kChunkTokens]
  void* key_tile;       // one atom: bytes [head_dim / 4 operands, 4 * lanes], or floats [kAtomTokens, head_dim]
  void* value_tile;  // one chunk: bytes [groups of tokens, operands, 4 * lanes], or floats [kChunkTokens, head_dim_v]
};

// Lays the arrays out from base (64-byte aligned, or null to measure) and returns the bytes used.
uint64_t carve_attend_scratch(const PageLayout& layout, int rows, uint8_t* base, AttendScratch* out);

// Runs one task with the best instruction set of this CPU.
void run_attend_task(const AttendTask& task, const AttendScratch& scratch);

// Merges the partial results of one tile and writes out and lse. The task's kv range is not used.
void merge_partials(const AttendTask& tile, const Partial* partials, int count, float* row_scratch);

const char* cpu_target_name();

}  // namespace tq
