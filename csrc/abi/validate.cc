#include "abi/validate.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <unordered_map>

#include "abi/structs.h"

namespace tq {
namespace {

template <class T>
std::string text(T x) {
  return std::to_string(x);
}

Status check_not_null(const char* name, const void* p) {
  if (p == nullptr) return invalid(std::string(name) + " is NULL");
  return {};
}

// A CPU call is done when it returns, so a stream there is a caller's mistake.
Status check_stream(bool host_tables, const void* stream) {
  if (host_tables && stream != nullptr) return invalid("stream is not NULL; it must be on a CPU backend");
  return {};
}

// Strides of a [tokens, heads, dim] tensor: a head must not overlap the next one.
Status check_strides(const char* name, int64_t token_stride, int64_t head_stride, int heads, int dim) {
  if (heads > 1 && head_stride < dim) {
    return invalid(std::string(name) + "_head_stride is " + text(head_stride) +
                   " elements; it must be at least head_dim, " + text(dim));
  }
  // Two layouts are dense: token-major, and head-major for a transposed tensor.
  if (token_stride < dim) {
    return invalid(std::string(name) + "_token_stride is " + text(token_stride) +
                   " elements; it must be at least head_dim, " + text(dim));
  }
  return {};
}

// Rows of an output: strides past which no row reaches into another one, in either of the two dense orders. A tensor
// that is only read may have one row for all tokens; threads that write to one row would race.
Status check_rows_apart(const char* name, int64_t tokens, int64_t token_stride, int64_t heads, int64_t head_stride,
                        int64_t dim) {
  const auto extent = [dim](int64_t count, int64_t stride) { return static_cast<__int128>(count - 1) * stride + dim; };
  if (tokens <= 1 || heads <= 1) return {};  // check_strides has seen to it
  if (token_stride >= extent(heads, head_stride) || head_stride >= extent(tokens, token_stride)) return {};
  return invalid(std::string(name) + "_token_stride is " + text(token_stride) + " elements and " + name +
                 "_head_stride " + text(head_stride) + "; with " + text(heads) + " heads of " + text(dim) +
                 " elements and " + text(tokens) + " tokens rows would overlap, and they must not");
}

// ceil(tokens / block_size) entries of a block table, each a block that exists.
Status check_block_row(const char* name, const int32_t* row, int64_t tokens, int block_size, int64_t num_blocks,
                       int64_t first_token = 0) {
  for (int64_t i = first_token / block_size; i * block_size < tokens; ++i) {
    if (row[i] < 0 || row[i] >= num_blocks) {
      return invalid(std::string(name) + " holds block " + text(row[i]) + " at entry " + text(i) +
                     "; blocks go from 0 to " + text(num_blocks - 1));
    }
  }
  return {};
}

}  // namespace

Status check_head_dim(const char* name, int32_t dim) {
  if (!head_dim_served(dim)) return invalid(std::string(name) + " is " + text(dim) + "; it must be " TQ_HEAD_DIM_RULE);
  return {};
}

Status check_format(uint32_t format_id, const Format** out) {
  *out = find_format(format_id);
  if (*out != nullptr) return {};
  std::string known;
  for (const Format& format : all_formats()) {
    if (!format.test_only) known += (known.empty() ? "" : ", ") + text(uint32_t{format.id}) + " " + format.name;
  }
  return invalid("format_id is " + text(format_id) + "; known formats are " + known);
}

Status check_layer_desc(const TqLayerDesc* layer, CheckedLayer* out) {
  TqLayerDesc& d = out->desc;
  TQ_RETURN_IF_ERROR(read_struct("layer", layer, &d));
  TQ_RETURN_IF_ERROR(check_format(d.format_id, &out->format));
  if (d.attention_kind == TQ_ATTENTION_MLA) {
    return {TQ_UNIMPLEMENTED,
            "layer.attention_kind is MLA: its cache is one latent vector that is key and value at once, which these "
            "formats "
            "do not describe; use an fp8 cache for this model"};
  }
  if (d.attention_kind == TQ_ATTENTION_ENCODER || d.attention_kind == TQ_ATTENTION_CROSS) {
    return {TQ_UNIMPLEMENTED,
            "layer.attention_kind is encoder or cross attention, whose keys and values are not a growing paged cache; "
            "leave "
            "these layers to the engine's own backend"};
  }
  if (d.attention_kind != TQ_ATTENTION_DECODER) {
    return invalid("layer.attention_kind is " + text(d.attention_kind) + "; it must be TQ_ATTENTION_DECODER (1)");
  }
  TQ_RETURN_IF_ERROR(check_head_dim("layer.head_dim", d.head_dim));
  if (d.head_dim_v == 0) d.head_dim_v = d.head_dim;
  TQ_RETURN_IF_ERROR(check_head_dim("layer.head_dim_v", d.head_dim_v));
  if (d.num_kv_heads < 1 || d.num_kv_heads > kMaxHeads) {
    return invalid("layer.num_kv_heads is " + text(d.num_kv_heads) + "; it must be from 1 to " + text(kMaxHeads));
  }
  if (d.num_heads < 1 || d.num_heads > kMaxHeads || d.num_heads % d.num_kv_heads != 0) {
    return invalid("layer.num_heads is " + text(d.num_heads) + "; it must be a multiple of num_kv_heads, " +
                   text(d.num_kv_heads) + ", of at most " + text(kMaxHeads));
  }
  if (d.dtype != TQ_DTYPE_F32 && d.dtype != TQ_DTYPE_F16 && d.dtype != TQ_DTYPE_BF16) {
    return invalid("layer.dtype is " + text(d.dtype) + "; it must be float32 (1), float16 (2) or bfloat16 (3)");
  }
  if (d.sliding_window < 0) {
    return invalid("layer.sliding_window is " + text(d.sliding_window) + "; it must be 0 (none) or positive");
  }
  if (!std::isfinite(d.soft_cap) || d.soft_cap < 0) {
    return invalid("layer.soft_cap is " + text(d.soft_cap) + "; it must be 0 (none) or positive and finite");
  }
  return {};
}

Status check_pages(const TqPages* given, const CheckedLayer& layer, PagedCache* out) {
  TqPages pages = {};
  TQ_RETURN_IF_ERROR(read_struct("pages", given, &pages));
  if (pages.format_id != layer.desc.format_id) {
    const Format* came = find_format(pages.format_id);
    return invalid("pages.format_id is " + text(pages.format_id) + " (" + (came != nullptr ? came->name : "unknown") +
                   "); these pages must have the layer's format, " + layer.format->name);
  }
  if (pages.block_size < kAtomTokens || pages.block_size > kMaxBlockSize || pages.block_size % kAtomTokens != 0) {
    return invalid("pages.block_size is " + text(pages.block_size) +
                   " tokens; it must be a multiple of 16 from 16 to " + text(kMaxBlockSize));
  }
  const TqLayerDesc& d = layer.desc;
  const PageLayout layout = make_page_layout(*layer.format, d.head_dim, d.head_dim_v, d.num_kv_heads, pages.block_size);
  if (pages.num_blocks < 1) return invalid("pages.num_blocks is " + text(pages.num_blocks) + "; it must be at least 1");
  if (pages.block_stride_bytes < layout.page_bytes() || pages.block_stride_bytes % kPageAlignment != 0) {
    return invalid("pages.block_stride_bytes is " + text(pages.block_stride_bytes) +
                   "; it must be a multiple of 16 of at least the page's " + text(layout.page_bytes()) + " bytes");
  }
  if (pages.num_blocks > std::numeric_limits<int64_t>::max() / pages.block_stride_bytes) {
    return invalid("pages.num_blocks is " + text(pages.num_blocks) +
                   "; times block_stride_bytes it must fit in 63 bits");
  }
  TQ_RETURN_IF_ERROR(check_not_null("pages.data", pages.data));
  if (reinterpret_cast<uintptr_t>(pages.data) % kPageAlignment != 0) {
    return invalid("pages.data is not aligned; its address must be a multiple of 16");
  }
  *out = make_paged_cache(*layer.format, layout, static_cast<uint8_t*>(pages.data), pages.num_blocks,
                          pages.block_stride_bytes);
  return {};
}

Status check_store(const TqStoreKvArgs* given, bool host_tables, StoreParams* out) {
  TqStoreKvArgs args = {};
  CheckedLayer layer = {};
  TQ_RETURN_IF_ERROR(read_struct("args", given, &args));
  TQ_RETURN_IF_ERROR(check_layer_desc(args.layer, &layer));
  TQ_RETURN_IF_ERROR(check_pages(args.pages, layer, &out->cache));
  TQ_RETURN_IF_ERROR(check_stream(host_tables, args.stream));
  if (args.num_tokens < 0) return invalid("num_tokens is " + text(args.num_tokens) + "; it must not be negative");
  const TqLayerDesc& d = layer.desc;
  if (args.key_offset != nullptr && d.soft_cap > 0) {
    return invalid("key_offset is set and the layer's soft_cap is " + std::to_string(d.soft_cap) +
                   "; an offset would change capped scores, so it must be NULL");
  }
  if (args.num_tokens > 0) {
    TQ_RETURN_IF_ERROR(check_not_null("key", args.key));
    TQ_RETURN_IF_ERROR(check_not_null("value", args.value));
    TQ_RETURN_IF_ERROR(check_not_null("slot_mapping", args.slot_mapping));
    TQ_RETURN_IF_ERROR(check_strides("key", args.key_token_stride, args.key_head_stride, d.num_kv_heads, d.head_dim));
    TQ_RETURN_IF_ERROR(
        check_strides("value", args.value_token_stride, args.value_head_stride, d.num_kv_heads, d.head_dim_v));
  }
  const int64_t num_slots = out->cache.num_blocks * out->cache.layout.block_size;
  for (int64_t i = 0; host_tables && i < args.num_tokens; ++i) {
    if (args.slot_mapping[i] < -1 || args.slot_mapping[i] >= num_slots) {
      return invalid("slot_mapping[" + text(i) + "] is " + text(args.slot_mapping[i]) +
                     "; it must be -1 (skip) or a slot from 0 to " + text(num_slots - 1));
    }
  }
  out->dtype = static_cast<Dtype>(d.dtype);
  out->num_tokens = args.num_tokens;
  out->key = args.key;
  out->key_token_stride = args.key_token_stride;
  out->key_head_stride = args.key_head_stride;
  out->value = args.value;
  out->value_token_stride = args.value_token_stride;
  out->value_head_stride = args.value_head_stride;
  out->slot_mapping = args.slot_mapping;
  out->key_offset = args.key_offset;
  out->stream = args.stream;
  return {};
}

namespace {

// Lengths and block tables of all sequences; they are in host memory.
Status check_sequences(const TqAttendArgs& args, const PagedCache& cache) {
  if (args.query_start_loc[0] != 0) {
    return invalid("query_start_loc[0] is " + text(args.query_start_loc[0]) + "; it must be 0");
  }
  const int64_t capacity = int64_t{args.max_blocks_per_seq} * cache.layout.block_size;
  for (int32_t s = 0; s < args.num_seqs; ++s) {
    const int64_t query_len = int64_t{args.query_start_loc[s + 1]} - args.query_start_loc[s];
    if (query_len < 0) {
      return invalid("query_start_loc[" + text(s + 1) + "] is " + text(args.query_start_loc[s + 1]) + ", below the " +
                     text(args.query_start_loc[s]) + " before it; it must ascend");
    }
    if (args.max_query_len > 0 && query_len > args.max_query_len) {
      return invalid("max_query_len is " + text(args.max_query_len) + "; sequence " + text(s) + " has " +
                     text(query_len) + " query tokens");
    }
    if (args.seq_lens[s] < query_len) {
      return invalid("seq_lens[" + text(s) + "] is " + text(args.seq_lens[s]) +
                     "; it must be at least the sequence's " + text(query_len) + " query tokens");
    }
    if (args.seq_lens[s] > capacity) {
      return invalid("seq_lens[" + text(s) + "] is " + text(args.seq_lens[s]) + "; its block table holds " +
                     text(capacity) + " tokens");
    }
    if (query_len == 0) continue;  // nothing of it is read
    TQ_RETURN_IF_ERROR(check_block_row("block_table", args.block_table + s * args.block_table_stride, args.seq_lens[s],
                                       cache.layout.block_size, cache.num_blocks));
  }
  if (args.query_start_loc[args.num_seqs] > args.num_tokens) {
    return invalid("query_start_loc[" + text(args.num_seqs) + "] is " + text(args.query_start_loc[args.num_seqs]) +
                   "; it must be at most num_tokens, " + text(args.num_tokens));
  }
  return {};
}

}  // namespace

Status check_attend(const TqAttendArgs* given, bool host_tables, AttendParams* out) {
  TqAttendArgs args = {};
  TQ_RETURN_IF_ERROR(read_struct("args", given, &args));
  CheckedLayer layer = {};
  TQ_RETURN_IF_ERROR(check_layer_desc(args.layer, &layer));
  TQ_RETURN_IF_ERROR(check_pages(args.pages, layer, &out->cache));
  TQ_RETURN_IF_ERROR(check_stream(host_tables, args.stream));
  const TqLayerDesc& d = layer.desc;
  if (args.num_seqs < 0) return invalid("num_seqs is " + text(args.num_seqs) + "; it must not be negative");
  if (args.num_tokens < 0) return invalid("num_tokens is " + text(args.num_tokens) + "; it must not be negative");
  if (!std::isfinite(args.scale)) return invalid("scale is " + text(args.scale) + "; it must be finite");
  if (args.causal != 0 && args.causal != 1) return invalid("causal is " + text(args.causal) + "; it must be 0 or 1");
  if (args.max_query_len < 0) {
    return invalid("max_query_len is " + text(args.max_query_len) + "; it must be 0 (not known) or an upper bound");
  }
  if (args.max_spans < 0 || (args.max_spans > 0) != (args.spans != nullptr)) {
    return invalid("max_spans is " + text(args.max_spans) + " and spans is " +
                   (args.spans == nullptr ? "NULL" : "not NULL") + "; both must be given, or neither");
  }
  if (args.num_seqs > 0) {
    TQ_RETURN_IF_ERROR(check_not_null("query_start_loc", args.query_start_loc));
    TQ_RETURN_IF_ERROR(check_not_null("seq_lens", args.seq_lens));
    TQ_RETURN_IF_ERROR(check_not_null("block_table", args.block_table));
    if (args.max_blocks_per_seq < 0) {
      return invalid("max_blocks_per_seq is " + text(args.max_blocks_per_seq) + "; it must not be negative");
    }
    if (args.block_table_stride < args.max_blocks_per_seq) {
      return invalid("block_table_stride is " + text(args.block_table_stride) +
                     "; it must be at least max_blocks_per_seq, " + text(args.max_blocks_per_seq));
    }
    if (host_tables) TQ_RETURN_IF_ERROR(check_sequences(args, out->cache));
  }
  if (args.num_tokens > 0) {
    TQ_RETURN_IF_ERROR(check_not_null("query", args.query));
    TQ_RETURN_IF_ERROR(check_not_null("out", args.out));
    TQ_RETURN_IF_ERROR(
        check_strides("query", args.query_token_stride, args.query_head_stride, d.num_heads, d.head_dim));
    TQ_RETURN_IF_ERROR(check_strides("out", args.out_token_stride, args.out_head_stride, d.num_heads, d.head_dim_v));
    TQ_RETURN_IF_ERROR(check_rows_apart("out", args.num_tokens, args.out_token_stride, d.num_heads,
                                        args.out_head_stride, d.head_dim_v));
  }
  if (args.workspace_bytes > 0) TQ_RETURN_IF_ERROR(check_not_null("workspace", args.workspace));
  if (reinterpret_cast<uintptr_t>(args.workspace) % 64 != 0) {
    return invalid("workspace is not aligned; its address must be a multiple of 64");
  }
  out->dtype = static_cast<Dtype>(d.dtype);
  out->num_heads = d.num_heads;
  out->num_seqs = args.num_seqs;
  out->num_tokens = args.num_tokens;
  out->query = args.query;
  out->query_token_stride = args.query_token_stride;
  out->query_head_stride = args.query_head_stride;
  out->out = args.out;
  out->out_token_stride = args.out_token_stride;
  out->out_head_stride = args.out_head_stride;
  out->query_start_loc = args.query_start_loc;
  out->seq_lens = args.seq_lens;
  out->block_table = args.block_table;
  out->block_table_stride = args.block_table_stride;
  out->scale = args.scale;
  out->soft_cap = d.soft_cap;
  out->sliding_window = d.sliding_window;
  out->causal = args.causal == 1;
  out->max_query_len = static_cast<int>(args.max_query_len > 0 ? std::min<int64_t>(args.max_query_len, args.num_tokens)
                                                               : std::min<int64_t>(args.num_tokens, INT32_MAX));
  out->spans = args.spans;
  out->max_spans = args.max_spans;
  out->sinks = args.sinks;
  out->alibi_slopes = args.alibi_slopes;
  out->lse = args.lse;
  out->workspace = args.workspace;
  out->workspace_bytes = args.workspace_bytes;
  out->stream = args.stream;
  return {};
}

namespace {

// Rows, first tokens and block tables of all sequences; they are in host memory.
Status check_ranges(const TqDequantKvArgs& args, const PagedCache& cache) {
  if (args.token_start_loc[0] != 0) {
    return invalid("token_start_loc[0] is " + text(args.token_start_loc[0]) + "; it must be 0");
  }
  const int64_t capacity = int64_t{args.max_blocks_per_seq} * cache.layout.block_size;
  for (int32_t s = 0; s < args.num_seqs; ++s) {
    const int64_t rows = int64_t{args.token_start_loc[s + 1]} - args.token_start_loc[s];
    if (rows < 0) {
      return invalid("token_start_loc[" + text(s + 1) + "] is " + text(args.token_start_loc[s + 1]) + ", below the " +
                     text(args.token_start_loc[s]) + " before it; it must ascend");
    }
    const int64_t count = args.token_counts != nullptr ? args.token_counts[s] : rows;
    if (count < 0 || count > rows) {
      return invalid("token_counts[" + text(s) + "] is " + text(count) + "; it must be from 0 to the sequence's " +
                     text(rows) + " rows");
    }
    if (args.first_tokens[s] < 0) {
      return invalid("first_tokens[" + text(s) + "] is " + text(args.first_tokens[s]) + "; it must not be negative");
    }
    if (args.first_tokens[s] + count > capacity) {
      return invalid("first_tokens[" + text(s) + "] is " + text(args.first_tokens[s]) + " with " + text(count) +
                     " tokens to decode; its block table holds " + text(capacity) + " tokens");
    }
    if (count == 0) continue;  // nothing of it is read
    TQ_RETURN_IF_ERROR(check_block_row("block_table", args.block_table + s * args.block_table_stride,
                                       args.first_tokens[s] + count, cache.layout.block_size, cache.num_blocks,
                                       args.first_tokens[s]));
  }
  if (args.token_start_loc[args.num_seqs] > args.num_tokens) {
    return invalid("token_start_loc[" + text(args.num_seqs) + "] is " + text(args.token_start_loc[args.num_seqs]) +
                   "; it must be at most num_tokens, " + text(args.num_tokens));
  }
  return {};
}

}  // namespace

Status check_dequant(const TqDequantKvArgs* given, bool host_tables, DequantParams* out) {
  TqDequantKvArgs args = {};
  CheckedLayer layer = {};
  TQ_RETURN_IF_ERROR(read_struct("args", given, &args));
  TQ_RETURN_IF_ERROR(check_layer_desc(args.layer, &layer));
  TQ_RETURN_IF_ERROR(check_pages(args.pages, layer, &out->cache));
  TQ_RETURN_IF_ERROR(check_stream(host_tables, args.stream));
  if (args.num_seqs < 0) return invalid("num_seqs is " + text(args.num_seqs) + "; it must not be negative");
  if (args.num_tokens < 0) return invalid("num_tokens is " + text(args.num_tokens) + "; it must not be negative");
  if (args.max_blocks_per_seq < 0) {
    return invalid("max_blocks_per_seq is " + text(args.max_blocks_per_seq) + "; it must not be negative");
  }
  if (args.keep_rotated != 0 && args.keep_rotated != 1) {
    return invalid("keep_rotated is " + text(args.keep_rotated) + "; it must be 0 or 1");
  }
  if (args.num_seqs > 0) {
    TQ_RETURN_IF_ERROR(check_not_null("first_tokens", args.first_tokens));
    TQ_RETURN_IF_ERROR(check_not_null("token_start_loc", args.token_start_loc));
    TQ_RETURN_IF_ERROR(check_not_null("block_table", args.block_table));
    if (args.block_table_stride < args.max_blocks_per_seq) {
      return invalid("block_table_stride is " + text(args.block_table_stride) +
                     "; it must be at least max_blocks_per_seq, " + text(args.max_blocks_per_seq));
    }
    if (host_tables) TQ_RETURN_IF_ERROR(check_ranges(args, out->cache));
  }
  if (args.key_out != nullptr && args.value_out != nullptr) {
    const auto key = reinterpret_cast<uintptr_t>(args.key_out), value = reinterpret_cast<uintptr_t>(args.value_out);
    const __int128 rows = static_cast<__int128>(args.num_tokens) * layer.desc.num_kv_heads;
    const int element = layer.desc.dtype == TQ_DTYPE_F32 ? 4 : 2;
    if (key < value + rows * element * layer.desc.head_dim_v && value < key + rows * element * layer.desc.head_dim) {
      return invalid("key_out and value_out are the same memory in part; they must not overlap");
    }
  }
  out->dtype = static_cast<Dtype>(layer.desc.dtype);
  out->keep_rotated = args.keep_rotated == 1;
  out->num_seqs = args.num_seqs;
  out->max_blocks_per_seq = args.max_blocks_per_seq;
  out->block_table = args.block_table;
  out->block_table_stride = args.block_table_stride;
  out->first_tokens = args.first_tokens;
  out->token_start_loc = args.token_start_loc;
  out->token_counts = args.token_counts;
  out->num_tokens = args.num_tokens;
  out->key_out = args.key_out;
  out->value_out = args.value_out;
  out->stream = args.stream;
  return {};
}

namespace {

// Blocks that exist, and none that one pair writes in another pair; the table is in host memory.
Status check_pairs(const TqCopyPagesArgs& args, int64_t num_blocks) {
  std::unordered_map<int64_t, int64_t> writer;  // of each destination, its pair
  for (int64_t i = 0; i < 2 * args.num_pairs; ++i) {
    if (args.src_dst[i] < 0 || args.src_dst[i] >= num_blocks) {
      return invalid("src_dst[" + text(i / 2) + "][" + text(i % 2) + "] is block " + text(args.src_dst[i]) +
                     "; blocks go from 0 to " + text(num_blocks - 1));
    }
  }
  for (int64_t i = 0; i < args.num_pairs; ++i) {
    if (const auto [at, added] = writer.emplace(args.src_dst[2 * i + 1], i); !added) {
      return invalid("src_dst[" + text(i) + "][1] is block " + text(at->first) + ", which src_dst[" + text(at->second) +
                     "] writes too; the pairs have no order, so each block may be written once");
    }
  }
  for (int64_t i = 0; i < args.num_pairs; ++i) {
    const auto at = writer.find(args.src_dst[2 * i]);
    if (at != writer.end() && at->second != i) {
      return invalid("src_dst[" + text(i) + "][0] is block " + text(at->first) + ", which src_dst[" + text(at->second) +
                     "] writes; the pairs have no order, so a block that is read must not be written");
    }
  }
  return {};
}

}  // namespace

Status check_copy(const TqCopyPagesArgs* given, bool host_tables, CopyParams* out) {
  TqCopyPagesArgs args = {};
  CheckedLayer layer = {};
  TQ_RETURN_IF_ERROR(read_struct("args", given, &args));
  TQ_RETURN_IF_ERROR(check_layer_desc(args.layer, &layer));
  TQ_RETURN_IF_ERROR(check_pages(args.pages, layer, &out->cache));
  TQ_RETURN_IF_ERROR(check_stream(host_tables, args.stream));
  if (args.num_pairs < 0) return invalid("num_pairs is " + text(args.num_pairs) + "; it must not be negative");
  if (args.num_pairs > 0) TQ_RETURN_IF_ERROR(check_not_null("src_dst", args.src_dst));
  if (host_tables) TQ_RETURN_IF_ERROR(check_pairs(args, out->cache.num_blocks));
  out->src_dst = args.src_dst;
  out->num_pairs = args.num_pairs;
  out->stream = args.stream;
  return {};
}

Status check_rotate(const TqRotateArgs* given, bool host_tables, RotateParams* out, CheckedLayer* layer) {
  TqRotateArgs args = {};
  TQ_RETURN_IF_ERROR(read_struct("args", given, &args));
  TQ_RETURN_IF_ERROR(check_layer_desc(args.layer, layer));
  TQ_RETURN_IF_ERROR(check_stream(host_tables, args.stream));
  if (args.side < TQ_SIDE_QUERY || args.side > TQ_SIDE_OUTPUT) {
    return invalid("side is " + text(args.side) +
                   "; it must be TQ_SIDE_QUERY (1), TQ_SIDE_KEY (2), TQ_SIDE_VALUE (3) or TQ_SIDE_OUTPUT (4)");
  }
  if (args.num_tokens < 0) return invalid("num_tokens is " + text(args.num_tokens) + "; it must not be negative");
  if (args.num_heads < 1 || args.num_heads > kMaxHeads) {
    return invalid("num_heads is " + text(args.num_heads) + "; it must be from 1 to " + text(kMaxHeads));
  }
  const TqLayerDesc& d = layer->desc;
  const bool of_keys = args.side == TQ_SIDE_QUERY || args.side == TQ_SIDE_KEY;
  const int32_t dim = of_keys ? d.head_dim : d.head_dim_v;
  if (args.num_tokens > 0) {
    TQ_RETURN_IF_ERROR(check_not_null("x", args.x));
    TQ_RETURN_IF_ERROR(check_not_null("out", args.out));
    TQ_RETURN_IF_ERROR(check_strides("x", args.x_token_stride, args.x_head_stride, args.num_heads, dim));
    TQ_RETURN_IF_ERROR(check_strides("out", args.out_token_stride, args.out_head_stride, args.num_heads, dim));
    TQ_RETURN_IF_ERROR(
        check_rows_apart("out", args.num_tokens, args.out_token_stride, args.num_heads, args.out_head_stride, dim));
  }
  out->dtype = static_cast<Dtype>(d.dtype);
  out->rotates = of_keys ? layer->format->rotates_keys() : layer->format->rotates_values();
  out->num_heads = args.num_heads;
  out->head_dim = dim;
  out->num_tokens = args.num_tokens;
  out->x = args.x;
  out->x_token_stride = args.x_token_stride;
  out->x_head_stride = args.x_head_stride;
  out->out = args.out;
  out->out_token_stride = args.out_token_stride;
  out->out_head_stride = args.out_head_stride;
  out->stream = args.stream;
  return {};
}

}  // namespace tq
