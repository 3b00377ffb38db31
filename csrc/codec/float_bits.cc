#include "codec/float_bits.h"

#include <cmath>

namespace tq {
namespace {

// Rounds |x| to a float format with the given mantissa bits and smallest normal exponent, ties to even, and returns the
// bits exponent:mantissa. Overflow past the largest exponent carries into it, which is what infinity is in fp16.
uint32_t round_to_format(float x, int mantissa_bits, int min_exponent) {
  if (x == 0) return 0;
  int exponent;
  std::frexp(x, &exponent);  // x in [2^(exponent-1), 2^exponent)
  exponent = exponent - 1 < min_exponent ? min_exponent : exponent - 1;
  const double units = std::ldexp(static_cast<double>(x), mantissa_bits - exponent);
  const uint32_t rounded = static_cast<uint32_t>(std::nearbyint(units));
  // Subnormals have rounded < 2^mantissa_bits and exponent field 0; a carry moves up by itself.
  return (static_cast<uint32_t>(exponent - min_exponent) << mantissa_bits) + rounded;
}

}  // namespace

float fp16_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

uint16_t float_to_fp16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7e00;
  const float a = std::fabs(x);
  if (a >= 65520.0f) return sign | 0x7c00;
  return static_cast<uint16_t>(sign | round_to_format(a, 10, -14));
}

uint16_t float_to_fp16_saturating(float x) {
  if (std::isnan(x)) return 0;
  if (x > kMaxFp16) return 0x7bff;
  if (x < -kMaxFp16) return 0xfbff;
  return float_to_fp16(x);
}

uint16_t float_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float e4m3_to_float(uint8_t bits) {
  const int exponent = (bits >> 3) & 15;
  const int mantissa = bits & 7;
  const float sign = bits & 0x80 ? -1.0f : 1.0f;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -9);
  return sign * std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
}

uint8_t float_to_e4m3_saturating(float x) {
  if (std::isnan(x)) return 0;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float a = std::fabs(x);
  if (a >= kMaxE4M3) return sign | 0x7e;
  return static_cast<uint8_t>(sign | round_to_format(a, 3, -6));
}

}  // namespace tq
