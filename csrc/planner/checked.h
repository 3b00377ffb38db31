// checked.h - the planner's arithmetic: a product or sum that leaves 64 bits is an error and never a wrong number.
//
// Ranges of single arguments are checked first, but a plan multiplies several of them (memory, tokens, bytes, layers),
// and no limit on each keeps every product of all in range.
#pragma once

#include <cstdint>
#include <exception>

namespace tq {

// Caught by plan_pages, which says it in a sentence.
struct OutOfRange : std::exception {
  const char* what() const noexcept override { return "a number of the plan does not fit in 64 bits"; }
};

inline int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) throw OutOfRange();
  return sum;
}

inline int64_t minus(int64_t a, int64_t b) {
  int64_t difference;
  if (__builtin_sub_overflow(a, b, &difference)) throw OutOfRange();
  return difference;
}

inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) throw OutOfRange();
  return product;
}

// a >= 0, b > 0. Without the sum a + b - 1, which can leave 64 bits where the quotient does not.
inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

}  // namespace tq
