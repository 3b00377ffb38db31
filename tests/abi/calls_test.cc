// calls_test.cc - what valid calls do at their edges: padding, empty batches, callers of other ages, threads.
#include <atomic>
#include <thread>

#include "abi_fixture.h"

namespace tq::testing {
namespace {

using Calls = AbiTest;

TEST_F(Calls, StoreThenAttend) {
  TqError error = make_error();
  ASSERT_EQ(api().store_kv(backend, &store, &error), TQ_OK) << error.message;
  ASSERT_EQ(api().attend(backend, &attend, &error), TQ_OK) << error.message;
  for (const float x : out) ASSERT_TRUE(std::isfinite(x) && x != -7.0f);
}

TEST_F(Calls, RowsBeyondTheLastSequenceAreLeftAlone) {
  starts[2] = 2;
  ASSERT_EQ(api().store_kv(backend, &store, nullptr), TQ_OK);
  ASSERT_EQ(api().attend(backend, &attend, nullptr), TQ_OK);
  for (size_t i = 2 * kHeads * kDim; i < out.size(); ++i) ASSERT_EQ(out[i], -7.0f);
}

TEST_F(Calls, EmptyBatchesDoNothing) {
  attend.num_seqs = 0;
  attend.num_tokens = 0;
  attend.query = nullptr;
  attend.out = nullptr;
  EXPECT_EQ(api().attend(backend, &attend, nullptr), TQ_OK);
  store.num_tokens = 0;
  store.key = nullptr;
  EXPECT_EQ(api().store_kv(backend, &store, nullptr), TQ_OK);
}

TEST_F(Calls, EmptySequencesAreSkipped) {
  lens[0] = 0;
  starts[1] = 0;
  std::vector<float> lse(3 * kHeads, 5.0f);
  attend.lse = lse.data();
  ASSERT_EQ(api().store_kv(backend, &store, nullptr), TQ_OK);
  ASSERT_EQ(api().attend(backend, &attend, nullptr), TQ_OK);
  for (const float x : lse) EXPECT_TRUE(std::isfinite(x) && x != 5.0f);
}

// A newer caller: its structs are larger than ours, with fields that we do not know. It does not use them.
TEST_F(Calls, NewerCaller) {
  struct NewerLayer {
    TqLayerDesc base;
    int64_t from_the_future[4];
  } newer = {layer, {}};
  newer.base.struct_size = sizeof(newer);
  attend.layer = &newer.base;
  store.layer = &newer.base;
  TqError error = make_error();
  EXPECT_EQ(api().store_kv(backend, &store, &error), TQ_OK) << error.message;
  EXPECT_EQ(api().attend(backend, &attend, &error), TQ_OK) << error.message;
  struct {
    TqKvCacheSpec base;
    int64_t extra;
  } spec = {{}, 42};
  spec.base.struct_size = sizeof(spec);
  ASSERT_EQ(api().kv_cache_spec(&newer.base, &spec.base, &error), TQ_OK) << error.message;
  EXPECT_EQ(spec.base.struct_size, sizeof(spec));
  EXPECT_EQ(spec.base.slot_bytes, 70);
  EXPECT_EQ(spec.extra, 42);
  newer.from_the_future[3] = int64_t{1} << 56;
  EXPECT_EQ(api().store_kv(backend, &store, &error), TQ_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("layer has something at byte 71"), std::string::npos) << error.message;
}

TEST_F(Calls, SkipLayersAreAlignedAndCounted) {
  const int32_t targets[] = {-1, -1, -1, 1, 2};
  const int32_t skip[] = {3};
  TqSkipRequest request = {};
  request.struct_size = sizeof(request);
  request.kv_sharing_targets = targets;
  request.num_layers = 5;
  request.skip_layers = skip;
  request.num_skip_layers = 1;
  TqError error = make_error();
  int64_t count = 0;
  ASSERT_EQ(api().align_skip_layers(&request, nullptr, &count, &error), TQ_OK) << error.message;
  EXPECT_EQ(count, 2);
  int32_t layers[] = {-7, -7, -7};
  ASSERT_EQ(api().align_skip_layers(&request, layers, &count, &error), TQ_OK) << error.message;
  EXPECT_EQ(layers[0], 1);
  EXPECT_EQ(layers[1], 3);
  EXPECT_EQ(layers[2], -7);
  count = 1;
  layers[0] = -7;
  EXPECT_EQ(api().align_skip_layers(&request, layers, &count, &error), TQ_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("*count is 1"), std::string::npos) << error.message;
  EXPECT_EQ(layers[0], -7);
  request.skip_layers = nullptr;
  EXPECT_EQ(api().align_skip_layers(&request, layers, &count, &error), TQ_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("num_skip_layers is 1"), std::string::npos) << error.message;
}

TEST_F(Calls, PlannerTakesNativeLayersAndStates) {
  TqPlanLayer layers[3] = {};
  for (TqPlanLayer& l : layers) {
    l.struct_size = sizeof(l);
    l.num_kv_heads = 2;
    l.head_dim = 64;
  }
  layers[0].format_id = TQ_FORMAT_TURBOQUANT_4BIT_NC;
  layers[0].native_bytes = 2;  // ignored
  layers[1].native_bytes = 2;
  layers[2].state_bytes = 4000;
  layers[2].format_id = 77;  // ignored
  TqPlanRequest request = {};
  request.struct_size = sizeof(request);
  request.block_size = 16;
  request.layers = layers;
  request.num_layers = 2;
  request.memory_bytes = 1 << 20;
  TqPlanSummary summary = {};
  summary.struct_size = sizeof(summary);
  TqError error = make_error();
  int64_t count = 0;
  ASSERT_EQ(api().plan_pages(&request, nullptr, &count, &summary, &error), TQ_OK) << error.message;
  EXPECT_EQ(summary.strategy, TQ_PLAN_UNIFORM);
  EXPECT_EQ(summary.bytes_per_block, 16 * 2 * (70 + 256));

  request.num_layers = 3;
  EXPECT_EQ(api().plan_pages(&request, nullptr, &count, &summary, &error), TQ_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("max_model_len"), std::string::npos) << error.message;
  request.max_model_len = 1000;
  ASSERT_EQ(api().plan_pages(&request, nullptr, &count, &summary, &error), TQ_OK) << error.message;
  EXPECT_EQ(count, 3);
  EXPECT_EQ(summary.strategy, TQ_PLAN_PADDED_PAGES);
  layers[2].state_bytes = 0;
  EXPECT_EQ(api().plan_pages(&request, nullptr, &count, &summary, &error), TQ_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("request.layers[2]: "), std::string::npos) << error.message;
}

TEST_F(Calls, PlannerWalksAnArrayOfLargerStructs) {
  struct Newer {
    TqPlanLayer base;
    int64_t extra;
  } layers[3] = {};
  for (Newer& l : layers) {
    l.base.struct_size = sizeof(Newer);
    l.base.format_id = layer.format_id;
    l.base.num_kv_heads = 2;
    l.base.head_dim = 64;
  }
  TqPlanRequest request = {};
  request.struct_size = sizeof(request);
  request.block_size = 16;
  request.layers = &layers[0].base;
  request.num_layers = 3;
  request.memory_bytes = 1 << 20;
  TqPagePlan plan[3] = {};
  for (TqPagePlan& p : plan) p.struct_size = sizeof(p);
  int64_t count = 3;
  TqPlanSummary summary = {};
  summary.struct_size = sizeof(summary);
  TqError error = make_error();
  ASSERT_EQ(api().plan_pages(&request, plan, &count, &summary, &error), TQ_OK) << error.message;
  EXPECT_EQ(summary.bytes_per_block, 3 * 16 * 2 * 70);
  EXPECT_EQ(plan[2].page_bytes, 16 * 2 * 70);
  layers[1].base.shares_pages = 1;
  layers[1].base.kv_sharing_target = 9;
  EXPECT_EQ(api().plan_pages(&request, plan, &count, &summary, &error), TQ_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("layers[1].kv_sharing_target is 9"), std::string::npos);
}

TEST_F(Calls, ManyThreadsOneBackend) {
  ASSERT_EQ(api().store_kv(backend, &store, nullptr), TQ_OK);
  ASSERT_EQ(api().attend(backend, &attend, nullptr), TQ_OK);
  const std::vector<float> want = out;
  std::atomic<int> bad{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      std::vector<float> mine(want.size());
      std::vector<uint8_t> work(attend.workspace_bytes + 64);
      TqAttendArgs args = attend;
      args.out = mine.data();
      args.workspace = aligned(work);
      for (int j = 0; j < 20; ++j) {
        if (api().attend(backend, &args, nullptr) != TQ_OK || mine != want) ++bad;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(bad.load(), 0);
  TqCounters counters = {};
  counters.struct_size = sizeof(counters);
  ASSERT_EQ(api().query_counters(backend, &counters, nullptr), TQ_OK);
  EXPECT_EQ(counters.attend_calls, 161u);
  EXPECT_EQ(counters.query_tokens, 161u * 3);
  EXPECT_EQ(counters.compressed_kv_reads, 161u * (40 + 6 + 7));
}

TEST_F(Calls, DequantMatchesFakeQuantize) {
  ASSERT_EQ(api().store_kv(backend, &store, nullptr), TQ_OK);
  std::vector<float> k(kTokens * kKvHeads * kDim), v(k.size()), want(k.size());
  TqDequantKvArgs args = {};
  args.struct_size = sizeof(args);
  args.layer = &layer;
  args.pages = &pages;
  const int32_t first[] = {0}, rows[] = {0, kTokens};
  args.num_seqs = 1;
  args.max_blocks_per_seq = 2;
  args.block_table = table;
  args.block_table_stride = 2;
  args.first_tokens = first;
  args.token_start_loc = rows;
  args.num_tokens = kTokens;
  args.key_out = k.data();
  args.value_out = v.data();
  ASSERT_EQ(api().dequant_kv(backend, &args, nullptr), TQ_OK);
  ASSERT_EQ(fake_quantize(layer.format_id, TQ_SIDE_KEY, kDim, kTokens * kKvHeads, key.data(), want.data()), TQ_OK);
  for (size_t i = 0; i < k.size(); ++i) ASSERT_NEAR(k[i], want[i], 1e-5);
  ASSERT_EQ(fake_quantize(layer.format_id, TQ_SIDE_VALUE, kDim, kTokens * kKvHeads, value.data(), want.data()), TQ_OK);
  for (size_t i = 0; i < v.size(); ++i) ASSERT_NEAR(v[i], want[i], 1e-5);

  // Rotated keys are what rotate makes of them; of a format without rotation, both leave keys as they are.
  std::vector<float> kept(k.size()), rotated(k.size());
  args.keep_rotated = 1;
  args.key_out = kept.data();
  ASSERT_EQ(api().dequant_kv(backend, &args, nullptr), TQ_OK);
  TqRotateArgs turn = {};
  turn.struct_size = sizeof(turn);
  turn.num_heads = kKvHeads;
  turn.side = TQ_SIDE_KEY;
  turn.layer = &layer;
  turn.num_tokens = kTokens;
  turn.x = k.data();
  turn.x_token_stride = turn.out_token_stride = kKvHeads * kDim;
  turn.x_head_stride = turn.out_head_stride = kDim;
  turn.out = rotated.data();
  ASSERT_EQ(api().rotate(backend, &turn, nullptr), TQ_OK);
  for (size_t i = 0; i < k.size(); ++i) ASSERT_NEAR(rotated[i], kept[i], 1e-5);
  layer.format_id = TQ_FORMAT_TURBOQUANT_K8V4;
  ASSERT_EQ(api().rotate(backend, &turn, nullptr), TQ_OK);
  EXPECT_EQ(rotated, k);
}

}  // namespace
}  // namespace tq::testing
