// reference.h - encode and decode of one vector, the truth that every kernel is tested against.
//
// T is float (the arithmetic that kernels follow step by step, so that codes are equal bit for bit away from ties) or
// double (for error bounds). Codes are one byte each here; csrc/layout packs them.
#pragma once

#include <cstdint>

#include "codec/format.h"

namespace tq {

// A key as a page holds it. Lloyd-Max: codes[head_dim] are codebook indices and norm is fp16 bits; integers: codes are
// level + 128; e4m3: codes are the bytes; f32: codes are unused (the layout stores the floats).
//
// Lloyd-Max encode, with n = ||k||_2, t = sqrt(head_dim) * R k / (n + 1e-8) and D = head_dim:
//   code = number of midpoints <= t (a tie goes up);
//   c = levels[code] / (scale * sqrt(D));
//   norm = fp16(n / ||c||) where the rule is kPreserving: vLLM stores n and divides by ||c|| on every read ("norm
//   correction"); ours is folded in once. kUnbiased: fp16(n * sqrt(D) / <t, c>), 0 for a zero vector.
// Decode: k_rotated = norm * c.
//
// Integer encode: norm = fp16(max |R k| / 127 * kIntegerScale * sqrt(D)), s = norm / (kIntegerScale * sqrt(D)) with the
// fp16 one, level = R k / s rounded to nearest even and clamped to +-127 (0 if s is). Decode: k_rotated = level * s.
// Elements are first made finite: NaN -> 0, +-inf and beyond -> +-1e15; the norm saturates at 65504.
template <class T>
void encode_key(const Format& format, int head_dim, const float* key, uint8_t* codes, uint16_t* norm);

// out[head_dim], still rotated for Lloyd-Max formats.
template <class T>
void decode_key(const Format& format, int head_dim, const uint8_t* codes, uint16_t norm, T* out);

// A value as a page holds it. Lloyd-Max: as a key, scale is the norm, and zero is unused.
// Uniform: min and max over the vector, s = max((max - min) / (2^bits - 1), 1e-8),
// code = clamp(int((v - min) / s + 0.5)), scale = fp16(s), zero = fp16(min). Decode: code * scale + zero, with the fp16
// ones. Elements are first clamped to +-65504 (NaN -> 0), so that scale and zero are finite.
template <class T>
void encode_value(const Format& format, int head_dim, const float* value, uint8_t* codes, uint16_t* scale,
                  uint16_t* zero);

// out[head_dim], still rotated for Lloyd-Max formats.
template <class T>
void decode_value(const Format& format, int head_dim, const uint8_t* codes, uint16_t scale, uint16_t zero, T* out);

// What a stored row reads back as: [num_rows, head_dim] -> same, unrotated.
void fake_quantize_key(const Format& format, int head_dim, int64_t num_rows, const float* in, float* out);
void fake_quantize_value(const Format& format, int head_dim, int64_t num_rows, const float* in, float* out);

}  // namespace tq
