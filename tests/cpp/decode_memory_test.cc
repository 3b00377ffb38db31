// decode_memory_test.cc - the parts of a decode launch's memory lie apart and within what is asked for, and the shape
// that is chosen fits.
#include "kernels/cuda/decode_memory.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

#include "kernels/cuda/choose.h"

namespace tq::cuda {
namespace {

constexpr unsigned kSeed = 23;

template <class T>
T pick(std::mt19937& rng, std::initializer_list<T> from) {
  return *(from.begin() + rng() % from.size());
}

DecodeTraits random_traits(std::mt19937& rng) {
  const int dim = pick(rng, {64, 128, 256, 512}), columns = pick(rng, {8, 16});
  return {columns, pick(rng, {1, 2}), pick(rng, {8, 12}), dim + 4, columns * (2 * dim + 24), 512 / dim};
}

int random_atom_bytes(std::mt19937& rng) { return 16 * (32 + static_cast<int>(rng() % 760)); }

TEST(DecodeMemory, PartsOfTheWorkspaceLieApart) {
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 rng(kSeed);
  for (int round = 0; round < 300; ++round) {
    const DecodeTraits t = random_traits(rng);
    const int ctas = 1 + static_cast<int>(rng() % 200), warps = 1 + static_cast<int>(rng() % t.max_warps);
    const DecodeWorkspace w = decode_workspace(t, ctas);
    const uint64_t dump = sizeof(float) * static_cast<uint64_t>(t.columns) * t.dump_pitch;
    std::set<uint64_t> begins;
    auto add = [&](uint64_t part, int64_t floats) {
      const uint64_t at = part + sizeof(float) * static_cast<uint64_t>(floats);
      ASSERT_EQ(at % 16, 0u);
      ASSERT_GE(at, kCounterBytes);
      ASSERT_LE(at + dump, w.bytes);
      ASSERT_TRUE(begins.insert(at).second);
    };
    for (int cta = 0; cta < ctas; ++cta) {
      for (const int which : {0, 1}) {
        ASSERT_NO_FATAL_FAILURE(add(w.of_ctas, t.cta_dump(cta, which)));
        for (int warp = 0; warp < warps; ++warp) {
          ASSERT_NO_FATAL_FAILURE(add(w.of_warps, t.warp_dump(cta, warps, warp, which)));
        }
      }
    }
    uint64_t end = 0;
    for (const uint64_t begin : begins) {
      ASSERT_GE(begin, end) << "two dumps overlap";
      end = begin + dump;
    }
    if (warps == t.max_warps) {
      ASSERT_EQ(end, w.bytes);
    }
  }
}

// A launch of any device's size counts in its own part.
TEST(DecodeMemory, CountersDoNotMove) {
  std::mt19937 rng(kSeed);
  for (const int ctas : {1, 40, 132, kMaxCtas}) {
    EXPECT_EQ(decode_workspace(random_traits(rng), ctas).of_ctas, kCounterBytes);
    EXPECT_LE(ctas * sizeof(uint32_t), kCounterBytes);
  }
}

TEST(DecodeMemory, ShapesFit) {
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 rng(kSeed);
  int none = 0, deepest = 0, fewer_warps = 0;
  for (int round = 0; round < 20000; ++round) {
    const DecodeTraits t = random_traits(rng);
    const int atom = random_atom_bytes(rng), limit = 16384 + static_cast<int>(rng() % 216000);
    const bool bulk_copies = rng() % 2 == 0;
    const int most = bulk_copies ? kMaxSlots : kMaxSlotsWithoutBulkCopies;
    const DecodeShape s = decode_shape(t, atom, limit, bulk_copies);
    if (s.warps == 0) {
      ++none;
      ASSERT_GT(t.shared_bytes(1, kMinSlots, atom), limit) << "one warp would fit";
      continue;
    }
    ASSERT_LE(s.warps, t.max_warps);
    ASSERT_GE(s.slots, kMinSlots);
    ASSERT_LE(s.slots, most);
    ASSERT_LE(s.shared_bytes, limit);
    // What the kernel places, one behind the other.
    const int queries = t.queries_offset(s.warps, s.slots, atom), barriers = t.barriers_offset(s.warps, s.slots, atom);
    ASSERT_GE(queries, s.warps * std::max(s.slots * t.atoms * atom, 4 * t.columns * t.dump_pitch));
    ASSERT_EQ(queries % (128 * s.warps), 0) << "each ring is aligned for bulk copies";
    ASSERT_GE(barriers, queries + (s.warps + t.shared_rows(s.warps)) * t.query_bytes);
    ASSERT_EQ(barriers % 8, 0);
    ASSERT_EQ(s.shared_bytes, barriers + 8 * s.warps * s.slots);
    deepest += s.slots == most;
    fewer_warps += s.warps < t.max_warps;
  }
  EXPECT_GT(none, 100);
  EXPECT_GT(deepest, 100);
  EXPECT_GT(fewer_warps, 100);
}

}  // namespace
}  // namespace tq::cuda
