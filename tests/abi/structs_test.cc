// structs_test.cc - the rules that the header states of structs: sizes, reserved fields, arrays, and that a call which
// fails has written nothing. What grows with a newer header is in growth/.
#include "abi_fixture.h"

namespace tq::testing {
namespace {

using Structs = AbiTest;

// The call fails and its sentence has these words.
#define EXPECT_REFUSED(call, words)                                                        \
  do {                                                                                     \
    TqError error = make_error();                                                          \
    EXPECT_EQ((call), TQ_INVALID_ARGUMENT) << (words);                                     \
    EXPECT_NE(std::string(error.message).find(words), std::string::npos) << error.message; \
  } while (0)

TEST_F(Structs, SizesThatNoHeaderHas) {
  for (const uint32_t size : {0u, 4u, TQ_LAYER_DESC_SIZE_1_0 - 4u, TQ_LAYER_DESC_SIZE_1_0 + 1u, 4100u, 0xcdcdcdcdu}) {
    layer.struct_size = size;
    EXPECT_REFUSED(api().store_kv(backend, &store, &error), "layer.struct_size is " + std::to_string(size) +
                                                                "; it must be the struct's sizeof, from 40 to 4096");
  }
  layer.struct_size = sizeof(layer);
  pages.struct_size = sizeof(pages) + 4;  // the next one of an array would have its pointers out of line
  EXPECT_REFUSED(api().store_kv(backend, &store, &error), "pages.struct_size is 44");
  pages.struct_size = sizeof(pages);
  TqCaps caps = {};
  EXPECT_REFUSED(api().query_caps(backend, &caps, &error), "out.struct_size is 0");
  TqCounters counters = {};
  EXPECT_REFUSED(api().query_counters(backend, &counters, &error), "out.struct_size is 0");
  TqKvCacheSpec spec = {};
  EXPECT_REFUSED(api().kv_cache_spec(&layer, &spec, &error), "out.struct_size is 0");
  EXPECT_REFUSED(api().kv_cache_spec(&layer, nullptr, &error), "out is NULL");
}

TEST_F(Structs, ReservedFieldsMustBeZero) {
  store.reserved = 1;
  EXPECT_REFUSED(api().store_kv(backend, &store, &error), "args.reserved is 1; it must be 0");
  store.reserved = 0;
  pages.reserved = -3;
  EXPECT_REFUSED(api().store_kv(backend, &store, &error), "pages.reserved is -3");
  pages.reserved = 0;
  attend.reserved = 1;
  EXPECT_REFUSED(api().attend(backend, &attend, &error), "args.reserved is 1");
  attend.reserved = 0;

  TqRotateArgs rotate = {};
  rotate.struct_size = sizeof(rotate);
  rotate.layer = &layer;
  rotate.num_heads = 1;
  rotate.side = TQ_SIDE_KEY;
  EXPECT_EQ(api().rotate(backend, &rotate, nullptr), TQ_OK);
  rotate.reserved = 1;
  EXPECT_REFUSED(api().rotate(backend, &rotate, &error), "args.reserved is 1");
  TqCopyPagesArgs copy = {};
  copy.struct_size = sizeof(copy);
  copy.layer = &layer;
  copy.pages = &pages;
  EXPECT_EQ(api().copy_pages(backend, &copy, nullptr), TQ_OK);
  copy.reserved = 1;
  EXPECT_REFUSED(api().copy_pages(backend, &copy, &error), "args.reserved is 1");
  TqBackendOptions options = {};
  options.struct_size = sizeof(options);
  options.device_kind = TQ_DEVICE_CPU;
  options.reserved = 1;
  TqBackend* made = nullptr;
  EXPECT_REFUSED(api().create_backend(&options, &made, &error), "options.reserved is 1");
  EXPECT_EQ(made, nullptr);
  TqCodebookArgs args = {};
  args.struct_size = sizeof(args);
  args.format_id = TQ_FORMAT_TURBOQUANT_4BIT_NC;
  args.side = TQ_SIDE_KEY;
  args.head_dim = 64;
  TqCodebook book = {};
  book.struct_size = sizeof(book);
  EXPECT_EQ(api().codebook(&args, &book, nullptr, nullptr, 0, nullptr), TQ_OK);
  args.reserved = 1;
  EXPECT_REFUSED(api().codebook(&args, &book, nullptr, nullptr, 0, &error), "args.reserved is 1");
}

class Plans : public AbiTest {
 protected:
  void SetUp() override {
    AbiTest::SetUp();
    for (TqPlanLayer& l : layers) {
      l = {};
      l.struct_size = sizeof(l);
      l.format_id = layer.format_id;
      l.num_kv_heads = 2;
      l.head_dim = 64;
    }
    request.struct_size = sizeof(request);
    request.block_size = 16;
    request.layers = layers;
    request.num_layers = 3;
    request.memory_bytes = 1 << 20;
    std::memset(rows, 0x5a, sizeof(rows));
    std::memset(&summary, 0x5a, sizeof(summary));
    for (TqPagePlan& row : rows) row.struct_size = sizeof(row);
    summary.struct_size = sizeof(summary);
  }

  // The call fails with these words and has written neither summary, rows nor count.
  void expect_untouched(const std::string& words) {
    const TqPlanSummary summary_before = summary;
    TqPagePlan rows_before[3];
    std::memcpy(rows_before, rows, sizeof(rows));
    const int64_t count_before = count;
    EXPECT_REFUSED(api().plan_pages(&request, rows, &count, &summary, &error), words);
    EXPECT_EQ(std::memcmp(&summary, &summary_before, sizeof(summary)), 0) << words;
    EXPECT_EQ(std::memcmp(rows, rows_before, sizeof(rows)), 0) << words;
    EXPECT_EQ(count, count_before);
  }

  TqPlanLayer layers[3];
  TqPlanRequest request = {};
  TqPagePlan rows[3];
  TqPlanSummary summary;
  int64_t count = 3;
};

TEST_F(Plans, AFailureHasWrittenNothing) {
  rows[2].struct_size = 0;
  expect_untouched("out[2].struct_size is 0; it must be that of the first element, 32");
  rows[2].struct_size = sizeof(TqPagePlan);
  summary.struct_size = 8;
  expect_untouched("summary.struct_size is 8");
  summary.struct_size = sizeof(summary);
  layers[2].struct_size = sizeof(TqPlanLayer) + 8;
  expect_untouched("request.layers[2].struct_size is 56; it must be that of the first element, 48");
  layers[2].struct_size = sizeof(TqPlanLayer);
  layers[1].head_dim = 24;
  expect_untouched("layers[1].head_dim is 24");
  layers[1].head_dim = 64;
  count = 2;
  expect_untouched("*count is 2; out must have room for 3 layers");
  count = 3;
  request.reserved = 7;
  expect_untouched("request.reserved is 7");
  request.reserved = 0;
  request.side_by_side = 2;
  expect_untouched("request.side_by_side is 2; it must be 0 or 1");
  request.side_by_side = 0;
  layers[0].reserved = 1;
  expect_untouched("request.layers[0].reserved is 1");
  layers[0].reserved = 0;
  EXPECT_EQ(api().plan_pages(&request, rows, &count, &summary, nullptr), TQ_OK);
}

TEST_F(Plans, ZeroIsNoSharedLayer) {
  ASSERT_EQ(api().plan_pages(&request, rows, &count, &summary, nullptr), TQ_OK);
  for (const TqPagePlan& row : rows) EXPECT_EQ(row.page_bytes, 16 * 2 * 70);
  layers[2].shares_pages = 1;  // of layer 0
  ASSERT_EQ(api().plan_pages(&request, rows, &count, &summary, nullptr), TQ_OK);
  EXPECT_EQ(rows[1].page_bytes, 16 * 2 * 70);
  EXPECT_EQ(rows[2].page_bytes, 0);
  layers[2].shares_pages = 2;
  EXPECT_REFUSED(api().plan_pages(&request, rows, &count, &summary, &error),
                 "request.layers[2].shares_pages is 2; it must be 0 or 1");
  layers[2].shares_pages = 0;
  layers[2].kv_sharing_target = 1;
  EXPECT_REFUSED(api().plan_pages(&request, rows, &count, &summary, &error), "without shares_pages it must be 0");
  layers[2].shares_pages = 1;
  layers[2].kv_sharing_target = -1;
  EXPECT_REFUSED(api().plan_pages(&request, rows, &count, &summary, &error),
                 "request.layers[2].kv_sharing_target is -1; with shares_pages it must be the index of a layer");

  TqSkipRequest skips = {};
  skips.struct_size = sizeof(skips);
  skips.num_layers = 5;
  skips.boundary_layers = 1;
  int32_t skipped[5] = {};
  int64_t number = 5;
  ASSERT_EQ(api().align_skip_layers(&skips, skipped, &number, nullptr), TQ_OK);
  EXPECT_EQ(number, 2);
  EXPECT_EQ(skipped[1], 4);
}

TEST_F(Structs, ListsWriteNothingIntoARowThatIsNotSet) {
  TqFormatInfo formats[16];
  std::memset(formats, 0x5a, sizeof(formats));
  int64_t number = 16;
  EXPECT_REFUSED(api().list_formats(formats, &number, &error), "out[0].struct_size is 1515870810");
  formats[0].struct_size = sizeof(TqFormatInfo);
  EXPECT_REFUSED(api().list_formats(formats, &number, &error), "out[1].struct_size is 1515870810");
  EXPECT_EQ(formats[0].format_id, 0x5a5a5a5au);
  EXPECT_EQ(number, 16);
  TqLibraryInfo libraries[3];
  std::memset(libraries, 0x5a, sizeof(libraries));
  libraries[0].struct_size = sizeof(TqLibraryInfo);
  number = 3;
  EXPECT_REFUSED(api().list_libraries(nullptr, libraries, &number, &error), "out[1].struct_size is");
  EXPECT_EQ(libraries[0].device_kind, 0x5a5a5a5a);
}

TEST_F(Structs, Codebooks) {
  TqCodebookArgs args = {};
  args.struct_size = sizeof(args);
  args.format_id = TQ_FORMAT_TURBOQUANT_3BIT_NC;
  args.side = TQ_SIDE_KEY;
  args.head_dim = 96;
  TqCodebook book = {};
  book.struct_size = sizeof(book);
  float levels[9], midpoints[9];
  std::fill(levels, levels + 9, -7.0f);
  std::fill(midpoints, midpoints + 9, -7.0f);
  ASSERT_EQ(api().codebook(&args, &book, levels, midpoints, 9, nullptr), TQ_OK);
  EXPECT_EQ(book.num_groups, 1);
  EXPECT_EQ(book.first_dim, 0);
  EXPECT_EQ(book.num_dims, 96);
  EXPECT_EQ(book.bits, 3);
  ASSERT_EQ(book.num_levels, 8);
  EXPECT_EQ(levels[8], -7.0f);
  EXPECT_EQ(midpoints[7], -7.0f);
  for (int i = 0; i < 7; ++i) {
    EXPECT_LT(levels[i], levels[i + 1]);
    EXPECT_NEAR(midpoints[i], (levels[i] + levels[i + 1]) / 2, 1e-6);
  }
  // The rows of a decoded key are these levels: all of one key's ratios occur among the levels' ratios.
  std::vector<float> x(96), y(96);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i * i));
  TqRotateArgs rotate = {};
  rotate.struct_size = sizeof(rotate);
  rotate.num_heads = 1;
  rotate.side = TQ_SIDE_KEY;
  layer.format_id = args.format_id;
  layer.head_dim = 96;
  rotate.layer = &layer;
  rotate.num_tokens = 1;
  rotate.x = y.data();
  rotate.out = y.data();
  rotate.x_token_stride = rotate.x_head_stride = rotate.out_token_stride = rotate.out_head_stride = 96;
  ASSERT_EQ(fake_quantize(args.format_id, TQ_SIDE_KEY, 96, 1, x.data(), y.data()), TQ_OK);
  ASSERT_EQ(api().rotate(backend, &rotate, nullptr), TQ_OK);
  const float largest =
      *std::max_element(y.begin(), y.end(), [](float a, float b) { return std::abs(a) < std::abs(b); });
  for (const float element : y) {
    float nearest = 1;
    for (int i = 0; i < 8; ++i) {
      for (const float top : {levels[0], levels[7], levels[1], levels[6]}) {
        nearest = std::min(nearest, std::abs(element / largest - levels[i] / top));
      }
    }
    EXPECT_LT(nearest, 1e-4) << element;
  }

  EXPECT_REFUSED(api().codebook(&args, &book, levels, nullptr, 7, &error), "capacity is 7");
  args.group = 1;
  EXPECT_REFUSED(api().codebook(&args, &book, nullptr, nullptr, 0, &error), "has one group of dimensions, 0");
  args.group = 0;
  args.side = TQ_SIDE_QUERY;
  EXPECT_REFUSED(api().codebook(&args, &book, nullptr, nullptr, 0, &error), "args.side is 1");
  args.side = TQ_SIDE_VALUE;
  TqError error = make_error();
  EXPECT_EQ(api().codebook(&args, &book, nullptr, nullptr, 0, &error), TQ_NOT_FOUND);
  EXPECT_NE(std::string(error.message).find("has no codebook of values"), std::string::npos) << error.message;

  // Another side, another number of levels, and a side without any: no row of the presets has these.
  args.format_id = TQ_FORMAT_TQ_K5V4;
  EXPECT_EQ(api().codebook(&args, &book, nullptr, nullptr, 0, &error), TQ_OK);
  EXPECT_EQ(book.num_levels, 16);
  args.side = TQ_SIDE_KEY;
  std::vector<float> more(32);
  EXPECT_EQ(api().codebook(&args, &book, more.data(), nullptr, 32, &error), TQ_OK);
  EXPECT_EQ(book.num_levels, 32);
  EXPECT_TRUE(std::is_sorted(more.begin(), more.end()) && more.front() == -more.back() && more.back() > 3);
  args.format_id = TQ_FORMAT_TQ_8;
  EXPECT_EQ(api().codebook(&args, &book, nullptr, nullptr, 0, &error), TQ_NOT_FOUND);
  EXPECT_NE(std::string(error.message).find("tq_8 has no codebook of keys"), std::string::npos) << error.message;
}

}  // namespace
}  // namespace tq::testing
