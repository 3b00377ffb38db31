/* A small engine on tq_backend.h: plans the pages of a model of two layers, stores a prompt, decodes one token, and
 * compares with attention over what the reference codec reads back. It runs on the CPU; on a GPU all data pointers of
 * store_kv and attend are device memory, and the rest stays as it is. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tq_backend.h>

enum { kLayers = 2, kHeads = 4, kKvHeads = 2, kDim = 128, kTokens = 100, kBlocks = 7, kMemory = 1 << 20 };

static _Alignas(64) char memory[kMemory]; /* for the pages of all layers */
static float key[kTokens][kKvHeads][kDim], value[kTokens][kKvHeads][kDim], query[kHeads][kDim], out[kHeads][kDim];
static float key_read[kTokens][kKvHeads][kDim], value_read[kTokens][kKvHeads][kDim];

static TqError error = {.struct_size = sizeof error};

static void check(const char* what, int32_t code) {
  if (code == TQ_OK) return;
  fprintf(stderr, "%s: %s\n", what, error.message); /* one sentence: the argument, what came, what is allowed */
  exit(1);
}

/* Attention by its definition, over the keys and values that the reference codec reads back. */
static double largest_error(float scale) {
  double largest = 0;
  for (int h = 0; h < kHeads; ++h) {
    const int kv = h / (kHeads / kKvHeads);
    double weight[kTokens], sum = 0;
    for (int t = 0; t < kTokens; ++t) {
      double score = 0;
      for (int d = 0; d < kDim; ++d) score += (double)query[h][d] * key_read[t][kv][d];
      sum += weight[t] = exp(score * scale);
    }
    for (int d = 0; d < kDim; ++d) {
      double want = 0;
      for (int t = 0; t < kTokens; ++t) want += weight[t] / sum * value_read[t][kv][d];
      largest = fmax(largest, fabs(out[h][d] - want));
    }
  }
  return largest;
}

// clang-format off: fields that belong together stay on one line
int main(void) {
  /* The function table. A newer library serves this program too: structs and the table only grow. */
  const TqApi* tq = tq_get_api(TQ_ABI_MAJOR, &error);
  if (tq == NULL) check("tq_get_api", error.code);

  TqBackend* backend = NULL;
  const TqBackendOptions options = {.struct_size = sizeof options, .device_kind = TQ_DEVICE_CPU};
  check("create_backend", tq->create_backend(&options, &backend, &error));

  /* Two layers, one compressed further than the other. */
  const uint32_t formats[kLayers] = {TQ_FORMAT_TURBOQUANT_4BIT_NC, TQ_FORMAT_TURBOQUANT_3BIT_NC};
  TqLayerDesc layers[kLayers];
  TqPlanLayer planned[kLayers];
  for (int i = 0; i < kLayers; ++i) {
    layers[i] = (TqLayerDesc){.struct_size = sizeof layers[i], .format_id = formats[i],
                              .num_heads = kHeads, .num_kv_heads = kKvHeads, .head_dim = kDim, .dtype = TQ_DTYPE_F32,
                              .attention_kind = TQ_ATTENTION_DECODER};
    planned[i] = (TqPlanLayer){.struct_size = sizeof planned[i], .format_id = formats[i],
                               .num_kv_heads = kKvHeads, .head_dim = kDim};
    uint64_t unmet = 0; /* what this backend cannot do for the layer: ask before a model is loaded */
    check("check_layer", tq->check_layer(backend, &layers[i], &unmet, &error));
    for (int bit = 0; bit < 64; ++bit) {
      if (unmet >> bit & 1) return fprintf(stderr, "layer %d: %s\n", i, tq->unmet_reason(bit)), 1;
    }
  }

  /* How many blocks fit into the memory, and how large each layer's pages are. */
  const TqPlanRequest request = {.struct_size = sizeof request, .layers = planned, .num_layers = kLayers,
                                 .block_size = 16, .memory_bytes = kMemory, .max_model_len = 512};
  TqPagePlan plan[kLayers] = {{.struct_size = sizeof plan[0]}, {.struct_size = sizeof plan[0]}};
  TqPlanSummary summary = {.struct_size = sizeof summary};
  int64_t count = kLayers;
  check("plan_pages", tq->plan_pages(&request, plan, &count, &summary, &error));
  printf("%lld blocks, %lld KV tokens\n", (long long)summary.num_blocks, (long long)summary.kv_tokens);

  for (int i = 0; i < kTokens * kKvHeads * kDim; ++i) {
    (&key[0][0][0])[i] = sinf(0.37f * (float)i) + 0.3f * cosf(0.011f * (float)(i % 4099));
    (&value[0][0][0])[i] = cosf(0.73f * (float)i);
  }
  for (int i = 0; i < kHeads * kDim; ++i) (&query[0][0])[i] = 3 * sinf(1.1f * (float)i);
  /* The engine's block table: the sequence's tokens lie in these blocks of every layer's pages. */
  const int32_t block_table[kBlocks] = {5, 0, 11, 2, 3, 8, 1}, starts[2] = {0, 1}, seq_len = kTokens;
  const float scale = 1 / sqrtf(kDim);

  char* pages_of_layer = memory;
  for (int i = 0; i < kLayers; ++i) {
    const TqPages pages = {.struct_size = sizeof pages, .format_id = formats[i], .data = pages_of_layer,
                           .num_blocks = summary.num_blocks, .block_size = plan[i].block_size,
                           .block_stride_bytes = plan[i].page_bytes};
    pages_of_layer += summary.num_blocks * plan[i].page_bytes;
    int64_t slots[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      slots[t] = (int64_t)block_table[t / pages.block_size] * pages.block_size + t % pages.block_size;
    }
    const TqStoreKvArgs store = {.struct_size = sizeof store, .layer = &layers[i], .pages = &pages,
                                 .num_tokens = kTokens, .slot_mapping = slots,
                                 .key = key, .key_token_stride = kKvHeads * kDim, .key_head_stride = kDim,
                                 .value = value, .value_token_stride = kKvHeads * kDim, .value_head_stride = kDim};
    check("store_kv", tq->store_kv(backend, &store, &error));

    uint64_t bytes = 0;
    check("workspace_size", tq->workspace_size(backend, &layers[i], &bytes, &error));
    void* workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (workspace == NULL) return 1;
    memset(workspace, 0, bytes); /* once, before its first use */
    const TqAttendArgs attend = {.struct_size = sizeof attend, .layer = &layers[i], .pages = &pages,
                                 .num_seqs = 1, .query_start_loc = starts, .seq_lens = &seq_len,
                                 .block_table = block_table, .block_table_stride = kBlocks,
                                 .max_blocks_per_seq = kBlocks, .num_tokens = 1, .scale = scale, .causal = 1,
                                 .query = query, .query_token_stride = kHeads * kDim, .query_head_stride = kDim,
                                 .out = out, .out_token_stride = kHeads * kDim, .out_head_stride = kDim,
                                 .workspace = workspace, .workspace_bytes = bytes};
    check("attend", tq->attend(backend, &attend, &error));

    TqFakeQuantizeArgs keys = {.struct_size = sizeof keys, .format_id = formats[i], .side = TQ_SIDE_KEY,
                               .head_dim = kDim, .num_rows = kTokens * kKvHeads,
                               .in = &key[0][0][0], .out = &key_read[0][0][0]};
    check("fake_quantize", tq->fake_quantize(&keys, &error));
    TqFakeQuantizeArgs values = keys;
    values.side = TQ_SIDE_VALUE;
    values.in = &value[0][0][0];
    values.out = &value_read[0][0][0];
    check("fake_quantize", tq->fake_quantize(&values, &error));
    const double difference = largest_error(scale);
    printf("layer %d: largest difference from the reference %.1e\n", i, difference);
    if (!(difference < 1e-3)) return 1;
    free(workspace);
  }
  tq->destroy_backend(backend);
  return 0;
}
