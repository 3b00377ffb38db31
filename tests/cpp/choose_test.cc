// choose_test.cc - the kernel that serves a layer is the tightest one, whatever the order of the table.
#include "kernels/cuda/choose.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace tq::cuda {
namespace {

constexpr unsigned kSeed = 17;

// 16, 32, ..., 512
int random_dim(std::mt19937& rng) { return 16 * (1 + static_cast<int>(rng() % 32)); }

PageLayout layout_of(FormatId id, int head_dim, int head_dim_v) {
  return make_page_layout(*find_format(id), head_dim, head_dim_v, 2, 16);
}

DecodeInstance decode(int dim, bool exact, int columns) {
  return {nullptr, dim, exact, {columns, 1, 8, dim + 4, columns * 2 * dim, 1}};
}

// As found by hand: exact ones first, then the smallest dimension; of those the fewest and the most columns.
std::vector<DecodeInstance> tightest(const std::vector<DecodeInstance>& table, const PageLayout& l) {
  const int dim = std::max(l.head_dim, l.head_dim_v);
  std::vector<DecodeInstance> exact, range;
  int smallest_range = 1 << 20;
  for (const DecodeInstance& i : table) {
    if (i.exact && i.dim == l.head_dim && i.dim == l.head_dim_v) exact.push_back(i);
    if (!i.exact && i.dim >= dim) smallest_range = std::min(smallest_range, i.dim);
  }
  for (const DecodeInstance& i : table) {
    if (!i.exact && i.dim == smallest_range) range.push_back(i);
  }
  std::vector<DecodeInstance> found = exact.empty() ? range : exact;
  std::sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.traits.columns < b.traits.columns; });
  return found;
}

TEST(Choose, DecodeDoesNotDependOnTheOrder) {
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 rng(kSeed);
  int served = 0, exact = 0, two_widths = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<DecodeInstance> table;
    for (int n = static_cast<int>(rng() % 8); n > 0; --n) {
      const int dim = random_dim(rng);
      const bool is_exact = rng() % 2 == 0;
      if (std::any_of(table.begin(), table.end(), [&](auto& i) { return i.dim == dim && i.exact == is_exact; }))
        continue;
      table.push_back(decode(dim, is_exact, 8));
      if (rng() % 2 == 0) table.push_back(decode(dim, is_exact, 16));
    }
    // A layer like one of the rows, or any.
    int head_dim = random_dim(rng);
    if (!table.empty() && rng() % 2 == 0) head_dim = table[rng() % table.size()].dim;
    const PageLayout layout = layout_of(kTurboquant4BitNc, head_dim, rng() % 4 == 0 ? random_dim(rng) : head_dim);
    const std::vector<DecodeInstance> want = tightest(table, layout);
    for (int order = 0; order < 10; ++order) {
      std::shuffle(table.begin(), table.end(), rng);
      const DecodeKernels got = find_decode(table, layout);
      ASSERT_EQ(got.narrow == nullptr, want.empty());
      ASSERT_EQ(got.wide == nullptr, want.empty());
      if (want.empty()) continue;
      ASSERT_EQ(got.narrow->dim, want.front().dim);
      ASSERT_EQ(got.narrow->exact, want.front().exact);
      ASSERT_EQ(got.narrow->traits.columns, want.front().traits.columns);
      ASSERT_EQ(got.wide->dim, want.back().dim);
      ASSERT_EQ(got.wide->exact, want.back().exact);
      ASSERT_EQ(got.wide->traits.columns, want.back().traits.columns);
      ASSERT_EQ(&got.of(8), got.narrow);
      ASSERT_EQ(&got.of(9), got.narrow->traits.columns > 8 ? got.narrow : got.wide);
    }
    served += !want.empty();
    exact += !want.empty() && want.front().exact;
    two_widths += want.size() == 2;
  }
  EXPECT_GT(served, 500);
  EXPECT_GT(exact, 100);
  EXPECT_GT(two_widths, 100);
}

// Checks find(table, dim) for every dim: the smallest size that holds it, in every order.
template <class Instance, class Find, class SizeOf>
void check_smallest(std::vector<Instance> table, const std::vector<int>& sizes, Find find, SizeOf size_of) {
  std::mt19937 rng(kSeed);
  for (int order = 0; order < 50; ++order) {
    std::shuffle(table.begin(), table.end(), rng);
    for (int dim = 16; dim <= 528; dim += 16) {
      const auto want = std::lower_bound(sizes.begin(), sizes.end(), dim);
      const Instance* got = find(table, dim);
      ASSERT_EQ(got == nullptr, want == sizes.end()) << dim;
      if (got != nullptr) {
        ASSERT_EQ(size_of(*got), *want) << dim;
      }
    }
  }
}

TEST(Choose, TheOthersDoNotEither) {
  const std::vector<int> sizes = {64, 128, 256, 512};
  std::vector<PrefillInstance> prefill;
  std::vector<RowInstance> rows;
  std::vector<RotateInstance> rotate;
  for (const int size : sizes) {
    for (const Format& format : all_formats()) {
      const gpu::FormatTraits traits = gpu::traits_of(layout_of(format.id, size, size));
      prefill.push_back({nullptr, traits, size, 0, 0, 0});
      rows.push_back({nullptr, traits, size / 16});
    }
    rotate.push_back({nullptr, size / 16});
  }
  check_smallest(
      prefill, sizes,
      [](auto& table, int dim) {
        const PageLayout layout = layout_of(kTq8, 16, dim);  // as many bits as turboquant_k8v4
        const PrefillInstance* i = find_prefill(table, layout);
        EXPECT_TRUE(i == nullptr || i->format == gpu::traits_of(layout));
        return i;
      },
      [](const PrefillInstance& i) { return i.dim; });
  check_smallest(
      rows, sizes,
      [](auto& table, int dim) {
        const PageLayout layout = layout_of(kTurboquant4BitNc, dim, 16);  // as many bits as tq_4
        const RowInstance* i = find_rows(table, layout);
        EXPECT_TRUE(i == nullptr || i->format == gpu::traits_of(layout));
        return i;
      },
      [](const RowInstance& i) { return 16 * i.lanes; });
  check_smallest(
      rotate, sizes, [](auto& table, int dim) { return find_rotate(table, dim); },
      [](const RotateInstance& i) { return 16 * i.lanes; });
}

TEST(Choose, ALayoutTellsItsFormat) {
  for (const Format& a : all_formats()) {
    for (const Format& b : all_formats()) {
      EXPECT_EQ(gpu::traits_of(layout_of(a.id, 64, 64)) == gpu::traits_of(layout_of(b.id, 64, 64)), a.id == b.id);
    }
  }
}

}  // namespace
}  // namespace tq::cuda
