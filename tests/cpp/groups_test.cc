// groups_test.cc - how layers are split into groups; the expected groups are those of vLLM 0.32 on the same
// specs, up to the order within a group.
#include "planner/groups.h"

#include <gtest/gtest.h>

namespace tq {
namespace {

using Specs = std::vector<PageSpec>;

PageSpec full(int geometry, int64_t page_bytes) { return {LayerKind::kFull, geometry, 0, 16, page_bytes}; }
PageSpec sliding(int geometry, int64_t page_bytes) { return {LayerKind::kSliding, geometry, 512, 16, page_bytes}; }
PageSpec state(int64_t page_bytes) { return {LayerKind::kState, -1, 0, 16, page_bytes}; }

TEST(Groups, EqualPagesAreSplitByTheRarestKind) {
  Specs specs;
  for (int i = 0; i < 6; ++i) specs.push_back(i % 3 == 2 ? full(0, 64) : sliding(1, 64));
  EXPECT_EQ(group_equal_pages(specs), (Groups{{0, 3}, {1, 4}, {2, 5}}));
  EXPECT_EQ(bytes_per_block(specs, group_equal_pages(specs)), 128);
  // One layer more than another kind: two groups, not three.
  specs = {full(0, 64), full(0, 64), full(0, 64), sliding(1, 64), sliding(1, 64), sliding(1, 64), sliding(1, 64)};
  EXPECT_EQ(group_equal_pages(specs).size(), 2u);
}

TEST(Groups, SideBySideKeepsAPatternTogether) {
  // Two repeats of a pattern of two page sizes, and three windows: rounding 2 and 3 up to 2 or to 3 costs the same, and
  // the larger is taken.
  const Specs specs = {full(0, 100),   full(1, 40),    full(0, 100),  full(1, 40),
                       sliding(2, 60), sliding(2, 60), sliding(2, 60)};
  EXPECT_EQ(group_side_by_side(specs), (Groups{{0, 2, 1, 3}, {4, 5, 6}}));
}

TEST(Groups, SideBySideSplitsStatesToTheBlock) {
  Specs specs(4, state(90));
  specs.push_back(full(0, 50));
  specs.push_back(full(0, 50));
  specs.push_back(full(0, 50));
  specs.push_back(full(0, 50));
  EXPECT_EQ(group_side_by_side(specs), (Groups{{0, 2}, {1, 3}, {4, 5, 6, 7}}));
  EXPECT_EQ(bytes_per_block(specs, *group_side_by_side(specs)), 200);
}

// vLLM zips the layers of each page size and loses those without a partner.
TEST(Groups, SideBySideDeclinesWhereLayersWouldBeLost) {
  Specs specs = {full(0, 130), sliding(1, 60), sliding(2, 20), sliding(2, 20)};
  EXPECT_EQ(group_side_by_side(specs), std::nullopt);
  specs[0].page_bytes = 300;  // a block that holds all three windows: nothing is split
  EXPECT_EQ(group_side_by_side(specs), (Groups{{0}, {1, 2, 3}}));
}

TEST(Groups, UniformLayersNeedEquallyManyBlocks) {
  EXPECT_TRUE(is_uniform(Specs{full(0, 10), full(1, 20)}));
  EXPECT_TRUE(is_uniform(Specs{sliding(0, 10), sliding(1, 20)}));
  EXPECT_FALSE(is_uniform(Specs{full(0, 10), sliding(0, 10)}));
  EXPECT_FALSE(is_uniform(Specs{state(10), state(20)}));
}

}  // namespace
}  // namespace tq
