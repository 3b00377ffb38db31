// divisor.h - division by a number that the host knows: a product and a shift instead of the twenty dependent
// instructions of a division, several of which stand before the first copy of a decode launch.
//
// Granlund and Montgomery, Division by Invariant Integers using Multiplication (PLDI 1994).
#pragma once

#include <cstdint>

#include "layout/page_layout.h"

namespace tq::cuda {

struct Divisor {
  uint32_t value, multiplier, shift;

  // n >= 0.
  TQ_HOST_DEVICE int divide(int n) const {
    return static_cast<int>(((uint64_t{static_cast<uint32_t>(n)} * 2 * multiplier) >> 32) >> shift);
  }
  TQ_HOST_DEVICE int rest(int n) const { return n - divide(n) * static_cast<int>(value); }
};

// value > 0.
constexpr Divisor make_divisor(int value) {
  Divisor d = {static_cast<uint32_t>(value), 0, 0};
  while ((uint64_t{1} << d.shift) < d.value) ++d.shift;
  d.multiplier = static_cast<uint32_t>((uint64_t{1} << (31 + d.shift)) / d.value + 1);
  return d;
}

}  // namespace tq::cuda
