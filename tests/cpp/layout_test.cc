// layout_test.cc - every byte of a page belongs to exactly one thing, and sizes are the in-tree ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "layout/page_layout.h"
#include "layout/reference_page.h"

namespace tq {
namespace {

TEST(Layout, SlotBytesAreVllms) {
  // vLLM 0.32, TurboQuantConfig.slot_size_aligned.
  const struct {
    const char* name;
    int bytes[4];
  } rows[] = {{"turboquant_k8v4", {100, 196, 388, 772}},
              {"turboquant_4bit_nc", {70, 134, 262, 518}},
              {"turboquant_k3v4_nc", {62, 118, 230, 454}},
              {"turboquant_3bit_nc", {54, 102, 198, 390}}};
  const int dims[] = {64, 128, 256, 512};
  for (const auto& row : rows) {
    for (int i = 0; i < 4; ++i) {
      const Format& format = *find_format(std::string_view(row.name));
      EXPECT_EQ(make_page_layout(format, dims[i], dims[i], 8, 16).slot_bytes(), row.bytes[i]) << row.name << dims[i];
    }
  }
}

TEST(Layout, EveryByteOfAPageIsCoveredOnce) {
  for (const Format& format : all_formats()) {
    for (int dim = 16; dim <= 512; dim += 16) {
      for (const int dim_v : {dim, 64}) {
        const PageLayout l = make_page_layout(format, dim, dim_v, 3, 48);
        std::vector<int> used(static_cast<size_t>(l.page_bytes()));
        auto cover = [&](int64_t offset, int count) {
          for (int i = 0; i < count; ++i) ++used.at(static_cast<size_t>(offset + i));
        };
        for (int head = 0; head < 3; ++head) {
          for (int token = 0; token < 48; ++token) {
            const int64_t atom = l.atom_offset(head, token);
            const int t = token % kAtomTokens;
            ASSERT_EQ(atom % kPageAlignment, 0);
            ASSERT_EQ((atom + l.value_row_offset(0)) % kPageAlignment, 0);
            cover(atom + l.key_row_offset(t), l.key_row_bytes());
            cover(atom + l.value_row_offset(t), l.value_row_bytes());
            if (l.has_key_norm) cover(atom + l.key_norm_offset(t), 2);
            if (l.has_value_scale) cover(atom + l.value_scale_offset(t), 2);
            if (l.has_value_zero) cover(atom + l.value_zero_offset(t), 2);
          }
        }
        ASSERT_EQ(std::count(used.begin(), used.end(), 1), l.page_bytes()) << format.name << " " << dim << "/" << dim_v;
      }
    }
  }
}

TEST(Layout, CodesPackAndUnpack) {
  std::mt19937 rng(1);
  for (const int bits : {3, 4, 5, 8}) {
    for (int dim = 16; dim <= 512; dim += 16) {
      std::vector<uint8_t> row(static_cast<size_t>(dim * bits / 8));
      std::vector<int> codes(dim);
      for (int d = 0; d < dim; ++d) {
        codes[d] = static_cast<int>(rng() % (1u << bits));
        pack_code(row.data(), bits, dim, d, codes[d]);
      }
      for (int d = 0; d < dim; ++d) ASSERT_EQ(unpack_code(row.data(), bits, dim, d), codes[d]) << bits << " " << dim;
    }
  }
}

TEST(Layout, HighestBitsOfARowAreAPermutation) {
  for (int bits : {3, 5})
    for (int dim = 16; dim <= 512; dim += 16) {
      std::set<int> seen;
      for (int d = 0; d < dim; ++d) seen.insert(high_plane_bit(bits, d, dim));
      EXPECT_EQ(static_cast<int>(seen.size()), dim);
      EXPECT_EQ(*seen.begin(), 0);
      EXPECT_EQ(*seen.rbegin(), dim - 1);
    }
}

}  // namespace
}  // namespace tq
