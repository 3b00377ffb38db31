// simt_test.cc - the model itself: each modelled instruction by an example from AMD's documents, and what it refuses.
#include <gtest/gtest.h>

#include <vector>

#define __GFX9__ 1
#include "simt/amdgpu.h"

namespace {

constexpr int kThreads = 128;

// Runs body(thread) for one block of two waves.
template <class Body>
void run(int wave, Body body) {
  simt::launch([](const void* b) { (*static_cast<const Body*>(b))(static_cast<int>(simt::thread_index().x)); }, &body,
               {1, 1, 1}, {kThreads, 1, 1}, wave);
}

TEST(Model, LanesOfAWave) {
  for (const int wave : {32, 64}) {
    std::vector<uint32_t> below(kThreads);
    run(wave, [&](int t) {
      below[t] = simt::mbcnt_lo(~0u, 0);
      if (wave == 64) below[t] = simt::mbcnt_hi(~0u, below[t]);
    });
    for (int t = 0; t < kThreads; ++t) EXPECT_EQ(below[t], static_cast<uint32_t>(t % wave));
  }
}

TEST(Model, BpermuteReadsWithinTheWave) {
  for (const int wave : {32, 64}) {
    std::vector<int> got(kThreads);
    run(wave, [&](int t) { got[t] = simt::ds_bpermute(4 * (simt::lane() + 1), 1000 + t); });
    for (int t = 0; t < kThreads; ++t) EXPECT_EQ(got[t], 1000 + t / wave * wave + (t + 1) % wave);
  }
}

TEST(Model, Perm) {
  EXPECT_EQ(simt::perm(0x77665544, 0x33221100, 0x07040300), 0x77443300u);
  EXPECT_EQ(simt::perm(0x00008000, 0x80000080, 0x0D0C0A09), 0xFF00FFFFu) << "signs of bytes 5 and 3, then 0 and FF";
}

TEST(Model, Dot4) { EXPECT_EQ(simt::udot4(0x01020304, 0xFF000002, 5, false), 5u + 255 + 8); }

// D = A B for A[i][k] = i == k and B[k][j] = 16 k + j, laid out by hand: D[i][j] = 16 i + j.
TEST(Model, MfmaOfTheIdentity) {
  std::vector<float> d(256, -1);
  run(64, [&](int t) {
    if (t >= 64) return;
    simt::Half4 a, b;
    for (int h = 0; h < 4; ++h) {
      const int k = t / 16 * 4 + h;
      a[h] = static_cast<_Float16>(k == t % 16 ? 1 : 0);
      b[h] = static_cast<_Float16>(16 * k + t % 16);
    }
    const simt::Float4 c = simt::mfma_f32_16x16x16f16(a, b, simt::Float4{}, 0, 0, 0);
    for (int r = 0; r < 4; ++r) d[(t / 16 * 4 + r) * 16 + t % 16] = c[r];
  });
  for (int i = 0; i < 256; ++i) EXPECT_EQ(d[i], i);
}

TEST(Model, Rdna3WmmaOfTheIdentity) {
  std::vector<float> d(256, -1);
  run(32, [&](int t) {
    if (t >= 32) return;
    simt::Half16 a, b;
    for (int k = 0; k < 16; ++k) {
      a[k] = static_cast<_Float16>(k == t % 16 ? 1 : 0);
      b[k] = static_cast<_Float16>(16 * k + t % 16);
    }
    const simt::Float8 c = simt::wmma_f32_16x16x16_f16_w32(a, b, simt::Float8{});
    for (int r = 0; r < 8; ++r) d[(2 * r + t / 16) * 16 + t % 16] = c[r];
  });
  for (int i = 0; i < 256; ++i) EXPECT_EQ(d[i], i);
}

TEST(Model, Rdna4WmmaOfTheIdentity) {
  std::vector<float> d(256, -1);
  run(32, [&](int t) {
    if (t >= 32) return;
    simt::Half8 a, b;
    for (int h = 0; h < 8; ++h) {
      const int k = t / 16 * 8 + h;
      a[h] = static_cast<_Float16>(k == t % 16 ? 1 : 0);
      b[h] = static_cast<_Float16>(16 * k + t % 16);
    }
    const simt::Float8 c = simt::wmma_f32_16x16x16_f16_w32_gfx12(a, b, simt::Float8{});
    for (int r = 0; r < 8; ++r) d[(t / 16 * 8 + r) * 16 + t % 16] = c[r];
  });
  for (int i = 0; i < 256; ++i) EXPECT_EQ(d[i], i);
}

TEST(Model, Gfx90aTakesSubnormalHalvesForZero) { EXPECT_EQ(simt::operand(static_cast<_Float16>(6.0e-5f)), 0.0f); }

TEST(Model, BarriersOrderWaves) {
  std::vector<int> got(kThreads);
  run(32, [&](int t) {
    auto* shared = static_cast<int*>(simt::shared_memory(kThreads * sizeof(int)));
    shared[t] = t;
    simt::block_barrier();
    got[t] = shared[kThreads - 1 - t];
  });
  for (int t = 0; t < kThreads; ++t) EXPECT_EQ(got[t], kThreads - 1 - t);
}

// Without the barrier some lane must read what is not there yet: the order of lanes is random.
TEST(Model, AMissingBarrierIsSeen) {
  int missing = 0;
  run(32, [&](int t) {
    auto* shared = static_cast<int*>(simt::shared_memory(kThreads * sizeof(int)));
    shared[t] = t;
    if (shared[kThreads - 1 - t] != kThreads - 1 - t) ++missing;
  });
  EXPECT_GT(missing, 0);
}

TEST(ModelDeathTest, ADivergentShuffleIsRefused) {
  EXPECT_DEATH(run(64,
                   [](int t) {
                     if (t % 2 == 0) simt::ds_bpermute(0, t);
                   }),
               "not all lanes of a wave");
}

TEST(ModelDeathTest, DifferentOperationsAreRefused) {
  EXPECT_DEATH(run(64,
                   [](int t) {
                     if (t % 2 == 0) {
                       simt::ds_bpermute(0, t);
                     } else {
                       simt::wave_barrier();
                     }
                   }),
               "different operations");
}

TEST(ModelDeathTest, ADivergentBarrierIsRefused) {
  EXPECT_DEATH(run(64,
                   [](int t) {
                     if (t % 2 == 0) simt::block_barrier();
                   }),
               "block barrier");
}

TEST(ModelDeathTest, OperandsThatAreNotReplicatedAreRefused) {
  EXPECT_DEATH(run(32,
                   [](int t) {
                     simt::Half16 a = {};
                     a[0] = static_cast<_Float16>(t);
                     simt::wmma_f32_16x16x16_f16_w32(a, a, simt::Float8{});
                   }),
               "not the same in both half waves");
}

}  // namespace
