// float_bits.h - fp16, bf16 and e4m3fn as bit patterns: round to nearest even, saturating where a format says so.
//
// Host code on purpose without _Float16 or hardware conversions: this is the reference that every kernel is tested
// against.
#pragma once

#include <bit>
#include <cstdint>

namespace tq {

constexpr float kMaxFp16 = 65504.0f;
constexpr float kMaxE4M3 = 448.0f;

float fp16_to_float(uint16_t bits);
uint16_t float_to_fp16(float x);             // IEEE: overflows to infinity, keeps NaN
uint16_t float_to_fp16_saturating(float x);  // |x| > 65504 becomes +-65504, NaN becomes 0
inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
uint16_t float_to_bf16(float x);
float e4m3_to_float(uint8_t bits);
uint8_t float_to_e4m3_saturating(float x);  // |x| > 448 becomes +-448, NaN becomes 0

}  // namespace tq
