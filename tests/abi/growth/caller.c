/* caller.c - an engine in C11 that calls every function of the header it was compiled with, against a library of
 * another minor version: caller LIBRARY KERNELS_DIR MINOR. Compiled with header 1.0, and with the 1.1 of
 * next_header.cmake.
 *
 * With one KV token visible (a window of 1) attention must return that token's value as the reference codec reads it
 * back. Every array has elements of the caller's size behind one another, and a canary behind the last. */
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tq_backend.h"

enum { kDim = 64, kTokens = 48, kBlock = 16, kBlocks = 8, kSlot = 70, kRows = 3, kPoison = 0x5a };

static _Alignas(64) uint8_t page_bytes[kBlocks * kSlot * kBlock];
static _Alignas(64) uint8_t workspace[8 << 20];
static float key[kTokens * kDim], value[kTokens * kDim], query[kTokens * kDim], out[kTokens * kDim],
    want[kTokens * kDim], decoded[kTokens * kDim];
static TqError error = {.struct_size = sizeof error};
static int library_minor;

#define FAIL(...) \
  (fprintf(stderr, "%s:%d: ", __FILE__, __LINE__), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1))
#define EXPECT(condition) ((condition) ? (void)0 : FAIL("%s does not hold; error '%s'", #condition, error.message))
#define CHECK(call) EXPECT((call) == TQ_OK)

/* A struct to fill, uninitialised but for its size; and what must be in the field that 1.1 appended: zero if the
 * library knows it, what was there if not. */
#define POISON(x) (memset(&(x), kPoison, sizeof(x)), (x).struct_size = sizeof(x))
#if TQ_ABI_MINOR >= 1
#define EXPECT_APPENDED(x) \
  EXPECT((x).struct_size == sizeof(x) && (x).appended == (library_minor >= 1 ? 0 : 0x5a5a5a5a5a5a5a5a))
/* A call that reads *x: with the appended field set, a library that knows it goes on and an older one says no. */
#define CHECK_GROWN(x, call)                                                          \
  do {                                                                                \
    CHECK(call);                                                                      \
    (x).appended = 1;                                                                 \
    if (library_minor >= 1) CHECK(call);                                              \
    if (library_minor < 1) {                                                          \
      EXPECT((call) == TQ_INVALID_ARGUMENT);                                          \
      EXPECT(strstr(error.message, "fields of a newer header must be zero") != NULL); \
    }                                                                                 \
    (x).appended = 0;                                                                 \
  } while (0)
#else
#define EXPECT_APPENDED(x) EXPECT((x).struct_size == sizeof(x))
#define CHECK_GROWN(x, call) CHECK(call)
#endif

static void formats(const TqApi* api) {
  struct {
    TqFormatInfo rows[16];
    char canary;
  } box;
  memset(&box, kPoison, sizeof box);
  int64_t number = 0, count = 16;
  CHECK(api->list_formats(NULL, &number, &error));
  EXPECT(number > 3 && number < 16);
  for (int i = 0; i < 16; ++i) box.rows[i].struct_size = sizeof box.rows[i];
  CHECK(api->list_formats(box.rows, &count, &error));
  EXPECT(count == number);
  for (int i = 0; i < number; ++i) {
    TqFormatInfo one;
    POISON(one);
    CHECK(api->format_by_name(box.rows[i].name, &one, &error));
    EXPECT(one.format_id == box.rows[i].format_id && one.value_bits == box.rows[i].value_bits);
    EXPECT_APPENDED(one);
    EXPECT_APPENDED(box.rows[i]);
  }
  EXPECT((box.rows[number].format_id & 0xff) == kPoison && box.canary == kPoison);

  TqCodebookArgs args = {
      .struct_size = sizeof args, .format_id = TQ_FORMAT_TURBOQUANT_4BIT_NC, .side = TQ_SIDE_KEY, .head_dim = kDim};
  TqCodebook book;
  POISON(book);
  float levels[16], midpoints[16];
  CHECK_GROWN(args, api->codebook(&args, &book, levels, midpoints, 16, &error));
  EXPECT(book.num_levels == 16 && book.num_dims == kDim && levels[0] == -levels[15]);
  EXPECT_APPENDED(book);
}

static void planner(const TqApi* api) {
  struct {
    TqPagePlan rows[kRows + 1];
  } box;
  memset(&box, kPoison, sizeof box);
  for (int i = 0; i < kRows; ++i) box.rows[i].struct_size = sizeof box.rows[i];
  TqPlanLayer layers[kRows];
  memset(layers, 0, sizeof layers);
  for (int i = 0; i < kRows; ++i) {
    layers[i].struct_size = sizeof layers[i];
    layers[i].format_id = TQ_FORMAT_TURBOQUANT_4BIT_NC;
    layers[i].num_kv_heads = i + 1;
    layers[i].head_dim = kDim;
  }
  TqPlanRequest request = {.struct_size = sizeof request,
                           .block_size = kBlock,
                           .layers = layers,
                           .num_layers = kRows,
                           .memory_bytes = 1 << 20};
  TqPlanSummary summary;
  POISON(summary);
  int64_t count = kRows;
  CHECK_GROWN(request, api->plan_pages(&request, box.rows, &count, &summary, &error));
  CHECK_GROWN(layers[1], api->plan_pages(&request, box.rows, &count, &summary, &error));
  EXPECT_APPENDED(summary);
  for (int i = 0; i < kRows; ++i) {
    EXPECT(box.rows[i].page_bytes == (int64_t)kSlot * kBlock * (i + 1));
    EXPECT_APPENDED(box.rows[i]);
  }
  EXPECT((box.rows[kRows].struct_size & 0xff) == kPoison);

  const int32_t targets[kRows] = {-1, -1, 1}, skip[] = {2};
  int32_t skipped[kRows];
  TqSkipRequest skips = {.struct_size = sizeof skips,
                         .kv_sharing_targets = targets,
                         .num_layers = kRows,
                         .skip_layers = skip,
                         .num_skip_layers = 1};
  count = kRows;
  CHECK_GROWN(skips, api->align_skip_layers(&skips, skipped, &count, &error));
  EXPECT(count == 2 && skipped[0] == 1 && skipped[1] == 2);
}

static void run_tasks(void* context, int64_t number, void (*task)(void* arg, int64_t index), void* arg) {
  ++*(int*)context;
  for (int64_t i = 0; i < number; ++i) task(arg, i);
}

static int32_t create_and_destroy(const TqApi* api, const TqBackendOptions* options) {
  TqBackend* backend = NULL;
  const int32_t code = api->create_backend(options, &backend, &error);
  if (code == TQ_OK) api->destroy_backend(backend);
  return code;
}

static void attention(const TqApi* api, const char* kernels_dir) {
  struct {
    TqLibraryInfo rows[3];
    char canary;
  } box;
  memset(&box, kPoison, sizeof box);
  for (int i = 0; i < 3; ++i) box.rows[i].struct_size = sizeof box.rows[i];
  int64_t count = 3;
  CHECK(api->list_libraries(kernels_dir, box.rows, &count, &error));
  for (int i = 0; i < 3; ++i) {
    EXPECT(box.rows[i].device_kind == TQ_DEVICE_CPU + i);
    EXPECT_APPENDED(box.rows[i]);
  }
  EXPECT(box.rows[0].usable == 1 && box.canary == kPoison);

  int calls = 0;
  TqParallelFor pool = {.struct_size = sizeof pool, .num_threads = 2, .context = &calls, .run = run_tasks};
  TqBackendOptions options = {
      .struct_size = sizeof options, .device_kind = TQ_DEVICE_CPU, .kernels_dir = kernels_dir, .parallel_for = &pool};
  TqBackend* backend = NULL;
  CHECK_GROWN(options, create_and_destroy(api, &options));
  CHECK_GROWN(pool, create_and_destroy(api, &options));
  CHECK(api->create_backend(&options, &backend, &error));
  TqCaps caps;
  POISON(caps);
  CHECK(api->query_caps(backend, &caps, &error));
  EXPECT(caps.device_kind == TQ_DEVICE_CPU);
  EXPECT_APPENDED(caps);

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
                       .sliding_window = 1};
  TqKvCacheSpec spec;
  POISON(spec);
  CHECK_GROWN(layer, api->kv_cache_spec(&layer, &spec, &error));
  EXPECT(spec.slot_bytes == kSlot);
  EXPECT_APPENDED(spec);
  uint64_t bytes = 1;
  CHECK_GROWN(layer, api->check_layer(backend, &layer, &bytes, &error));
  EXPECT(bytes == 0);
  TqPages pages = {.struct_size = sizeof pages,
                   .format_id = layer.format_id,
                   .data = page_bytes,
                   .num_blocks = kBlocks,
                   .block_stride_bytes = kSlot * kBlock,
                   .block_size = kBlock};
  int64_t slots[kTokens];
  const int32_t table[3] = {5, 0, 7}, starts[2] = {0, kTokens}, lens[1] = {kTokens}, first[1] = {0};
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
  CHECK_GROWN(store, api->store_kv(backend, &store, &error));
  CHECK_GROWN(pages, api->store_kv(backend, &store, &error));

  CHECK_GROWN(layer, api->workspace_size(backend, &layer, &bytes, &error));
  EXPECT(bytes <= sizeof workspace);
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
                         .workspace_bytes = bytes};
  CHECK_GROWN(attend, api->attend(backend, &attend, &error));
  TqFakeQuantizeArgs codec = {.struct_size = sizeof codec,
                              .format_id = layer.format_id,
                              .side = TQ_SIDE_VALUE,
                              .head_dim = kDim,
                              .num_rows = kTokens,
                              .in = value,
                              .out = want};
  CHECK_GROWN(codec, api->fake_quantize(&codec, &error));
  for (int i = 0; i < kTokens * kDim; ++i) {
    if (!(fabsf(out[i] - want[i]) < 1e-4f)) FAIL("element %d is %g, not %g", i, (double)out[i], (double)want[i]);
  }

  const int64_t pairs[2] = {5, 2};
  TqCopyPagesArgs copy = {
      .struct_size = sizeof copy, .layer = &layer, .pages = &pages, .src_dst = pairs, .num_pairs = 1};
  CHECK_GROWN(copy, api->copy_pages(backend, &copy, &error));
  const int32_t moved[3] = {2, 0, 7};
  TqDequantKvArgs dequant = {.struct_size = sizeof dequant,
                             .layer = &layer,
                             .pages = &pages,
                             .num_seqs = 1,
                             .max_blocks_per_seq = 3,
                             .block_table = moved,
                             .block_table_stride = 3,
                             .first_tokens = first,
                             .token_start_loc = starts,
                             .num_tokens = kTokens,
                             .value_out = decoded};
  CHECK_GROWN(dequant, api->dequant_kv(backend, &dequant, &error));
  for (int i = 0; i < kTokens * kDim; ++i) EXPECT(fabsf(decoded[i] - want[i]) < 1e-4f);
  TqRotateArgs rotate = {.struct_size = sizeof rotate,
                         .num_heads = 1,
                         .side = TQ_SIDE_VALUE,
                         .layer = &layer,
                         .num_tokens = kTokens,
                         .x = value,
                         .x_token_stride = kDim,
                         .x_head_stride = kDim,
                         .out = out,
                         .out_token_stride = kDim,
                         .out_head_stride = kDim};
  CHECK_GROWN(rotate, api->rotate(backend, &rotate, &error));
  EXPECT(memcmp(out, value, sizeof value) == 0);

  TqCounters counters;
  POISON(counters);
  CHECK(api->query_counters(backend, &counters, &error));
  EXPECT(counters.store_calls >= 1 && counters.attend_calls >= 1 && calls > 0);
  EXPECT_APPENDED(counters);
  api->destroy_backend(backend);
}

int main(int argc, char** argv) {
  if (argc != 4) FAIL("usage: caller LIBRARY KERNELS_DIR MINOR");
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) FAIL("%s", dlerror());
  const TqApi* (*get_api)(uint32_t, TqError*);
  uint32_t (*version)(void);
  *(void**)&get_api = dlsym(library, "tq_get_api");
  *(void**)&version = dlsym(library, "tq_abi_version");
  const TqApi* api = get_api(TQ_ABI_MAJOR, &error);
  EXPECT(api != NULL && version() >> 16 == TQ_ABI_MAJOR);
  library_minor = api->minor;
  EXPECT(library_minor == atoi(argv[3]) && (version() & 0xffff) == (uint32_t)library_minor);
  formats(api);
  planner(api);
  attention(api, argv[2]);
  EXPECT(TQ_API_HAS(api, rotate));
#if TQ_ABI_MINOR >= 1
  EXPECT(TQ_API_HAS(api, appended) == (library_minor >= 1));
  if (TQ_API_HAS(api, appended)) EXPECT(api->appended(41) == 42);
#endif
  printf("a caller of header 1.%d works with a library of 1.%d\n", TQ_ABI_MINOR, library_minor);
  return 0;
}
