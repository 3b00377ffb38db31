// skip_layers_test.cc - layers that share a cache are skipped together or not at all.
#include "planner/skip_layers.h"

#include <gtest/gtest.h>

#include <random>

namespace tq {
namespace {

using Layers = std::vector<int32_t>;

Layers aligned(const Layers& targets, const Layers& skip, int boundary) {
  Layers out = {-7};
  EXPECT_EQ(align_skip_layers(targets, skip, boundary, &out), "");
  return out;
}

TEST(SkipLayers, WithoutSharingTheBoundaryIsVllms) {
  // TurboQuantConfig.get_boundary_skip_layers of vLLM 0.32: n = min(2, num_layers // 2).
  EXPECT_EQ(aligned(Layers(32, -1), {}, 2), (Layers{0, 1, 30, 31}));
  EXPECT_EQ(aligned(Layers(3, -1), {}, 2), (Layers{0, 2}));
  EXPECT_EQ(aligned(Layers(1, -1), {}, 2), Layers{});
  EXPECT_EQ(aligned(Layers(8, -1), {5, 3, 5}, 0), (Layers{3, 5}));
  EXPECT_EQ(aligned(Layers(8, -1), {3}, 1), (Layers{0, 3, 7}));
}

// Gemma 4 E4B: 42 layers, every sixth is full attention, the last 18 read the cache of the last layer of their kind
// before them, 22 or 23. Both are read by a boundary layer (40, 41), so both and all their readers are skipped.
TEST(SkipLayers, Gemma4E4B) {
  Layers targets(42, -1);
  for (int i = 24; i < 42; ++i) targets[i] = i % 6 == 5 ? 23 : 22;
  Layers want = {0, 1, 22, 23};
  for (int i = 24; i < 42; ++i) want.push_back(i);
  EXPECT_EQ(aligned(targets, {}, 2), want);
  // Naming one reader has the same effect as naming its owner, and leaves the other owner's readers alone.
  EXPECT_EQ(aligned(targets, {29}, 0), (Layers{23, 29, 35, 41}));
  EXPECT_EQ(aligned(targets, {23}, 0), (Layers{23, 29, 35, 41}));
}

TEST(SkipLayers, NoPairIsSplitAndNothingMoreIsSkipped) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 rng(seed);
    const int n = 1 + static_cast<int>(rng() % 40);
    Layers targets(n, -1), skip;
    for (int i = 1; i < n; ++i) {
      const int t = static_cast<int>(rng() % i);
      if (rng() % 2 == 0 && targets[t] == -1) targets[i] = t;
    }
    for (int i = 0; i < n; ++i) {
      if (rng() % 8 == 0) skip.push_back(i);
    }
    std::vector<bool> got(n);
    for (const int i : aligned(targets, skip, 0)) got[i] = true;
    for (const int i : skip) EXPECT_TRUE(got[i]) << "seed " << seed;
    for (int i = 0; i < n; ++i) {
      const int owner = targets[i] == -1 ? i : targets[i];
      EXPECT_EQ(got[i], got[owner]) << "seed " << seed << " layer " << i;
      bool named = false;
      for (const int s : skip) named |= (targets[s] == -1 ? s : targets[s]) == owner;
      EXPECT_EQ(got[i], named) << "seed " << seed << " layer " << i;
    }
  }
}

TEST(SkipLayers, SaysWhatIsWrong) {
  Layers out;
  auto sentence = [&](const Layers& targets, const Layers& skip, int boundary) {
    return align_skip_layers(targets, skip, boundary, &out);
  };
  EXPECT_NE(sentence({}, {}, 2).find("kv_sharing_targets is empty"), std::string::npos);
  EXPECT_NE(sentence({-1, -1}, {}, -3).find("boundary_layers is -3"), std::string::npos);
  EXPECT_NE(sentence({-1, -1}, {0, 2}, 0).find("skip_layers[1] is 2; layers go from 0 to 1"), std::string::npos);
  EXPECT_NE(sentence({-1, 9}, {}, 0).find("layers[1].kv_sharing_target is 9"), std::string::npos);
  EXPECT_NE(sentence({-1, 0, 1}, {}, 0).find("shares pages itself"), std::string::npos);
}

}  // namespace
}  // namespace tq
