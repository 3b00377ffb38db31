// planner_fuzz.cc - any layers and any request: a plan that adds up, or a sentence. No crash, no overflow.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "numbers.h"
#include "planner/planner.h"

namespace tq::fuzz {
namespace {

#define REQUIRE(condition)                                     \
  do {                                                         \
    if (!(condition)) {                                        \
      std::fprintf(stderr, "a plan without %s\n", #condition); \
      std::abort();                                            \
    }                                                          \
  } while (0)

LayerSpec layer(FuzzedDataProvider& data, int before) {
  const auto formats = all_formats();
  LayerSpec l = {};
  l.kv_sharing_target = -1;
  const int kind = data.ConsumeIntegralInRange<int>(0, 7);
  if (kind == 0) {
    l.state_bytes = number(data);
    return l;
  }
  if (kind < 5) l.format = &formats[data.ConsumeIntegralInRange<size_t>(0, formats.size() - 1)];
  l.native_bytes = static_cast<int>(mostly(data, 2));
  l.num_kv_heads = static_cast<int>(mostly(data, 1 << data.ConsumeIntegralInRange<int>(0, 3)));
  l.head_dim = static_cast<int>(mostly(data, 16 * data.ConsumeIntegralInRange<int>(1, 32)));
  l.head_dim_v = data.ConsumeBool() ? l.head_dim : static_cast<int>(mostly(data, 64));
  l.sliding_window = data.ConsumeBool() ? 0 : static_cast<int>(number(data));
  if (before > 0 && kind == 7)
    l.kv_sharing_target = static_cast<int>(mostly(data, data.ConsumeIntegralInRange<int>(0, before - 1)));
  return l;
}

void check(const std::vector<LayerSpec>& layers, const PlanRequest& r, const Plan& plan) {
  REQUIRE(plan.layers.size() == layers.size());
  REQUIRE(plan.num_groups >= 1);
  REQUIRE(plan.bytes_per_block >= 1);
  REQUIRE(plan.num_blocks >= 0 && plan.num_blocks == r.memory_bytes / plan.bytes_per_block);
  REQUIRE(plan.kv_tokens >= 0);
  REQUIRE(plan.blocks_per_sequence >= 0 && (plan.blocks_per_sequence > 0) == (r.max_model_len > 0));
  REQUIRE(plan.waste_bytes >= 0);
  REQUIRE(plan.waste_bytes <= static_cast<__int128>(plan.bytes_per_block) * plan.blocks_per_sequence);
  REQUIRE(plan.longest_sequence >= 0 && (r.max_model_len == 0 || plan.longest_sequence <= r.max_model_len));
  std::vector<__int128> group_bytes(plan.num_groups);
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerPlan& l = plan.layers[i];
    REQUIRE(l.group >= 0 && l.group < plan.num_groups);
    REQUIRE(l.block_size >= r.block_size && l.block_size % r.block_size == 0);
    REQUIRE(l.padding_bytes >= 0 && l.padding_bytes <= l.page_bytes);
    REQUIRE((l.page_bytes == 0) == (layers[i].kv_sharing_target != -1));
    group_bytes[l.group] += l.page_bytes;
    const int64_t content =
        layers[i].state_bytes > 0 ? layers[i].state_bytes : bytes_per_token(layers[i]) * l.block_size;
    REQUIRE(l.page_bytes == 0 || l.page_bytes == content + l.padding_bytes);
  }
  for (const __int128 bytes : group_bytes) REQUIRE(bytes > 0 && bytes <= plan.bytes_per_block);
}

}  // namespace
}  // namespace tq::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  using namespace tq::fuzz;  // NOLINT(google-build-using-namespace)
  FuzzedDataProvider data(bytes, size);
  tq::PlanRequest r = {};
  r.block_size = static_cast<int>(mostly(data, 16 * data.ConsumeIntegralInRange<int>(1, 8)));
  r.max_block_size = data.ConsumeBool() ? 0 : static_cast<int>(number(data));
  r.memory_bytes = mostly(data, int64_t{1} << data.ConsumeIntegralInRange<int>(20, 44));
  r.max_model_len = mostly(data, data.ConsumeIntegralInRange<int64_t>(1, 1 << 20));
  r.max_in_flight_tokens = mostly(data, 8192);
  r.blocks_per_state = static_cast<int>(mostly(data, 1));
  r.side_by_side = data.ConsumeBool();
  std::vector<tq::LayerSpec> layers;
  const int count = data.ConsumeIntegralInRange<int>(0, 12);
  for (int i = 0; i < count; ++i) {
    layers.push_back(i > 0 && data.ConsumeBool() ? layers[data.ConsumeIntegralInRange<size_t>(0, layers.size() - 1)]
                                                 : layer(data, i));
  }
  tq::Plan plan;
  if (tq::plan_pages(layers, r, &plan).empty()) check(layers, r, plan);
  return 0;
}
