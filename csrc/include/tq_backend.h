/* tq_backend.h - the public C ABI of tq-backend: TurboQuant KV caches for any inference engine.
 *
 * C11, self-contained, append-only. A foreign engine needs this header and libtq_backend.so, nothing else;
 * examples/c_engine is a whole one. What lies in a page, byte by byte, is in docs/page_format.md.
 *
 * In one minute: tq_get_api() gives a table of functions. plan_pages says how large pages are and how many fit.
 * create_backend chooses the kernels of a device. check_layer says at start-up whether a layer is served. Then each
 * step calls store_kv, which compresses new keys and values into pages, and attend, which reads the pages.
 *
 * Growth (after the PJRT C API and ONNX Runtime)
 *  - Two symbols are exported, tq_abi_version() and tq_get_api(); they never change. Within a major version, functions
 *    and fields are only ever appended, so a caller and a library of different minor versions work together.
 *  - Every struct begins with struct_size, set by the caller to the sizeof it was compiled with, in every element of an
 *    array too. The library steps through arrays by it. TQ_..._SIZE_1_0 is what header 1.0 had, and the least that is
 *    taken.
 *  - Structs that the library reads: set what is not used to zero. Zero is the default of every field that will be
 *    appended. `reserved` fields, and bytes beyond those that the library knows, must be zero: a library that does not
 *    know a field refuses it rather than ignore it.
 *  - Structs that the library fills: only struct_size is read; the rest may be uninitialised. Fields of a newer header
 *    than the library's are left alone. Text is UTF-8, zero-terminated, and ends with an ellipsis where it was cut.
 *  - A function of a newer header than the library's is not there: test TQ_API_HAS(api, function) before the call.
 *
 * Errors
 *  - Functions return a TqCode; with a non-zero code *error (if not NULL) holds one sentence that names the argument,
 *    what came and what is allowed. Nothing has been written to any other output then.
 *  - No C++ type, exception or allocation crosses the boundary.
 *  - Lengths, slots and block numbers in tables are checked on a CPU. A GPU's tables cannot be read without waiting for
 *    the device and are not checked there: a slot beyond the pages is skipped, a wrong block or length reads memory
 *    that is not the cache's.
 *
 * Memory
 *  - The caller owns all of it. The structs themselves are host memory and are read before a call returns.
 *  - On a GPU backend every other pointer that store_kv, attend, dequant_kv, copy_pages and rotate are given (tensors,
 *    tables, TqPages.data, workspace) is memory of the backend's device, or host memory that the device can address. On
 *    a CPU backend it is host memory. All pointers of the planner, the codec and the formats are host memory.
 *  - Tensors and tables are aligned to their elements; 16 bytes for base and strides make loads of 16-bit dtypes wide.
 *    TqPages.data is aligned to TqKvCacheSpec.alignment, a workspace to 64 bytes.
 *  - A workspace must be all zero before its first use, and between two uses nothing else may write to it: its head
 *    holds counters that each call leaves at zero. After a launch that failed, zero it again. It may serve any layers
 *    of one backend, one call at a time: calls that may overlap (on other streams or threads) need workspaces of
 *    their own.
 *
 * Streams
 *  - GPU backends enqueue on `stream`, a cudaStream_t or hipStream_t, and return; NULL is the device's legacy default
 *    stream. Nothing waits for the device, except with TQ_SYNC=1 in the environment, which is for finding faults. On a
 *    CPU backend stream must be NULL, and a call returns when its work is done.
 *  - Calls may be captured in a CUDA or HIP graph. A replay reads the tables as they are then; what the structs say
 *    (num_seqs, num_tokens, max_query_len) is fixed by the capture. Call each function once for each layer before the
 *    first capture: a first call may raise a limit of its kernel.
 *
 * Threads and processes
 *  - Every function may be called from several threads at the same time, with the same backend too, except that
 *    destroy_backend must not overlap other calls with its backend. A backend is immutable after create_backend.
 *  - destroy_backend does not wait. Work that was enqueued before goes on, as it uses only the caller's memory; kernel
 *    libraries are never unloaded.
 *  - After fork() a child may go on with CPU backends of its parent, unless their thread pool is the caller's and does
 *    not survive. A GPU backend is of no use in a child, as its device is not: make backends after the fork, from a
 *    parent that has not used the device.
 *
 * Source of the method: TurboQuant, arXiv 2504.19874; bytes per token and math of the presets follow vLLM 0.32
 * (vllm/model_executor/layers/quantization/turboquant and v1/attention/ops/triton_turboquant_store.py).
 */
#ifndef TQ_BACKEND_H_
#define TQ_BACKEND_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TQ_ABI_MAJOR 1
#define TQ_ABI_MINOR 0

/* Status codes: the numbers of absl::StatusCode. */
typedef enum TqCode {
  TQ_OK = 0,
  TQ_INVALID_ARGUMENT = 3,
  TQ_NOT_FOUND = 5,
  TQ_RESOURCE_EXHAUSTED = 8,
  TQ_FAILED_PRECONDITION = 9,
  TQ_UNIMPLEMENTED = 12,
  TQ_INTERNAL = 13,
  TQ_UNAVAILABLE = 14
} TqCode;

typedef struct TqError {
  uint32_t struct_size;
  int32_t code;      /* TqCode */
  char message[512]; /* one sentence, zero-terminated */
} TqError;
#define TQ_ERROR_SIZE_1_0 520

typedef enum TqDtype { TQ_DTYPE_F32 = 1, TQ_DTYPE_F16 = 2, TQ_DTYPE_BF16 = 3 } TqDtype;

/* Which of a layer's vectors: a format may store, and rotate, each in its own way. */
typedef enum TqSide { TQ_SIDE_QUERY = 1, TQ_SIDE_KEY = 2, TQ_SIDE_VALUE = 3, TQ_SIDE_OUTPUT = 4 } TqSide;

/* AUTO, in create_backend: the usable kernel library with the highest score, see TqLibraryInfo. */
typedef enum TqDeviceKind { TQ_DEVICE_AUTO = 0, TQ_DEVICE_CPU = 1, TQ_DEVICE_CUDA = 2, TQ_DEVICE_HIP = 3 } TqDeviceKind;

/* Page formats. An id changes whenever the bytes of a page do (low byte: revision of the page layout), so it belongs in
 * every key of a prefix cache or a KV transfer. */
typedef enum TqFormatId {
  TQ_FORMAT_TURBOQUANT_K8V4 = 0x0101,    /* FP8 e4m3 keys, 4-bit uniform values */
  TQ_FORMAT_TURBOQUANT_4BIT_NC = 0x0201, /* 4-bit Lloyd-Max keys, 4-bit uniform values */
  TQ_FORMAT_TURBOQUANT_K3V4_NC = 0x0301, /* 3-bit Lloyd-Max keys, 4-bit uniform values */
  TQ_FORMAT_TURBOQUANT_3BIT_NC = 0x0401, /* 3-bit Lloyd-Max keys, 3-bit uniform values */
  TQ_FORMAT_TQ_8 = 0x0501,               /* rotated 8-bit integer keys, rotated 4-bit Lloyd-Max values */
  TQ_FORMAT_TQ_K5V4 = 0x0601,            /* 5-bit Lloyd-Max keys, rotated 4-bit Lloyd-Max values */
  TQ_FORMAT_TQ_4 = 0x0701,               /* 4-bit Lloyd-Max keys, rotated 4-bit Lloyd-Max values */
  TQ_FORMAT_RAW_F32 = 0x7f01             /* test only: floats in the same pages on the same path */
} TqFormatId;

typedef enum TqAttentionKind {
  TQ_ATTENTION_DECODER = 1, /* causal self-attention over paged K and V: the one kind that is served */
  TQ_ATTENTION_ENCODER = 2,
  TQ_ATTENTION_CROSS = 3,
  TQ_ATTENTION_MLA = 4
} TqAttentionKind;

typedef struct TqFormatInfo {
  uint32_t struct_size;
  uint32_t format_id;
  char name[32]; /* of a preset, vLLM's kv_cache_dtype name */
  int32_t key_bits;
  int32_t value_bits;
  int32_t test_only;
  int32_t rotates_keys; /* 1: `rotate` of queries and dequant_kv's keep_rotated are not without effect */
} TqFormatInfo;
#define TQ_FORMAT_INFO_SIZE_1_0 56

/* Which codebook: a format may have one for keys and one for values, and others for other groups of dimensions. */
typedef struct TqCodebookArgs {
  uint32_t struct_size;
  uint32_t format_id;
  int32_t side;     /* TQ_SIDE_KEY or TQ_SIDE_VALUE */
  int32_t head_dim; /* a multiple of 16 in [16, 512] */
  int32_t group;    /* of dimensions, from 0 */
  int32_t reserved;
} TqCodebookArgs;
#define TQ_CODEBOOK_ARGS_SIZE_1_0 24

typedef struct TqCodebook {
  uint32_t struct_size;
  int32_t num_groups; /* of dimensions; 1 for the presets */
  int32_t first_dim;  /* this group is dimensions [first_dim, first_dim + num_dims) of the stored, rotated vector */
  int32_t num_dims;
  int32_t bits;
  int32_t num_levels;
} TqCodebook;
#define TQ_CODEBOOK_SIZE_1_0 24

/* The host reference codec: what a stored vector reads back as. in, out: [num_rows, head_dim] float, contiguous; the
 * same memory, or no overlap. Both sides come back unrotated. */
typedef struct TqFakeQuantizeArgs {
  uint32_t struct_size;
  uint32_t format_id;
  int32_t side;     /* TQ_SIDE_KEY or TQ_SIDE_VALUE */
  int32_t head_dim; /* a multiple of 16 in [16, 512] */
  int64_t num_rows;
  const float* in;
  float* out;
} TqFakeQuantizeArgs;
#define TQ_FAKE_QUANTIZE_ARGS_SIZE_1_0 40

/* One attention layer, as far as its KV cache and its attention math go. */
typedef struct TqLayerDesc {
  uint32_t struct_size;
  uint32_t format_id;     /* TqFormatId */
  int32_t num_heads;      /* query heads; a multiple of num_kv_heads */
  int32_t num_kv_heads;   /* >= 1 */
  int32_t head_dim;       /* of Q and K: a multiple of 16 in [16, 512] */
  int32_t head_dim_v;     /* of V and the output: same range; 0 means head_dim */
  int32_t dtype;          /* TqDtype of Q, K, V and the output */
  int32_t attention_kind; /* TqAttentionKind */
  int32_t sliding_window; /* a query at position i sees positions (i - sliding_window, i]; 0: no window */
  float soft_cap;         /* scores become soft_cap * tanh(score / soft_cap); 0: none */
} TqLayerDesc;
#define TQ_LAYER_DESC_SIZE_1_0 40

typedef struct TqKvCacheSpec {
  uint32_t struct_size;
  uint32_t format_id;
  int32_t slot_bytes;          /* of one token and one KV head */
  int32_t block_size_multiple; /* tokens per page must be a multiple of this */
  int32_t alignment;           /* of a page's address and of the block stride, bytes */
  int32_t reserved;
  int64_t bytes_per_token; /* slot_bytes * num_kv_heads */
} TqKvCacheSpec;
#define TQ_KV_CACHE_SPEC_SIZE_1_0 32

/* How pages of several sizes come to share one pool of blocks. */
typedef enum TqPlanStrategy {
  TQ_PLAN_UNIFORM = 1,      /* one group: all layers need equally many blocks, and pages keep their own sizes */
  TQ_PLAN_SIDE_BY_SIDE = 2, /* several groups, pages keep their own sizes */
  TQ_PLAN_EQUAL_PAGES = 3,  /* block sizes make all pages equal */
  TQ_PLAN_PADDED_PAGES = 4  /* block sizes make them nearly equal, the rest is padding */
} TqPlanStrategy;

/* One layer as the planner sees it: compressed, in the engine's native cache, or a recurrent state, of which only its
 * bytes and its sharing are read. */
typedef struct TqPlanLayer {
  uint32_t struct_size;
  uint32_t format_id;        /* TqFormatId, or 0 for the native cache */
  int32_t native_bytes;      /* of one element of a native cache (2 for bf16, 1 for fp8); ignored with a format_id */
  int32_t num_kv_heads;      /* of one device */
  int32_t head_dim;          /* compressed: as TqLayerDesc's */
  int32_t head_dim_v;        /* 0 means head_dim */
  int32_t sliding_window;    /* tokens; 0: full attention */
  int32_t shares_pages;      /* 1: this layer reads the pages of layer kv_sharing_target; 0: it has its own */
  int32_t kv_sharing_target; /* index of that layer, which has pages of its own; 0 without shares_pages */
  int32_t reserved;
  int64_t state_bytes; /* > 0: a state (Mamba, GDN) of so many bytes per sequence */
} TqPlanLayer;
#define TQ_PLAN_LAYER_SIZE_1_0 48

typedef struct TqPagePlan { /* of one layer */
  uint32_t struct_size;
  int32_t group;      /* layers of one group share a block table */
  int32_t block_size; /* tokens per page; of a state: the common multiple of the others', not part of its size */
  int32_t reserved;
  int64_t page_bytes;    /* 0 for a layer that reads another layer's pages */
  int64_t padding_bytes; /* of page_bytes, unused */
} TqPagePlan;
#define TQ_PAGE_PLAN_SIZE_1_0 32

typedef struct TqPlanRequest {
  uint32_t struct_size;
  int32_t block_size; /* tokens of the smallest page, a multiple of 16; every other page has a multiple of it */
  const TqPlanLayer* layers;
  int64_t num_layers;
  int64_t memory_bytes;  /* for all pages of all layers */
  int64_t max_model_len; /* of one sequence; 0: not known, which only a model without windows and states allows */
  int64_t max_in_flight_tokens; /* scheduled and not yet settled: a window's old pages are freed only behind them */
  int32_t max_block_size;       /* bound of the common multiple of block sizes; 0: 1024, or what a state needs */
  int32_t blocks_per_state;     /* of one sequence; 0 means 1 */
  int32_t side_by_side;         /* 1: the block may be the outermost dimension of the cache, in all layers' kernels */
  int32_t reserved;
} TqPlanRequest;
#define TQ_PLAN_REQUEST_SIZE_1_0 64

typedef struct TqPlanSummary {
  uint32_t struct_size;
  int32_t num_groups;
  int64_t bytes_per_block; /* one page of every layer of the widest group */
  int64_t num_blocks;      /* that fit in memory_bytes */
  int64_t kv_tokens;       /* as vLLM reports them: sequences of max_model_len that fit, times max_model_len */
  int32_t strategy;        /* TqPlanStrategy */
  int32_t reserved;
  int64_t blocks_per_sequence; /* of max_model_len tokens; 0 if that is not known */
  int64_t waste_bytes;         /* in those blocks: padding, and what groups narrower than the widest leave */
  int64_t longest_sequence;    /* <= max_model_len, beside the one block that engines keep back */
} TqPlanSummary;
#define TQ_PLAN_SUMMARY_SIZE_1_0 64

/* Which layers keep the engine's own cache format. */
typedef struct TqSkipRequest {
  uint32_t struct_size;
  int32_t boundary_layers;           /* so many first and last layers are skipped (vLLM's rule is 2); 0: none */
  const int32_t* kv_sharing_targets; /* [num_layers]: the layer whose pages each reads, -1: its own; NULL: all own */
  int64_t num_layers;
  const int32_t* skip_layers; /* [num_skip_layers] layer numbers, or NULL if there are none */
  int64_t num_skip_layers;
} TqSkipRequest;
#define TQ_SKIP_REQUEST_SIZE_1_0 40

/* A caller's thread pool: run(context, n, task, arg) calls task(arg, i) once for each i in [0, n), on up to
 * num_threads threads, and returns when all are done. */
typedef struct TqParallelFor {
  uint32_t struct_size;
  int32_t num_threads;
  void* context;
  void (*run)(void* context, int64_t num_tasks, void (*task)(void* arg, int64_t index), void* arg);
} TqParallelFor;
#define TQ_PARALLEL_FOR_SIZE_1_0 24

typedef struct TqBackendOptions {
  uint32_t struct_size;
  int32_t device_kind;  /* TqDeviceKind */
  int32_t device_index; /* 0 on a CPU */
  int32_t reserved;
  const char* kernels_dir;           /* folder of libtq_kernels_*.so, not empty; NULL: $TQ_KERNELS_DIR, else ours */
  const TqParallelFor* parallel_for; /* of a CPU backend; NULL: the library's own, one thread per usable core */
} TqBackendOptions;
#define TQ_BACKEND_OPTIONS_SIZE_1_0 32

typedef struct TqBackend TqBackend; /* opaque */

typedef struct TqCaps {
  uint32_t struct_size;
  int32_t device_kind;
  char library[256];    /* path of the kernel library */
  char build_id[64];    /* of the kernel library; equals the one of libtq_backend.so */
  char device_name[64]; /* for a CPU: the instruction set that the dispatcher chose */
} TqCaps;
#define TQ_CAPS_SIZE_1_0 392

/* What a kernel library is, found or not: one row per kind, whether or not it can be used here. */
typedef struct TqLibraryInfo {
  uint32_t struct_size;
  int32_t device_kind;
  int32_t usable;    /* 1: create_backend would succeed */
  int32_t score;     /* what TQ_DEVICE_AUTO goes by: 0 if not usable, CPU 10, HIP 20, CUDA 30, and 100 more for the kind
                      * that the environment's TQ_DEVICE names (cpu, cuda or hip) */
  char path[256];    /* where it is, or was looked for */
  char build_id[64]; /* empty if it could not be opened */
  char reason[256];  /* one sentence: why it is usable or not */
} TqLibraryInfo;
#define TQ_LIBRARY_INFO_SIZE_1_0 592

/* Monotonic counts of what one backend has done since it was created. */
typedef struct TqCounters {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t store_calls;
  uint64_t stored_tokens; /* per call: slots >= 0 */
  uint64_t attend_calls;
  uint64_t query_tokens;        /* that attend was asked for */
  uint64_t compressed_kv_reads; /* sum over query tokens of the KV tokens it attended, each read from a page */
} TqCounters;
#define TQ_COUNTERS_SIZE_1_0 48

/* The paged cache of one layer. A page holds block_size tokens of all KV heads: page_bytes = slot_bytes * num_kv_heads
 * * block_size, contiguous; page b starts at data + b * block_stride_bytes. Inside, the order is that of
 * docs/page_format.md, and format_id is its version. */
typedef struct TqPages {
  uint32_t struct_size;
  uint32_t format_id; /* that the pages were written with; must equal the layer's */
  void* data;         /* aligned to TqKvCacheSpec.alignment */
  int64_t num_blocks;
  int64_t block_stride_bytes; /* >= page_bytes, a multiple of TqKvCacheSpec.alignment */
  int32_t block_size;
  int32_t reserved;
} TqPages;
#define TQ_PAGES_SIZE_1_0 40

/* Compress num_tokens keys and values into pages. key: [num_tokens, num_kv_heads, head_dim], value: [..., head_dim_v],
 * dtype of the layer, innermost dimension contiguous, strides in elements. slot_mapping: [num_tokens], slot = block *
 * block_size + offset; -1 (padding) is skipped, anything else out of range is an error. NaN is stored as 0; norms,
 * scales and zero points saturate at the largest finite fp16.
 *
 * key_offset is subtracted from every key of a head before it is stored, so that a large part that all keys share (a
 * bias) costs no precision. It changes no softmax, as it adds the same to all scores of a query: attend and dequant_kv
 * work with keys less the offset, and lse lacks scale * q . key_offset. So a merge with other keys needs the offset
 * taken from those too, sinks need it added to the score, and with a soft cap it must be NULL. Use one offset for all
 * that a layer stores. */
typedef struct TqStoreKvArgs {
  uint32_t struct_size;
  uint32_t reserved;
  const TqLayerDesc* layer;
  const TqPages* pages;
  int64_t num_tokens;
  const void* key;
  int64_t key_token_stride;
  int64_t key_head_stride;
  const void* value;
  int64_t value_token_stride;
  int64_t value_head_stride;
  const int64_t* slot_mapping;
  void* stream;
  const float* key_offset; /* [num_kv_heads, head_dim], or NULL */
} TqStoreKvArgs;
#define TQ_STORE_KV_ARGS_SIZE_1_0 104

/* Attention of num_seqs ragged sequences over pages: decode, multi-token verify and chunked prefill are one operation
 * at different query lengths. Sequence s owns query rows [query_start_loc[s], query_start_loc[s+1]), which are the last
 * ones of its seq_lens[s] tokens; all seq_lens[s] tokens, the current ones too, are read from pages. score = scale *
 * q.k, then the soft cap, then ALiBi (slope * (j - i)), then causal and window masks; a sink adds exp(sinks[h]) to the
 * denominator (+inf counts as the largest finite float). Rows of out must not overlap. A row that sees nothing gives
 * zeros and LSE = -inf. */
typedef struct TqAttendArgs {
  uint32_t struct_size;
  int32_t num_seqs;
  const TqLayerDesc* layer;
  const TqPages* pages;
  int64_t num_tokens; /* rows of query and out; >= query_start_loc[num_seqs] (rows beyond it are left alone) */
  const void* query;  /* [num_tokens, num_heads, head_dim], strides in elements */
  int64_t query_token_stride;
  int64_t query_head_stride;
  void* out; /* [num_tokens, num_heads, head_dim_v] */
  int64_t out_token_stride;
  int64_t out_head_stride;
  const int32_t* query_start_loc; /* [num_seqs + 1], ascending from 0 */
  const int32_t* seq_lens;        /* [num_seqs], >= the sequence's query length */
  const int32_t* block_table;     /* [num_seqs, max_blocks_per_seq], row stride in elements */
  int64_t block_table_stride;
  int32_t max_blocks_per_seq;
  float scale;
  int32_t causal;            /* 1: position i sees j <= i; 0: every query sees the whole sequence (within its window) */
  int32_t max_query_len;     /* upper bound of the sequences' query lengths; 0: not known, num_tokens is taken */
  const float* sinks;        /* [num_heads] or NULL */
  const float* alibi_slopes; /* [num_heads] or NULL */
  float* lse;                /* [num_tokens, num_heads] contiguous or NULL: natural log of the softmax denominator */
  void* workspace;           /* aligned to 64 bytes */
  uint64_t workspace_bytes;  /* >= workspace_size() */
  void* stream;
  /* Bidirectional spans (images of a multimodal prefix), or NULL: [num_seqs, max_spans, 2] token positions [first, end)
   * of the sequence, empty ones as [0, 0). A query within a span also sees all of that span, whatever the causal and
   * window masks say. */
  const int32_t* spans;
  int32_t max_spans;
  int32_t reserved;
} TqAttendArgs;
#define TQ_ATTEND_ARGS_SIZE_1_0 192

/* Decode ranges of tokens of several sequences, one behind the other. Sequence s owns rows [token_start_loc[s],
 * token_start_loc[s+1]) of the outputs; its first token_counts[s] rows (all, if token_counts is NULL) become its tokens
 * first_tokens[s], first_tokens[s] + 1, ..., and its other rows are left alone. key_out: [num_tokens, num_kv_heads,
 * head_dim] or NULL, value_out: [num_tokens, num_kv_heads, head_dim_v] or NULL, contiguous, dtype of the layer. Keys
 * come back unrotated unless keep_rotated is 1, values always. */
typedef struct TqDequantKvArgs {
  uint32_t struct_size;
  int32_t keep_rotated;
  const TqLayerDesc* layer;
  const TqPages* pages;
  int32_t num_seqs;
  int32_t max_blocks_per_seq;
  const int32_t* block_table; /* [num_seqs, max_blocks_per_seq], row stride in elements */
  int64_t block_table_stride;
  const int32_t* first_tokens;    /* [num_seqs], >= 0 */
  const int32_t* token_start_loc; /* [num_seqs + 1], ascending from 0 */
  const int32_t* token_counts;    /* [num_seqs], each at most the sequence's rows, or NULL */
  int64_t num_tokens; /* rows of the outputs; >= token_start_loc[num_seqs] (rows beyond it are left alone) */
  void* key_out;
  void* value_out;
  void* stream;
} TqDequantKvArgs;
#define TQ_DEQUANT_KV_ARGS_SIZE_1_0 104

/* out <- x taken into the space that the layer's pages hold: queries and keys are rotated as keys are before they are
 * quantized, so that the score of a rotated query with a rotated key is that of the query with the key; values and
 * outputs as values are. Twice is the identity. Sides that a format does not rotate are copied. attend rotates queries
 * and outputs itself. x, out: [num_tokens, num_heads, head_dim] (head_dim_v for values and outputs), dtype of the
 * layer, innermost dimension contiguous, strides in elements; they may be the same memory with the same strides, and
 * must not overlap otherwise. */
typedef struct TqRotateArgs {
  uint32_t struct_size;
  int32_t num_heads; /* of x and out: any number from 1 to 65536 */
  int32_t side;      /* TqSide of x */
  int32_t reserved;
  const TqLayerDesc* layer;
  int64_t num_tokens;
  const void* x;
  int64_t x_token_stride;
  int64_t x_head_stride;
  void* out;
  int64_t out_token_stride;
  int64_t out_head_stride;
  void* stream;
} TqRotateArgs;
#define TQ_ROTATE_ARGS_SIZE_1_0 88

/* Pages src_dst[i][0] are copied to src_dst[i][1]. The pairs have no order: a block that one pair writes must not occur
 * in another pair (on a CPU an error; on a GPU that block's content is then undefined). A pair of one block with itself
 * does nothing. */
typedef struct TqCopyPagesArgs {
  uint32_t struct_size;
  uint32_t reserved;
  const TqLayerDesc* layer;
  const TqPages* pages;
  const int64_t* src_dst; /* [num_pairs, 2] block numbers */
  int64_t num_pairs;
  void* stream;
} TqCopyPagesArgs;
#define TQ_COPY_PAGES_ARGS_SIZE_1_0 48

typedef struct TqApi {
  uint32_t struct_size;
  int32_t major;
  int32_t minor;
  uint32_t reserved;

  /* Identity of libtq_backend.so; zero-terminated, static. */
  const char* (*build_id)(void);

  /* Formats. list_formats: *count holds the capacity of out on entry and the number of formats on return; out may be
   * NULL. format_by_name: an unknown name gives TQ_NOT_FOUND and names a similar one, if there is one. */
  int32_t (*list_formats)(TqFormatInfo* out, int64_t* count, TqError* error);
  int32_t (*format_by_name)(const char* name, TqFormatInfo* out, TqError* error);

  /* The codebook of a side whose codes are indices of one (others give TQ_NOT_FOUND): code i decodes to levels[i] in
   * units of the rotated vector's norm divided by sqrt(head_dim), and midpoints are the decision thresholds in the same
   * unit (a value equal to a midpoint goes up). levels: [num_levels] and midpoints: [num_levels - 1] ascend; both have
   * room for `capacity` floats, or are NULL. */
  int32_t (*codebook)(const TqCodebookArgs* args, TqCodebook* out, float* levels, float* midpoints, int64_t capacity,
                      TqError* error);
  int32_t (*fake_quantize)(const TqFakeQuantizeArgs* args, TqError* error);

  /* Planner: host arithmetic, no device. plan_pages fills one TqPagePlan per layer; *count is capacity in, number out;
   * out may be NULL. */
  int32_t (*kv_cache_spec)(const TqLayerDesc* layer, TqKvCacheSpec* out, TqError* error);
  int32_t (*plan_pages)(const TqPlanRequest* request, TqPagePlan* out, int64_t* count, TqPlanSummary* summary,
                        TqError* error);
  /* The layers to skip such that those which share pages are all skipped or none is. out receives ascending layer
   * numbers; *count is capacity in (num_layers is always enough), number out; out may be NULL. */
  int32_t (*align_skip_layers)(const TqSkipRequest* request, int32_t* out, int64_t* count, TqError* error);

  /* Backends. list_libraries: one row per kernel library kind, same count convention; never fails on a missing library.
   * kernels_dir as in TqBackendOptions. */
  int32_t (*list_libraries)(const char* kernels_dir, TqLibraryInfo* out, int64_t* count, TqError* error);
  int32_t (*create_backend)(const TqBackendOptions* options, TqBackend** out, TqError* error);
  void (*destroy_backend)(TqBackend* backend); /* NULL does nothing */
  int32_t (*query_caps)(const TqBackend* backend, TqCaps* out, TqError* error);
  int32_t (*query_counters)(const TqBackend* backend, TqCounters* out, TqError* error);

  /* *unmet: bit mask of what this backend cannot do for the layer, 0 if all is served. unmet_reason gives a static
   * sentence for one bit, NULL for a bit that does not exist. */
  int32_t (*check_layer)(const TqBackend* backend, const TqLayerDesc* layer, uint64_t* unmet, TqError* error);
  const char* (*unmet_reason)(int32_t bit);

  /* Bytes of workspace that attend needs for the layer, whatever the batch. */
  int32_t (*workspace_size)(const TqBackend* backend, const TqLayerDesc* layer, uint64_t* bytes, TqError* error);
  int32_t (*store_kv)(TqBackend* backend, const TqStoreKvArgs* args, TqError* error);
  int32_t (*attend)(TqBackend* backend, const TqAttendArgs* args, TqError* error);
  int32_t (*dequant_kv)(TqBackend* backend, const TqDequantKvArgs* args, TqError* error);
  int32_t (*copy_pages)(TqBackend* backend, const TqCopyPagesArgs* args, TqError* error);
  int32_t (*rotate)(TqBackend* backend, const TqRotateArgs* args, TqError* error);
} TqApi;
#define TQ_API_SIZE_1_0 184

/* Whether a library has a function of this header: one of an older minor version has a shorter table. */
#define TQ_API_HAS(api, function) \
  ((api)->struct_size >= offsetof(TqApi, function) + sizeof((api)->function) && (api)->function != NULL)

/* (TQ_ABI_MAJOR << 16) | TQ_ABI_MINOR of the library. */
uint32_t tq_abi_version(void);

/* The function table of the given major version, or NULL with *error set when this library does not serve it. */
const TqApi* tq_get_api(uint32_t major, TqError* error);

#ifdef __cplusplus
}
#endif

#endif /* TQ_BACKEND_H_ */
