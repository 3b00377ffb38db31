// format.h - the KV formats as plain data: which codec keys and values use, and how many bits.
//
// The four presets carry vLLM's names, bits per value and math (TQ_PRESETS in
// vllm/model_executor/layers/quantization/turboquant/config.py, 0.32). Where the bytes lie in a page is csrc/layout's.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace tq {

enum class KeyCodec : uint8_t {
  kLloydMax,  // rotate, normalise, Lloyd-Max codes and one fp16 norm (norm correction folded in)
  kFp8E4M3,   // e4m3fn as is, no rotation, no metadata
  kF32,       // test only
};
enum class ValueCodec : uint8_t {
  kUniform,  // uniform codes between min and max, fp16 scale and zero
  kF32,      // test only
};

// TqFormatId of the public header, which csrc/abi asserts.
enum FormatId : uint32_t {  // NOLINT(performance-enum-size): the width of the public field
  kTurboquantK8V4 = 0x0101,
  kTurboquant4BitNc = 0x0201,
  kTurboquantK3V4Nc = 0x0301,
  kTurboquant3BitNc = 0x0401,
  kRawF32 = 0x7f01,
};

struct Format {
  FormatId id;
  const char* name;
  KeyCodec key_codec;
  int key_bits;
  ValueCodec value_codec;
  int value_bits;
  bool test_only;

  // Lloyd-Max keys live in rotated space: queries are rotated too, and decoded keys come back rotated.
  constexpr bool rotates_keys() const { return key_codec == KeyCodec::kLloydMax; }
  constexpr bool has_key_norm() const { return key_codec == KeyCodec::kLloydMax; }
  constexpr bool has_value_scale() const { return value_codec == ValueCodec::kUniform; }
};

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
