#include "codec/reference.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "codec/float_bits.h"
#include "codec/hadamard.h"
#include "codec/lloyd_max.h"

namespace tq {
namespace {

constexpr float kLargestKey = 1e15f;  // its square times 512 is finite in float

float make_finite(float x, float limit) { return std::isnan(x) ? 0.0f : std::clamp(x, -limit, limit); }

template <class T>
std::vector<T> finite(const float* x, int dim, float limit) {
  std::vector<T> out(dim);
  for (int d = 0; d < dim; ++d) out[d] = make_finite(x[d], limit);
  return out;
}

// x is finite; it is left rotated and in standard deviations.
template <class T>
void encode_lloyd_max(const Codebook& book, NormRule rule, std::vector<T>& x, uint8_t* codes, uint16_t* norm) {
  const int dim = static_cast<int>(x.size());
  T squares = 0;
  for (const T v : x) squares += v * v;
  const T n = std::sqrt(squares);
  for_each_hadamard_block(dim, [&](int offset, int size) {
    hadamard_block(x.data() + offset, size);
    const T factor = std::sqrt(static_cast<T>(dim) / static_cast<T>(size)) / (n + static_cast<T>(1e-8f));
    for (int i = offset; i < offset + size; ++i) x[i] *= factor;
  });
  int64_t level_squares = 0;
  T along = 0;  // <t, levels>
  for (int d = 0; d < dim; ++d) {
    int code = 0;
    while (code < book.num_levels - 1 && x[d] >= static_cast<T>(book.midpoints[code])) ++code;
    codes[d] = static_cast<uint8_t>(code);
    level_squares += book.levels[code] * book.levels[code];
    along += x[d] * book.levels[code];
  }
  T stored = 0;
  if (rule == NormRule::kPreserving) {
    stored = n / (std::sqrt(static_cast<T>(level_squares)) / (book.scale * std::sqrt(static_cast<T>(dim))));
  } else if (along > 0) {
    stored = n * (book.scale * static_cast<T>(dim) / along);
  }
  *norm = float_to_fp16_saturating(static_cast<float>(stored));
}

template <class T>
void decode_lloyd_max(const Codebook& book, int dim, const uint8_t* codes, uint16_t norm, T* out) {
  const T unit = static_cast<T>(fp16_to_float(norm)) / (book.scale * std::sqrt(static_cast<T>(dim)));
  for (int d = 0; d < dim; ++d) out[d] = unit * book.levels[codes[d]];
}

// What an integer level is worth.
template <class T>
T integer_step(int dim, uint16_t norm) {
  return static_cast<T>(fp16_to_float(norm)) / (kIntegerScale * std::sqrt(static_cast<T>(dim)));
}

template <class T>
void encode_integers(std::vector<T>& x, uint8_t* codes, uint16_t* norm) {
  const int dim = static_cast<int>(x.size());
  rotate(x.data(), dim);
  T largest = 0;
  for (const T v : x) largest = std::max(largest, std::fabs(v));
  *norm = float_to_fp16_saturating(
      static_cast<float>(largest * (kIntegerScale * std::sqrt(static_cast<T>(dim)) / static_cast<T>(kIntegerTop))));
  const T step = integer_step<T>(dim, *norm);
  for (int d = 0; d < dim; ++d) {
    const T level = step > 0 ? std::nearbyint(x[d] / step) : 0;
    codes[d] = static_cast<uint8_t>(static_cast<int>(std::clamp<T>(level, -kIntegerTop, kIntegerTop)) + kIntegerZero);
  }
}

}  // namespace

template <class T>
void encode_key(const Format& format, int head_dim, const float* key, uint8_t* codes, uint16_t* norm) {
  *norm = 0;
  if (format.key_codec == KeyCodec::kF32) return;
  if (format.key_codec == KeyCodec::kFp8E4M3) {
    for (int d = 0; d < head_dim; ++d) codes[d] = float_to_e4m3_saturating(key[d]);
    return;
  }
  std::vector<T> x = finite<T>(key, head_dim, kLargestKey);
  if (format.key_codec == KeyCodec::kInteger) {
    encode_integers(x, codes, norm);
  } else {
    encode_lloyd_max(format_codebook(format.key_bits), format.norm_rule, x, codes, norm);
  }
}

template <class T>
void decode_key(const Format& format, int head_dim, const uint8_t* codes, uint16_t norm, T* out) {
  switch (format.key_codec) {
    case KeyCodec::kFp8E4M3:
      for (int d = 0; d < head_dim; ++d) out[d] = e4m3_to_float(codes[d]);
      return;
    case KeyCodec::kInteger:
      for (int d = 0; d < head_dim; ++d) out[d] = integer_step<T>(head_dim, norm) * (codes[d] - kIntegerZero);
      return;
    default:
      decode_lloyd_max(format_codebook(format.key_bits), head_dim, codes, norm, out);
  }
}

template <class T>
void encode_value(const Format& format, int head_dim, const float* value, uint8_t* codes, uint16_t* scale,
                  uint16_t* zero) {
  *scale = *zero = 0;
  if (format.value_codec == ValueCodec::kF32) return;
  if (format.value_codec == ValueCodec::kLloydMax) {
    std::vector<T> x = finite<T>(value, head_dim, kLargestKey);
    encode_lloyd_max(format_codebook(format.value_bits), format.norm_rule, x, codes, scale);
    return;
  }
  const std::vector<T> x = finite<T>(value, head_dim, kMaxFp16);
  const auto [min, max] = std::minmax_element(x.begin(), x.end());
  const int top = (1 << format.value_bits) - 1;
  const T s = std::max((*max - *min) / static_cast<T>(top), static_cast<T>(1e-8f));
  for (int d = 0; d < head_dim; ++d) {
    codes[d] = static_cast<uint8_t>(std::clamp(static_cast<int>((x[d] - *min) / s + static_cast<T>(0.5)), 0, top));
  }
  *scale = float_to_fp16_saturating(static_cast<float>(s));
  *zero = float_to_fp16_saturating(static_cast<float>(*min));
}

template <class T>
void decode_value(const Format& format, int head_dim, const uint8_t* codes, uint16_t scale, uint16_t zero, T* out) {
  if (format.value_codec == ValueCodec::kLloydMax) {
    decode_lloyd_max(format_codebook(format.value_bits), head_dim, codes, scale, out);
    return;
  }
  const T s = fp16_to_float(scale);
  const T z = fp16_to_float(zero);
  for (int d = 0; d < head_dim; ++d) out[d] = static_cast<T>(codes[d]) * s + z;
}

void fake_quantize_key(const Format& format, int head_dim, int64_t num_rows, const float* in, float* out) {
  std::vector<uint8_t> codes(head_dim);
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* x = in + row * head_dim;
    float* y = out + row * head_dim;
    if (format.key_codec == KeyCodec::kF32) {
      std::copy(x, x + head_dim, y);
      continue;
    }
    uint16_t norm;
    encode_key<float>(format, head_dim, x, codes.data(), &norm);
    decode_key<float>(format, head_dim, codes.data(), norm, y);
    if (format.rotates_keys()) rotate(y, head_dim);
  }
}

void fake_quantize_value(const Format& format, int head_dim, int64_t num_rows, const float* in, float* out) {
  std::vector<uint8_t> codes(head_dim);
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* x = in + row * head_dim;
    float* y = out + row * head_dim;
    if (format.value_codec == ValueCodec::kF32) {
      std::copy(x, x + head_dim, y);
      continue;
    }
    uint16_t scale, zero;
    encode_value<float>(format, head_dim, x, codes.data(), &scale, &zero);
    decode_value<float>(format, head_dim, codes.data(), scale, zero, y);
    if (format.rotates_values()) rotate(y, head_dim);
  }
}

template void encode_key<float>(const Format&, int, const float*, uint8_t*, uint16_t*);
template void encode_key<double>(const Format&, int, const float*, uint8_t*, uint16_t*);
template void decode_key<float>(const Format&, int, const uint8_t*, uint16_t, float*);
template void decode_key<double>(const Format&, int, const uint8_t*, uint16_t, double*);
template void encode_value<float>(const Format&, int, const float*, uint8_t*, uint16_t*, uint16_t*);
template void encode_value<double>(const Format&, int, const float*, uint8_t*, uint16_t*, uint16_t*);
template void decode_value<float>(const Format&, int, const uint8_t*, uint16_t, uint16_t, float*);
template void decode_value<double>(const Format&, int, const uint8_t*, uint16_t, uint16_t, double*);

}  // namespace tq
