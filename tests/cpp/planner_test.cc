// planner_test.cc - plans of models whose layers are alike and not alike. That group counts and KV tokens are an
// engine's is tests/python/test_plan_engine.py's.
#include "planner/planner.h"

#include <gtest/gtest.h>

#include <numeric>

namespace tq {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;
using Layers = std::vector<LayerSpec>;

LayerSpec packed(const char* name, int kv_heads = 8, int dim = 128, int window = 0, int target = -1) {
  return {find_format(std::string_view(name)), 0, kv_heads, dim, dim, window, 0, target};
}

LayerSpec native(int kv_heads = 8, int dim = 128, int window = 0, int target = -1) {
  return {nullptr, 2, kv_heads, dim, dim, window, 0, target};
}

LayerSpec state(int64_t bytes) { return {nullptr, 0, 0, 0, 0, 0, bytes, -1}; }

PlanRequest request(int block_size = 16, int64_t memory = 24 * kGiB, int64_t max_model_len = 131072) {
  return {block_size, 0, memory, max_model_len, 8192, 1, false};
}

Plan planned(const Layers& layers, const PlanRequest& r) {
  Plan plan;
  EXPECT_EQ(plan_pages(layers, r, &plan), "");
  return plan;
}

double sequence_bytes(const Plan& plan) {
  return static_cast<double>(plan.bytes_per_block) * static_cast<double>(plan.blocks_per_sequence);
}

Layers repeated(const Layers& pattern, int times) {
  Layers out;
  for (int i = 0; i < times; ++i) out.insert(out.end(), pattern.begin(), pattern.end());
  return out;
}

TEST(Planner, CountsTokens) {
  const Plan plan = planned(Layers(32, packed("turboquant_4bit_nc")), request(16, 24 * kGiB, 0));
  EXPECT_EQ(plan.strategy, Strategy::kUniform);
  EXPECT_EQ(plan.layers[0].page_bytes, 16 * 8 * 134);
  EXPECT_EQ(plan.bytes_per_block, 32 * 16 * 8 * 134);
  EXPECT_EQ(plan.num_blocks, 24 * kGiB / (32 * 16 * 8 * 134));
  EXPECT_EQ(plan.kv_tokens, plan.num_blocks * 16);
  EXPECT_EQ(plan.longest_sequence, (plan.num_blocks - 1) * 16);
  EXPECT_EQ(plan.num_groups, 1);
}

TEST(Planner, LayersThatSharePagesCostNothing) {
  Layers layers(4, packed("turboquant_k8v4"));
  layers[3].kv_sharing_target = 1;
  const Plan plan = planned(layers, request(32));
  EXPECT_EQ(plan.layers[3].page_bytes, 0);
  EXPECT_EQ(plan.layers[3].group, plan.layers[1].group);
  EXPECT_EQ(plan.layers[3].block_size, 32);
  EXPECT_EQ(plan.bytes_per_block, 3 * 32 * 8 * 196);
}

// Native first and last layers of a dense model: one group, no padding, whatever the page sizes are.
TEST(Planner, FullAttentionOfSeveralFormatsIsUniform) {
  Layers layers(32, packed("turboquant_3bit_nc"));
  layers[0] = layers[31] = native();
  layers[5] = packed("turboquant_k8v4", 8, 256);
  const Plan plan = planned(layers, request());
  EXPECT_EQ(plan.strategy, Strategy::kUniform);
  EXPECT_EQ(plan.bytes_per_block, 16 * 8 * (2 * 512 + 388 + 29 * 102));
  EXPECT_EQ(plan.waste_bytes, 0);
  EXPECT_EQ(plan.blocks_per_sequence, 131072 / 16);
}

TEST(Planner, HeadDimOfValuesMayDiffer) {
  LayerSpec wide = packed("turboquant_4bit_nc", 4, 192);
  wide.head_dim_v = 128;
  EXPECT_EQ(slot_bytes(wide), 192 / 2 + 2 + 128 / 2 + 4);
  EXPECT_EQ(planned({wide}, request()).layers[0].page_bytes, 16 * 4 * slot_bytes(wide));
  LayerSpec wide_native = native(4, 192);
  wide_native.head_dim_v = 128;
  EXPECT_EQ(bytes_per_token(wide_native), 4 * (192 + 128) * 2);
}

// Windows of one geometry: pages are equal as they are.
TEST(Planner, OneGeometryNeedsNoSearch) {
  const Layers layers = repeated({native(8, 128, 512), native(8, 128, 512), native()}, 6);
  const Plan plan = planned(layers, request());
  EXPECT_EQ(plan.strategy, Strategy::kEqualPages);
  EXPECT_EQ(plan.num_groups, 3);
  EXPECT_EQ(plan.bytes_per_block, 6 * 16 * 4096);
  EXPECT_EQ(plan.blocks_per_sequence, 131072 / 16 + 2 * ((511 + 8192 + 15) / 16 + 1));
  EXPECT_EQ(plan.waste_bytes, 0);
}

// One native layer in a compressed model. With one block size for all, each page would be padded to its page, 2048
// bytes per token against 524 and 1036; a page of many compressed tokens holds a few native ones instead.
TEST(Planner, CompressedPagesAreNotPaddedUpToNativeOnes) {
  Layers layers = repeated({packed("turboquant_4bit_nc", 2, 256, 512), packed("turboquant_4bit_nc", 2, 256, 512),
                            packed("turboquant_4bit_nc", 2, 512)},
                           8);
  layers[0].format = nullptr;
  layers[0].native_bytes = 2;
  const Plan plan = planned(layers, request());
  EXPECT_EQ(plan.strategy, Strategy::kPaddedPages);
  for (size_t i = 2; i < layers.size(); i += 3) {
    EXPECT_LT(static_cast<double>(plan.layers[i].padding_bytes), 0.05 * static_cast<double>(plan.bytes_per_block));
  }
  EXPECT_LT(static_cast<double>(plan.waste_bytes), 0.05 * sequence_bytes(plan));
}

// The planner's search against every pair of block sizes that keeps the rule, written the long way.
TEST(Planner, NoEqualPagePlanIsCheaper) {
  for (const auto& [a, b] :
       std::vector<std::pair<LayerSpec, LayerSpec>>{{native(8, 128, 1024), packed("turboquant_4bit_nc")},
                                                    {native(16, 256, 1024), packed("turboquant_3bit_nc", 4, 512)},
                                                    {packed("turboquant_k3v4_nc", 8, 64, 128), native(8, 64)}}) {
    PlanRequest r = request(32);
    r.max_block_size = 512;
    const Plan plan = planned({a, b}, r);
    double best = 1e300;
    for (int i = 32; i <= 512; i += 32) {
      for (int j = 32; j <= 512; j += 32) {
        if (std::lcm(i, j) > 512) continue;
        const double page = static_cast<double>(std::max(bytes_per_token(a) * i, bytes_per_token(b) * j));
        const int64_t blocks_a = a.sliding_window > 0 ? (a.sliding_window - 1 + 8192 + i - 1) / i + 1 : 131072 / i;
        const int64_t blocks_b =
            b.sliding_window > 0 ? (b.sliding_window - 1 + 8192 + j - 1) / j + 1 : (131072 + j - 1) / j;
        best = std::min(best, page * static_cast<double>(blocks_a + blocks_b));
      }
    }
    EXPECT_EQ(sequence_bytes(plan), best);
    EXPECT_LE(std::lcm(plan.layers[0].block_size, plan.layers[1].block_size), 512);
  }
}

// Qwen3-Next 80B-A3B on one device: 36 GDN states and 12 attention layers of 2 KV heads and head_dim 256.
TEST(Planner, StatesAndAttention) {
  const int64_t bytes = 32 * 128 * 128 * 2 + 8192 * 3 * 2;
  const Layers layers = repeated({state(bytes), state(bytes), state(bytes), packed("turboquant_4bit_nc", 2, 256)}, 12);
  PlanRequest r = request();
  const Plan equal = planned(layers, r);
  EXPECT_EQ(equal.layers[3].block_size, 2096);  // 524 bytes per token: the first page that holds a state
  EXPECT_EQ(equal.layers[0].page_bytes, equal.layers[3].page_bytes);
  EXPECT_EQ(equal.layers[0].padding_bytes, 2096 * 524 - bytes);
  EXPECT_EQ(equal.num_groups, 4);
  EXPECT_EQ(equal.blocks_per_sequence, (131072 + 2095) / 2096 + 3);

  // Side by side, a block of 12 small attention pages takes a state at a time.
  r.side_by_side = true;
  const Plan side = planned(layers, r);
  EXPECT_EQ(side.strategy, Strategy::kSideBySide);
  EXPECT_LT(side.layers[3].block_size, 512);
  EXPECT_EQ(side.layers[0].padding_bytes, 0);
  EXPECT_LE(sequence_bytes(side), sequence_bytes(equal));
  r.blocks_per_state = 2;
  EXPECT_GT(planned(layers, r).blocks_per_sequence, side.blocks_per_sequence);
}

TEST(Planner, OnlyStates) {
  const Plan plan = planned(Layers(4, state(1000)), request(16, 1 << 20));
  EXPECT_EQ(plan.bytes_per_block, 4000);
  EXPECT_EQ(plan.blocks_per_sequence, 1);
  EXPECT_EQ(plan.longest_sequence, 131072);
}

TEST(Planner, NoPlanSaysWhichLayersAndWhatToSet) {
  Plan plan;
  PlanRequest r = request();
  r.max_block_size = 64;
  const Layers layers = {state(1 << 20), packed("turboquant_4bit_nc"), state(1 << 20)};
  const std::string sentence = plan_pages(layers, r, &plan);
  EXPECT_NE(sentence.find("layers 0, 2 hold a state of up to 1048576 bytes"), std::string::npos) << sentence;
  EXPECT_NE(sentence.find("max_block_size 64; allow 992 tokens"), std::string::npos) << sentence;
  r.max_block_size = 0;
  EXPECT_EQ(plan_pages(layers, r, &plan), "");
}

// States of two sizes and no layer whose page could hold either: this divided by zero.
TEST(Planner, StatesAloneMustBeOfOneSize) {
  const Layers layers = {state(1000), state(2000)};
  PlanRequest r = request();
  Plan plan;
  for (const bool side_by_side : {false, true}) {
    r.side_by_side = side_by_side;
    const std::string sentence = plan_pages(layers, r, &plan);
    if (side_by_side) {
      EXPECT_EQ(sentence, "");  // 2000 is a multiple of the alignment
      EXPECT_EQ(plan.bytes_per_block, 2000);
    } else {
      EXPECT_NE(sentence.find("layers 0, 1 hold states of different sizes, up to 2000 bytes"), std::string::npos)
          << sentence;
    }
  }
  EXPECT_NE(plan_pages(Layers{state(1001), state(2001)}, r, &plan), "");
}

// No page of the widest layer holds the state, whatever is allowed.
TEST(Planner, AStateLargerThanAnyPage) {
  PlanRequest r = request(48);
  r.max_block_size = 100;
  Plan plan;
  const std::string bound = plan_pages(Layers{state(134 * 97), packed("turboquant_4bit_nc", 1)}, r, &plan);
  EXPECT_NE(bound.find("has 12864 bytes at max_block_size 100; allow 144 tokens"), std::string::npos) << bound;
  r.max_block_size = 0;
  const std::string sentence = plan_pages(Layers{state(int64_t{1} << 40), packed("turboquant_4bit_nc")}, r, &plan);
  EXPECT_NE(sentence.find("no page has more than 65536 tokens"), std::string::npos) << sentence;
}

// 2^36 sequences of 2^40 tokens would fit; the number of tokens does not fit in 63 bits.
TEST(Planner, MoreTokensThanANumberHolds) {
  PlanRequest r = request(16, 1024 * kGiB, int64_t{1} << 40);
  r.max_in_flight_tokens = 0;
  Plan plan = {};
  plan.kv_tokens = 7;
  const std::string sentence = plan_pages(Layers{native(1, 1, 1)}, r, &plan);
  EXPECT_NE(sentence.find("memory_bytes is 1099511627776 and max_model_len 1099511627776; for these layers they must "
                          "give less than 2^63 KV tokens"),
            std::string::npos)
      << sentence;
  EXPECT_EQ(plan.kv_tokens, 7) << "nothing is written with a sentence";
  r.max_model_len = 1 << 20;
  EXPECT_EQ(plan_pages(Layers{native(1, 1, 1)}, r, &plan), "");
}

// A sequence fits if its blocks and the one that the engine keeps back do.
TEST(Planner, LongestSequence) {
  const Layers layers = {native(8, 128, 512), native()};
  PlanRequest r = request();
  const Plan all = planned(layers, r);
  r.memory_bytes = all.bytes_per_block * (all.blocks_per_sequence + 1);
  EXPECT_EQ(planned(layers, r).longest_sequence, 131072);
  EXPECT_EQ(planned(layers, r).kv_tokens,
            static_cast<int64_t>(131072 * (1 + 1.0 / static_cast<double>(all.blocks_per_sequence))));
  r.memory_bytes -= 1;
  EXPECT_EQ(planned(layers, r).longest_sequence, 131072 - 16);
  r.memory_bytes = 0;
  EXPECT_EQ(planned(layers, r).longest_sequence, 0);
  EXPECT_EQ(planned(layers, r).kv_tokens, 0);
}

// Gemma 4 E4B: 24 layers own pages, every sixth with head_dim 512. Bytes per token against bf16.
TEST(Planner, Gemma4E4BRatios) {
  const struct {
    const char* format;
    double at_least;
  } rows[] = {{"turboquant_k8v4", 2.04},
              {"turboquant_4bit_nc", 2.57},
              {"turboquant_k3v4_nc", 2.75},
              {"turboquant_3bit_nc", 2.96}};
  for (const auto& row : rows) {
    int64_t ours = 0, bf16 = 0;
    for (int i = 0; i < 24; ++i) {
      const int dim = i % 6 == 5 ? 512 : 256;
      const bool skipped = i < 2 || i > 21;
      ours += bytes_per_token(skipped ? native(2, dim) : packed(row.format, 2, dim));
      bf16 += bytes_per_token(native(2, dim));
    }
    EXPECT_GE(static_cast<double>(bf16) / static_cast<double>(ours), row.at_least) << row.format;
    EXPECT_LT(static_cast<double>(bf16) / static_cast<double>(ours), row.at_least + 0.01) << row.format;
  }
}

TEST(Planner, SaysWhatIsWrong) {
  const auto sentence = [](const Layers& layers, PlanRequest r) {
    Plan plan;
    return plan_pages(layers, r, &plan);
  };
  const auto expect = [&](const std::string& words, const Layers& layers, const PlanRequest& r) {
    EXPECT_NE(sentence(layers, r).find(words), std::string::npos) << words << ": " << sentence(layers, r);
  };
  const Layers one = {packed("turboquant_k8v4")};
  expect("layers is empty", {}, request());
  expect("block_size is 24", one, request(24));
  expect("memory_bytes is -5", one, request(16, -5));
  expect("max_model_len is -1", one, request(16, 1, -1));
  expect("layers[1] has a window or a state", {native(), native(8, 128, 512)}, request(16, 1, 0));
  PlanRequest r = request(64);
  r.max_block_size = 32;
  expect("max_block_size is 32; it must be from 64 to 65536, or 0", one, r);
  r = request();
  r.blocks_per_state = 0;
  expect("blocks_per_state is 0", one, r);
  expect("layers[0].head_dim is 24; a compressed layer needs a multiple of 16", {packed("turboquant_k8v4", 8, 24)},
         request());
  expect("layers[0].head_dim is 528", {packed("turboquant_k8v4", 8, 528)}, request());
  expect("layers[0].num_kv_heads is 0", {native(0)}, request());
  expect("layers[0].sliding_window is -4", {native(8, 128, -4)}, request());
  expect("layers[0].state_bytes is -1", {state(-1)}, request());
  LayerSpec wrong = native();
  wrong.native_bytes = 0;
  expect("layers[0].native_bytes is 0", {wrong}, request());

  Layers layers(3, packed("turboquant_k8v4"));
  layers[1].kv_sharing_target = 7;
  expect("layers[1].kv_sharing_target is 7", layers, request());
  layers[1].kv_sharing_target = 2;
  layers[2].kv_sharing_target = 1;
  expect("shares pages itself", layers, request());
  layers[2] = packed("turboquant_k8v4", 8, 64);
  expect("differ", layers, request());
}

}  // namespace
}  // namespace tq
