// stretches_test.cc - the stretches of CTAs cover the line of tiles once, in order, are not much longer than equal
// ones, and agree on who has a part of a row.
#include "kernels/cuda/stretches.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace tq::cuda {
namespace {

TEST(Stretches, CoverTheLineOnce) {
  constexpr unsigned kSeed = 11;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 rng(kSeed);
  int whole_rows = 0, cut_rows = 0;
  for (int i = 0; i < 20000; ++i) {
    const int ctas = 1 + static_cast<int>(rng() % 160), least = 1 + static_cast<int>(rng() % 12);
    const int num_rows = 1 + static_cast<int>(rng() % (1 << (1 + rng() % 10)));
    std::vector<int> rows(num_rows, 1 + static_cast<int>(rng() % (1 << (1 + rng() % 12))));
    const bool even = i % 4 != 0;
    if (!even) {
      for (int& row : rows) row = 1 + static_cast<int>(rng() % 300);
    }
    int total = 0;
    for (const int row : rows) total += row;
    const bool same = std::all_of(rows.begin(), rows.end(), [&](int row) { return row == rows[0]; });
    const int expected_rows = i % 7 == 0 ? 1 + static_cast<int>(rng() % (2 * num_rows)) : num_rows;
    SCOPED_TRACE(testing::Message() << "total " << total << " rows " << num_rows << " even " << even << " expected "
                                    << expected_rows << " ctas " << ctas << " least " << least);
    const int equal = (total + ctas - 1) / ctas;
    const Stretches s = Stretches::make(make_deal(expected_rows, ctas), total, equal, same ? rows[0] : 0, least);
    const int fair = std::max(equal, least);
    ASSERT_LE(s.quota, std::max(fair + fair / 16, 3 * least));
    std::vector<int> owner(total);
    int at = 0;
    for (int cta = 0; cta < ctas; ++cta) {
      ASSERT_LE(s.begin(cta), s.end(cta));
      if (s.begin(cta) == s.end(cta)) continue;
      ASSERT_EQ(s.begin(cta), at);
      ASSERT_LE(s.end(cta) - at, s.quota);
      at = s.end(cta);
      std::fill(owner.begin() + s.begin(cta), owner.begin() + at, cta);
    }
    ASSERT_EQ(at, total);
    for (int row = 0, begin = 0; row < num_rows; begin += rows[row++]) {
      const int end = begin + rows[row], first = owner[begin], last = owner[end - 1];
      for (const int cta : {first, last, owner[(begin + end) / 2]}) {
        const Owners owners = s.owners(cta, begin, end);
        ASSERT_EQ(owners.first, first);
        ASSERT_EQ(owners.count, last - first + 1);
      }
      if (s.row > 0) {
        ASSERT_TRUE(first == 0 || owner[begin - 1] != first) << "a stretch holds parts of two rows";
      }
    }
    cut_rows += s.row > 0;
    whole_rows += same && s.row == 0 && s.quota % rows[0] == 0;
  }
  EXPECT_GT(cut_rows, 100);
  EXPECT_GT(whole_rows, 100);
}

TEST(Stretches, EqualRowsAreCutEvenly) {
  // One sequence of 1,024 tokens with 8 KV heads on 132 multiprocessors of 12 warps: 8 rows of 32 tiles stay whole.
  const Stretches rows = Stretches::make(make_deal(8, 132), 256, 2, 32, 12);
  EXPECT_EQ(rows.quota, 32);
  EXPECT_EQ(rows.row, 0);
  // Of 32,768 tokens: 16 CTAs a row instead of 63 tiles a CTA, whatever row they are of.
  const Stretches parts = Stretches::make(make_deal(8, 132), 8192, 63, 1024, 12);
  EXPECT_EQ(parts.quota, 64);
  EXPECT_EQ(parts.row, 1024);
  // 64 of 4,096 tokens: 4 rows a CTA, on 128 of them.
  EXPECT_EQ(Stretches::make(make_deal(512, 132), 65536, 497, 128, 12).quota, 512);
}

}  // namespace
}  // namespace tq::cuda
