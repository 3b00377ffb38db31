/* old_caller_test.c - an engine in C11, built against the oldest released header: compresses 48 tokens and attends over
 * them. With one KV token visible (a window of 1) attention must return that token's value as the reference codec reads
 * it back. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "tq_backend.h"

enum { kDim = 64, kTokens = 48, kBlock = 16 };

static _Alignas(64) uint8_t page_bytes[8 * 70 * kBlock];
static _Alignas(64) uint8_t workspace[8 << 20];
static float key[kTokens * kDim], value[kTokens * kDim], query[kTokens * kDim], out[kTokens * kDim],
    want[kTokens * kDim];

#define CHECK(call)                                      \
  do {                                                   \
    if ((call) != TQ_OK) {                               \
      fprintf(stderr, "%s: %s\n", #call, error.message); \
      return 1;                                          \
    }                                                    \
  } while (0)

int main(void) {
  TqError error = {.struct_size = sizeof error};
  const TqApi* api = tq_get_api(TQ_ABI_MAJOR, &error);
  if (api == NULL || tq_abi_version() >> 16 != TQ_ABI_MAJOR) return 1;
  TqBackendOptions options = {.struct_size = sizeof options, .device_kind = TQ_DEVICE_CPU};
  TqBackend* backend = NULL;
  CHECK(api->create_backend(&options, &backend, &error));

  for (int i = 0; i < kTokens * kDim; ++i) {
    key[i] = sinf(0.3f * (float)i);
    value[i] = cosf(0.7f * (float)i);
    query[i] = sinf(1.1f * (float)i);
  }
  TqLayerDesc layer = {.struct_size = sizeof layer,
                       .format_id = TQ_FORMAT_TURBOQUANT_4BIT_NC,
                       .num_heads = 1,
                       .num_kv_heads = 1,
                       .head_dim = kDim,
                       .dtype = TQ_DTYPE_F32,
                       .attention_kind = TQ_ATTENTION_DECODER,
                       .sliding_window = 1,
                       .kv_sharing_target = -1};
  TqPages pages = {.struct_size = sizeof pages,
                   .format_id = layer.format_id,
                   .data = page_bytes,
                   .num_blocks = 8,
                   .block_stride_bytes = 70 * kBlock,
                   .block_size = kBlock};
  int64_t slots[kTokens];
  const int32_t table[3] = {5, 0, 7}, starts[2] = {0, kTokens}, lens[1] = {kTokens};
  for (int i = 0; i < kTokens; ++i) slots[i] = (int64_t)table[i / kBlock] * kBlock + i % kBlock;
  TqStoreKvArgs store = {.struct_size = sizeof store,
                         .layer = &layer,
                         .pages = &pages,
                         .num_tokens = kTokens,
                         .key = key,
                         .key_token_stride = kDim,
                         .key_head_stride = kDim,
                         .value = value,
                         .value_token_stride = kDim,
                         .value_head_stride = kDim,
                         .slot_mapping = slots};
  CHECK(api->store_kv(backend, &store, &error));

  uint64_t bytes = 0;
  CHECK(api->workspace_size(backend, &layer, kTokens, 1, &bytes, &error));
  if (bytes > sizeof workspace) return 1;
  TqAttendArgs attend = {.struct_size = sizeof attend,
                         .num_seqs = 1,
                         .layer = &layer,
                         .pages = &pages,
                         .num_tokens = kTokens,
                         .query = query,
                         .query_token_stride = kDim,
                         .query_head_stride = kDim,
                         .out = out,
                         .out_token_stride = kDim,
                         .out_head_stride = kDim,
                         .query_start_loc = starts,
                         .seq_lens = lens,
                         .block_table = table,
                         .block_table_stride = 3,
                         .max_blocks_per_seq = 3,
                         .scale = 0.125f,
                         .causal = 1,
                         .workspace = workspace,
                         .workspace_bytes = sizeof workspace};
  CHECK(api->attend(backend, &attend, &error));
  CHECK(api->fake_quantize(layer.format_id, 0, kDim, kTokens, value, want, &error));
  for (int i = 0; i < kTokens * kDim; ++i) {
    if (!(fabsf(out[i] - want[i]) < 1e-4f)) {
      fprintf(stderr, "element %d is %g, not %g\n", i, (double)out[i], (double)want[i]);
      return 1;
    }
  }
  api->destroy_backend(backend);
  puts("a caller of header 1.0 works");
  return 0;
}
