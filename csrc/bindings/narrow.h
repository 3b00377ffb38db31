// narrow.h - numbers of Python, which have 64 bits, as the narrower ones of the C ABI. A cast alone would make a window
// of 2^32 + 16 tokens one of 16.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>

namespace tq {

// fail(sentence) must throw.
template <std::integral To, class Fail>
To narrow(const std::string& name, int64_t value, Fail fail) {
  using Limits = std::numeric_limits<To>;
  if (value < int64_t{Limits::min()} || value > int64_t{Limits::max()}) {
    fail(name + " is " + std::to_string(value) + "; it must be from " + std::to_string(Limits::min()) + " to " +
         std::to_string(Limits::max()));
  }
  return static_cast<To>(value);
}

// A finite number that is not 0 stays both: as a float, 1e-50 would be 0, which often means none, and 1e50 infinity.
template <class Fail>
float narrow_float(const std::string& name, double value, Fail fail) {
  const auto narrowed = static_cast<float>(value);
  if ((std::isfinite(value) && !std::isfinite(narrowed)) || (value != 0 && narrowed == 0)) {
    fail(name + " is " + std::to_string(value) + "; a 32-bit float does not hold it");
  }
  return narrowed;
}

}  // namespace tq
