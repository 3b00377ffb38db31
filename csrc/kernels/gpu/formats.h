// formats.h - the formats of codec/format.h as kernels are instantiated for them, and how a layout tells which it has.
#pragma once

#include "kernels/gpu/device_book.h"
#include "layout/page_layout.h"

namespace tq::gpu {

template <KeyCodec kKey, int kKeyBits_, ValueCodec kValue, int kValueBits_, NormRule kRule>
struct Codecs {
  static constexpr int kKeyBits = kKeyBits_, kValueBits = kValueBits_;
  static constexpr NormRule kNormRule = kRule;
  static constexpr bool kIntegerKeys = kKey == KeyCodec::kInteger;
  static constexpr bool kRotatesKeys = kKey != KeyCodec::kFp8E4M3;         // and they have a norm
  static constexpr bool kRotatesValues = kValue == ValueCodec::kLloydMax;  // a norm and no zero; otherwise both
  // What a byte of a decoded key has more than its level.
  static constexpr int kKeyOffset = kIntegerKeys ? kIntegerZero : kLevelOffset;
};
using K8V4 = Codecs<KeyCodec::kFp8E4M3, 8, ValueCodec::kUniform, 4, NormRule::kPreserving>;
using K4V4 = Codecs<KeyCodec::kLloydMax, 4, ValueCodec::kUniform, 4, NormRule::kPreserving>;
using K3V4 = Codecs<KeyCodec::kLloydMax, 3, ValueCodec::kUniform, 4, NormRule::kPreserving>;
using K3V3 = Codecs<KeyCodec::kLloydMax, 3, ValueCodec::kUniform, 3, NormRule::kPreserving>;
using Tq8 = Codecs<KeyCodec::kInteger, 8, ValueCodec::kLloydMax, 4, NormRule::kUnbiased>;
using TqK5V4 = Codecs<KeyCodec::kLloydMax, 5, ValueCodec::kLloydMax, 4, NormRule::kUnbiased>;
using Tq4 = Codecs<KeyCodec::kLloydMax, 4, ValueCodec::kLloydMax, 4, NormRule::kUnbiased>;

// What of a layout tells its format.
struct FormatTraits {
  int key_bits, value_bits;
  bool key_norm, value_zero;
  constexpr bool operator==(const FormatTraits&) const = default;
};
constexpr FormatTraits traits_of(const PageLayout& l) {
  return {l.key_bits, l.value_bits, l.has_key_norm, l.has_value_zero};
}
template <class F>
constexpr FormatTraits traits_of() {
  return {F::kKeyBits, F::kValueBits, F::kRotatesKeys, !F::kRotatesValues};
}

}  // namespace tq::gpu
