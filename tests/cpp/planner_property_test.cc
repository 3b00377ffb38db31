// planner_property_test.cc - plans of random layers and requests, the largest numbers of each argument included,
// against arithmetic of its own in 128 bits. Each answer is a plan whose every number is right, or a sentence.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "planner/planner.h"

namespace tq {
namespace {

using Wide = __int128;

struct Random {
  std::mt19937_64 engine;

  int64_t from(std::initializer_list<int64_t> list) {
    return *(list.begin() + std::uniform_int_distribution<size_t>(0, list.size() - 1)(engine));
  }
  int64_t up_to(int64_t most) { return std::uniform_int_distribution<int64_t>(0, most)(engine); }
  // All magnitudes alike.
  int64_t spread(int64_t least, int64_t most) {
    const double low = std::log2(static_cast<double>(least)), high = std::log2(static_cast<double>(most));
    const double x = std::exp2(std::uniform_real_distribution<double>(low, high)(engine));
    return std::clamp(x >= 0x1p63 ? INT64_MAX : static_cast<int64_t>(x), least, most);
  }
};

LayerSpec random_layer(Random& random) {
  const int window = static_cast<int>(random.from({0, 0, 0, 1, 1, 16, 1024, 4095, INT32_MAX, random.up_to(100000)}));
  switch (random.up_to(5)) {
    case 0:
      return {nullptr, 0, 0, 0, 0, 0, random.from({1, 16, 1000, 1 << 20, int64_t{1} << 40, random.spread(1, 1 << 24)}),
              -1};
    case 1:
    case 2: {
      const int heads = static_cast<int>(random.from({1, 2, 8, 65536}));
      const int dim = static_cast<int>(random.from({1, 64, 128, 512, 65536}));
      const int bytes = static_cast<int>(random.from({1, 2, 8}));
      return {nullptr, bytes, heads, dim, static_cast<int>(random.from({dim, 64})), window, 0, -1};
    }
    default: {
      const Format& format = all_formats()[static_cast<size_t>(random.up_to(4))];
      const int dim = 16 * static_cast<int>(random.from({1, 4, 8, 16, 32}));
      const int heads = static_cast<int>(random.from({1, 2, 8, 65536}));
      return {&format, 0, heads, dim, static_cast<int>(random.from({dim, 64})), window, 0, -1};
    }
  }
}

PlanRequest random_request(Random& random) {
  PlanRequest r = {};
  r.block_size = 16 * static_cast<int>(random.from({1, 1, 1, 2, 3, 4, 16, 4096}));
  r.max_block_size = random.up_to(3) == 0 ? 0 : r.block_size * static_cast<int>(random.from({1, 2, 7, 16}));
  if (r.max_block_size > 65536) r.max_block_size = 65536;
  r.memory_bytes =
      random.from({0, 1, 1 << 30, int64_t{1} << 40, INT64_MAX, INT64_MAX - 1, random.spread(1, INT64_MAX)});
  r.max_model_len = random.from({0, 1, 8192, int64_t{1} << 40, random.spread(1, int64_t{1} << 40)});
  r.max_in_flight_tokens = random.from({0, 1, 8192, int64_t{1} << 40});
  r.blocks_per_state = static_cast<int>(random.from({1, 1, 2, 1024}));
  r.side_by_side = random.up_to(1) == 1;
  return r;
}

// Bytes of one token, written out: bits of keys and values, and two bytes of each norm, scale and zero.
Wide token_bytes(const LayerSpec& l) {
  if (l.format == nullptr) return Wide{l.num_kv_heads} * (Wide{l.head_dim} + l.head_dim_v) * l.native_bytes;
  struct Bytes {
    int key_bits, value_bits, more;
  };
  static const std::map<std::string, Bytes> of = {
      {"turboquant_k8v4", {8, 4, 4}},
      {"turboquant_4bit_nc", {4, 4, 6}},
      {"turboquant_k3v4_nc", {3, 4, 6}},
      {"turboquant_3bit_nc", {3, 3, 6}},
      {"tq_8", {8, 4, 4}},
      {"tq_k5v4", {5, 4, 4}},
      {"tq_4", {4, 4, 4}},
      {"raw_f32", {32, 32, 0}},
  };
  const Bytes& b = of.at(l.format->name);
  return l.num_kv_heads * ((Wide{b.key_bits} * l.head_dim + Wide{b.value_bits} * l.head_dim_v) / 8 + b.more);
}

Wide content(const LayerSpec& l, int block_size) {
  return l.state_bytes > 0 ? Wide{l.state_bytes} : token_bytes(l) * block_size;
}

Wide blocks(const LayerSpec& l, int block_size, Wide tokens, const PlanRequest& r) {
  if (l.state_bytes > 0) return r.blocks_per_state;
  const auto pages = [block_size](Wide n) { return (n + block_size - 1) / block_size; };
  if (l.sliding_window == 0) return pages(tokens);
  return pages(std::min(Wide{l.sliding_window} - 1 + r.max_in_flight_tokens, tokens)) + 1;
}

std::string decimal(Wide x) {
  std::string out;
  for (; x > 0; x /= 10) out.insert(out.begin(), static_cast<char>('0' + static_cast<int>(x % 10)));
  return out.empty() ? "0" : out;
}

// The plan's own numbers, computed again from its groups and block sizes.
struct Totals {
  Wide bytes_per_block = 0, blocks_per_sequence = 0, waste = 0;
};

Totals totals_of(const std::vector<LayerSpec>& layers, const PlanRequest& r, const Plan& plan, Wide tokens) {
  std::map<int, std::vector<size_t>> groups;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].kv_sharing_target == -1) groups[plan.layers[i].group].push_back(i);
  }
  EXPECT_EQ(static_cast<int>(groups.size()), plan.num_groups);
  Totals t;
  for (const auto& [group, members] : groups) {
    Wide bytes = 0;
    for (const size_t i : members) bytes += plan.layers[i].page_bytes;
    t.bytes_per_block = std::max(t.bytes_per_block, bytes);
  }
  for (const auto& [group, members] : groups) {
    const size_t first = members[0];
    const Wide here = blocks(layers[first], plan.layers[first].block_size, tokens, r);
    Wide used = 0;
    for (const size_t i : members) {
      EXPECT_EQ(decimal(blocks(layers[i], plan.layers[i].block_size, tokens, r)), decimal(here)) << "of one group";
      used += content(layers[i], plan.layers[i].block_size);
    }
    t.blocks_per_sequence += here;
    t.waste += (t.bytes_per_block - used) * here;
  }
  return t;
}

void check_plan(const std::vector<LayerSpec>& layers, const PlanRequest& r, const Plan& plan) {
  ASSERT_EQ(plan.layers.size(), layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerPlan& l = plan.layers[i];
    if (const int target = layers[i].kv_sharing_target; target != -1) {
      EXPECT_EQ(l.page_bytes, 0);
      EXPECT_EQ(l.group, plan.layers[target].group);
      continue;
    }
    EXPECT_GE(l.padding_bytes, 0);
    EXPECT_EQ(decimal(Wide{l.page_bytes} - l.padding_bytes), decimal(content(layers[i], l.block_size)));
    EXPECT_EQ(l.block_size % r.block_size, 0);
    if (r.max_block_size != 0) {
      EXPECT_LE(l.block_size, std::max(r.max_block_size, r.block_size));
    }
    if (plan.strategy <= Strategy::kSideBySide) {
      EXPECT_EQ(l.padding_bytes, 0);
    }
  }
  const Totals t = totals_of(layers, r, plan, r.max_model_len);
  EXPECT_EQ(decimal(plan.bytes_per_block), decimal(t.bytes_per_block));
  EXPECT_EQ(decimal(plan.num_blocks), decimal(r.memory_bytes / t.bytes_per_block));
  if (r.max_model_len == 0) {
    EXPECT_EQ(decimal(plan.kv_tokens), decimal(r.memory_bytes / t.bytes_per_block * r.block_size));
    return;
  }
  EXPECT_EQ(decimal(plan.blocks_per_sequence), decimal(t.blocks_per_sequence));
  EXPECT_EQ(decimal(plan.waste_bytes), decimal(t.waste));
  // In double, as engines have it.
  const Wide exact = Wide{plan.num_blocks} * r.max_model_len / t.blocks_per_sequence;
  const Wide difference = exact > plan.kv_tokens ? exact - plan.kv_tokens : plan.kv_tokens - exact;
  EXPECT_TRUE(difference <= exact / (int64_t{1} << 50) + 1) << plan.kv_tokens << " " << decimal(exact);
  EXPECT_GE(plan.kv_tokens, 0);
  // The longest sequence fits beside one block, and no longer one does.
  const auto fits = [&](Wide tokens) {
    return totals_of(layers, r, plan, tokens).blocks_per_sequence < plan.num_blocks;
  };
  EXPECT_TRUE(plan.longest_sequence == 0 || fits(plan.longest_sequence));
  EXPECT_TRUE(plan.longest_sequence == r.max_model_len || !fits(Wide{plan.longest_sequence} + 1));
}

// Sentences are allowed where the reference says so too.
void check_sentence(const std::vector<LayerSpec>& layers, PlanRequest r, const std::string& sentence) {
  if (sentence.find("must give less than 2^63") == std::string::npos) {
    EXPECT_TRUE(sentence.find("layers") != std::string::npos || sentence.find("max_model_len") != std::string::npos ||
                sentence.find("max_block_size") != std::string::npos)
        << sentence;
    return;
  }
  // The plan does not depend on the memory: without any it is there, unless its other numbers are too large.
  const int64_t memory = r.memory_bytes;
  r.memory_bytes = 0;
  Plan plan;
  ASSERT_EQ(plan_pages(layers, r, &plan), "");
  const Totals t = totals_of(layers, r, plan, r.max_model_len);
  const Wide tokens = memory / t.bytes_per_block * r.max_model_len / t.blocks_per_sequence;
  EXPECT_GE(static_cast<double>(tokens), 0x1p63 * 0.999999) << sentence;
}

TEST(PlannerProperty, RandomRequests) {
  const char* given = std::getenv("TQ_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : 20261128;
  const char* number = std::getenv("TQ_TEST_CASES");
  const int cases = number != nullptr ? std::atoi(number) : 8000;
  std::printf("seed %llu (TQ_TEST_SEED), %d cases (TQ_TEST_CASES)\n", static_cast<unsigned long long>(seed), cases);
  int plans = 0, too_large = 0;
  for (int i = 0; i < cases && !::testing::Test::HasFailure(); ++i) {
    Random random{std::mt19937_64(seed + static_cast<uint64_t>(i))};
    std::vector<LayerSpec> layers;
    const int kinds = static_cast<int>(1 + random.up_to(2));
    for (int k = 0; k < kinds; ++k) {
      const LayerSpec layer = random_layer(random);
      for (int64_t n = 1 + random.up_to(3); n > 0; --n) layers.push_back(layer);
    }
    if (layers.size() > 1 && random.up_to(3) == 0) {
      layers.push_back(layers[0]);
      layers.back().kv_sharing_target = 0;
    }
    const PlanRequest r = random_request(random);
    SCOPED_TRACE("case " + std::to_string(i) + " of seed " + std::to_string(seed));
    Plan plan;
    if (const std::string sentence = plan_pages(layers, r, &plan); sentence.empty()) {
      check_plan(layers, r, plan);
      ++plans;
    } else {
      check_sentence(layers, r, sentence);
      too_large += sentence.find("must give less than 2^63") != std::string::npos ? 1 : 0;
    }
  }
  std::printf("%d plans, %d beyond 64 bits\n", plans, too_large);
  EXPECT_GT(plans, cases / 4);
  EXPECT_GT(too_large, cases / 1000);
}

}  // namespace
}  // namespace tq
