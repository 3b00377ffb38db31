// format.h - the KV formats as plain data: a key codec, a value codec, and how many bits each has. docs/formats.md says
// why these.
//
// The four presets carry vLLM's names, bits per value and math (TQ_PRESETS in
// vllm/model_executor/layers/quantization/turboquant/config.py, 0.32). Where the bytes lie in a page is csrc/layout's.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace tq {

enum class KeyCodec : uint8_t {
  kLloydMax,  // rotate, normalise, Lloyd-Max codes and one fp16 norm
  kInteger,   // rotate, 8-bit integers up to the largest element, and one fp16 norm
  kFp8E4M3,   // e4m3fn as is, no rotation, no metadata
  kF32,       // test only
};
enum class ValueCodec : uint8_t {
  kLloydMax,  // as keys
  kUniform,   // uniform codes between min and max, fp16 scale and zero
  kF32,       // test only
};

// The norm of a Lloyd-Max vector x whose codes stand for the direction c.
enum class NormRule : uint8_t {
  kPreserving,  // what is decoded is as long as x: vLLM's "norm correction", which every read of its cache makes
  kUnbiased,    // what is decoded has x's own length along x, so that scores keep their size on average
};

// TqFormatId of the public header, which csrc/abi asserts.
enum FormatId : uint32_t {  // NOLINT(performance-enum-size): the width of the public field
  kTurboquantK8V4 = 0x0101,
  kTurboquant4BitNc = 0x0201,
  kTurboquantK3V4Nc = 0x0301,
  kTurboquant3BitNc = 0x0401,
  kTq8 = 0x0501,
  kTqK5V4 = 0x0601,
  kTq4 = 0x0701,
  kRawF32 = 0x7f01,
};

struct Format {
  FormatId id;
  const char* name;
  KeyCodec key_codec;
  int key_bits;
  ValueCodec value_codec;
  int value_bits;
  NormRule norm_rule;
  bool test_only;

  // Such keys live in rotated space: queries are rotated too, and decoded keys come back rotated.
  constexpr bool rotates_keys() const { return key_codec == KeyCodec::kLloydMax || key_codec == KeyCodec::kInteger; }
  // A weighted sum of rotated values is rotated; attention rotates it back.
  constexpr bool rotates_values() const { return value_codec == ValueCodec::kLloydMax; }
  constexpr bool has_key_norm() const { return rotates_keys(); }
  constexpr bool has_value_scale() const { return value_codec != ValueCodec::kF32; }  // or a norm
  constexpr bool has_value_zero() const { return value_codec == ValueCodec::kUniform; }
};

// Integer keys: code c in [1, 255] is the level c - 128, and kIntegerScale levels are one standard deviation of a
// rotated vector whose norm is the stored one.
constexpr int kIntegerZero = 128;
constexpr int kIntegerTop = 127;
constexpr float kIntegerScale = 32.0f;

std::span<const Format> all_formats();
const Format* find_format(uint32_t id);            // nullptr if unknown
const Format* find_format(std::string_view name);  // nullptr if unknown

// The format that a misspelt name may mean, for error messages: nullptr if none is near, and never a test-only one.
const Format* nearest_format(std::string_view name);

constexpr int kMaxHeadDim = 512;
constexpr int kHeadDimMultiple = 16;
constexpr bool head_dim_served(int64_t dim) {
  return dim >= kHeadDimMultiple && dim <= kMaxHeadDim && dim % kHeadDimMultiple == 0;
}
// head_dim_served in words, behind "it must be". A literal, as one sentence of the C ABI is static.
#define TQ_HEAD_DIM_RULE "a multiple of 16 from 16 to 512"
static_assert(kHeadDimMultiple == 16 && kMaxHeadDim == 512, "TQ_HEAD_DIM_RULE names these numbers");

}  // namespace tq
