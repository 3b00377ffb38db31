// kernels.h - the private ABI between libtq_backend.so and the kernel libraries: raw pointers and a stream.
//
// Both sides are built from one source tree and ship in one wheel; the loader compares build ids and refuses any other
// pair, so these structs may change freely. Arguments have been checked by csrc/abi; a kernel library checks what only
// it can know (the device). Nothing here throws.
#pragma once

#include <cstdint>
#include <cstdio>

#include "codec/format.h"
#include "codec/lloyd_max.h"
#include "kernels/public_numbers.h"
#include "layout/page_layout.h"

namespace tq {

struct KernelStatus {
  int code;  // StatusCode
  char message[256];
};

enum class Dtype : uint8_t { kF32 = 1, kF16 = 2, kBF16 = 3 };

// Runs task(arg, i) for i in [0, num_tasks) on up to num_threads threads, and returns when all are done.
struct ParallelFor {
  int num_threads;
  void* context;
  void (*run)(void* context, int64_t num_tasks, void (*task)(void* arg, int64_t index), void* arg);
};

// A paged cache and how to read it.
struct PagedCache {
  Format format;
  PageLayout layout;
  const Codebook* key_book;    // of Lloyd-Max keys, else null
  const Codebook* value_book;  // of Lloyd-Max values, else null
  uint8_t* data;
  int64_t num_blocks;
  int64_t block_stride;  // bytes
};

// With the codebooks that the format names.
inline PagedCache make_paged_cache(const Format& format, const PageLayout& layout, uint8_t* data, int64_t num_blocks,
                                   int64_t block_stride) {
  return {format, layout, key_codebook(format), value_codebook(format), data, num_blocks, block_stride};
}

struct StoreParams {
  PagedCache cache;
  Dtype dtype;
  int64_t num_tokens;
  const void* key;  // [num_tokens, num_kv_heads, head_dim], strides in elements
  int64_t key_token_stride, key_head_stride;
  const void* value;
  int64_t value_token_stride, value_head_stride;
  const int64_t* slot_mapping;  // [num_tokens], -1 is skipped
  const float* key_offset;      // [num_kv_heads, head_dim], subtracted from every key, or null
  void* stream;
};

struct AttendParams {
  PagedCache cache;
  Dtype dtype;
  int num_heads;
  int num_seqs;
  int64_t num_tokens;
  const void* query;
  int64_t query_token_stride, query_head_stride;
  void* out;
  int64_t out_token_stride, out_head_stride;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;
  float scale;
  float soft_cap;      // 0: none
  int sliding_window;  // 0: none
  bool causal;
  int max_query_len;     // upper bound, >= 1 if num_tokens is
  const int32_t* spans;  // [num_seqs, max_spans, 2] or null
  int max_spans;
  const float* sinks;         // [num_heads] or null
  const float* alibi_slopes;  // [num_heads] or null
  float* lse;                 // [num_tokens, num_heads] or null
  void* workspace;            // zero before its first use; for nothing else between calls
  uint64_t workspace_bytes;
  void* stream;
};

struct DequantParams {
  PagedCache cache;
  Dtype dtype;
  bool keep_rotated;  // keys; values always come back unrotated
  int num_seqs;
  int max_blocks_per_seq;
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* first_tokens;
  const int32_t* token_start_loc;  // [num_seqs + 1]
  const int32_t* token_counts;     // [num_seqs] or null: all rows
  int64_t num_tokens;              // rows
  void* key_out;                   // [num_tokens, num_kv_heads, head_dim] contiguous, or null
  void* value_out;                 // [num_tokens, num_kv_heads, head_dim_v] contiguous, or null
  void* stream;
};

struct RotateParams {
  Dtype dtype;
  bool rotates;  // false: a copy
  int num_heads;
  int head_dim;
  int64_t num_tokens;
  const void* x;
  int64_t x_token_stride, x_head_stride;
  void* out;
  int64_t out_token_stride, out_head_stride;
  void* stream;
};

struct CopyParams {
  PagedCache cache;
  const int64_t* src_dst;  // [num_pairs, 2]
  int64_t num_pairs;
  void* stream;
};

struct KernelCounters {
  uint64_t store_calls, stored_tokens, attend_calls, query_tokens, compressed_kv_reads;
};

// What attend answers if the workspace is smaller than workspace_size.
inline KernelStatus workspace_too_small(const AttendParams& p, uint64_t needed) {
  KernelStatus status = {3, ""};  // TQ_INVALID_ARGUMENT
  std::snprintf(status.message, sizeof(status.message),
                "workspace_bytes is %llu; this call needs at least %llu (see workspace_size)",
                static_cast<unsigned long long>(p.workspace_bytes), static_cast<unsigned long long>(needed));
  return status;
}

struct DeviceState;  // one per backend, owned by the kernel library

struct KernelApi {
  uint32_t struct_size;  // first, with build_id: all that the loader reads before it compares build ids
  const char* build_id;
  int device_kind;  // DeviceKind

  // OK if this machine has a device that the library serves; otherwise UNAVAILABLE with one sentence.
  KernelStatus (*probe)();
  KernelStatus (*create)(int device_index, const ParallelFor* parallel_for, DeviceState** out);
  void (*destroy)(DeviceState*);
  const char* (*device_name)(const DeviceState*);
  void (*counters)(const DeviceState*, KernelCounters* out);
  // OK if the device serves this layer; otherwise UNIMPLEMENTED with one sentence. Asked at start-up, before a cache is
  // made, and again before each call but attend.
  KernelStatus (*supports)(const DeviceState*, const Format&, const PageLayout&);
  // Bytes for any attend call over a supported layer, whatever the batch and the context.
  uint64_t (*workspace_size)(const DeviceState*, const PageLayout&, int num_heads);
  KernelStatus (*store_kv)(DeviceState*, const StoreParams&);
  // Refuses what supports refuses, and a workspace that is too small, by itself: it looks up its kernels once.
  KernelStatus (*attend)(DeviceState*, const AttendParams&);
  KernelStatus (*dequant_kv)(DeviceState*, const DequantParams&);
  KernelStatus (*copy_pages)(DeviceState*, const CopyParams&);
  KernelStatus (*rotate)(DeviceState*, const RotateParams&);
};

}  // namespace tq

// The one exported symbol of a kernel library.
extern "C" const tq::KernelApi* tq_kernels_get_api();
using TqKernelsGetApi = const tq::KernelApi* (*)();
