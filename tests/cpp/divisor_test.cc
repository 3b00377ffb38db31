// divisor_test.cc - division by a product and a shift, against division.
#include "kernels/cuda/divisor.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>

namespace tq::cuda {
namespace {

TEST(Divisor, EqualsDivision) {
  constexpr int kMost = std::numeric_limits<int>::max();
  std::mt19937 rng(7);
  for (int i = 0; i < 3000; ++i) {
    const int value = i < 1000 ? i + 1 : static_cast<int>(rng() >> (1 + rng() % 30)) | 1;
    const Divisor d = make_divisor(value);
    const int64_t multiple = int64_t{value} * (kMost / value);
    for (const int64_t n : {int64_t{0}, int64_t{value} - 1, int64_t{value}, multiple - 1, multiple, int64_t{kMost},
                            static_cast<int64_t>(rng() >> 1), static_cast<int64_t>(rng() >> 12)}) {
      ASSERT_EQ(d.divide(static_cast<int>(n)), n / value) << n << " / " << value;
      ASSERT_EQ(d.rest(static_cast<int>(n)), n % value) << n << " % " << value;
    }
  }
}

}  // namespace
}  // namespace tq::cuda
