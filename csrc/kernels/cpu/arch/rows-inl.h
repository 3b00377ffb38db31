// rows-inl.h - one vector of head_dim elements in SIMD: load and store any dtype, rotate, decode e4m3.
//
// Included once per instruction set (Highway's foreach_target), hence the toggled guard. Dimensions are multiples of
// 16, so float vectors of 4, 8 or 16 lanes never have a remainder.
#if defined(TQ_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TQ_CPU_ROWS_INL_H_
#undef TQ_CPU_ROWS_INL_H_
#else
#define TQ_CPU_ROWS_INL_H_
#endif

#include <cstring>

#include "codec/hadamard.h"
#include "hwy/highway.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace tq {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using DI = hn::RebindToSigned<DF>;
using DU = hn::RebindToUnsigned<DF>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// out[dim] <- element index... of base, as float.
inline HWY_ATTR void load_row(Dtype dtype, const void* base, int64_t index, int dim, float* HWY_RESTRICT out) {
  const DF df;
  const DU du;
  const hn::Rebind<uint16_t, DF> du16;
  const hn::Rebind<hwy::float16_t, DF> df16;
  if (dtype == Dtype::kF32) {
    std::memcpy(out, static_cast<const float*>(base) + index, sizeof(float) * dim);
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(base) + index;
  if (dtype == Dtype::kBF16) {
    for (int i = 0; i < dim; i += kLanes) {
      const auto wide = hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(du16, in + i)));
      hn::StoreU(hn::BitCast(df, wide), df, out + i);
    }
  } else {
    for (int i = 0; i < dim; i += kLanes) {
      hn::StoreU(hn::PromoteTo(df, hn::BitCast(df16, hn::LoadU(du16, in + i))), df, out + i);
    }
  }
}

// element index... of base <- in[dim], rounded to nearest even. NaN stays NaN.
inline HWY_ATTR void store_row(Dtype dtype, const float* HWY_RESTRICT in, int dim, void* base, int64_t index) {
  const DF df;
  const DU du;
  const hn::Rebind<uint16_t, DF> du16;
  const hn::Rebind<hwy::float16_t, DF> df16;
  if (dtype == Dtype::kF32) {
    std::memcpy(static_cast<float*>(base) + index, in, sizeof(float) * dim);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(base) + index;
  if (dtype == Dtype::kBF16) {
    for (int i = 0; i < dim; i += kLanes) {
      const auto x = hn::LoadU(df, in + i);
      const auto bits = hn::BitCast(du, x);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
      const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fffu)));
      const auto nan = hn::Or(bits, hn::Set(du, 0x400000u));  // rounding up must not turn a NaN into infinity
      const auto is_nan = hn::RebindMask(du, hn::IsNaN(x));
      const auto high = hn::ShiftRight<16>(hn::IfThenElse(is_nan, nan, rounded));
      hn::StoreU(hn::TruncateTo(du16, high), du16, out + i);
    }
  } else {
    for (int i = 0; i < dim; i += kLanes) {
      hn::StoreU(hn::BitCast(du16, hn::DemoteTo(df16, hn::LoadU(df, in + i))), du16, out + i);
    }
  }
}

// x + partner or partner - x by the lane's bit: what one butterfly inside a vector computes, with the reference's
// rounding.
inline HWY_ATTR VF butterfly(VF x, VF partner, uint32_t stride) {
  const DF df;
  const DU du;
  const auto lane = hn::Iota(du, 0u);
  const auto upper = hn::TestBit(lane, hn::Set(du, stride));
  const auto sign = hn::IfThenElseZero(upper, hn::Set(du, 0x80000000u));
  return hn::Add(hn::Xor(x, hn::BitCast(df, sign)), partner);
}

// x <- H x (unnormalised), size a power of two >= 16: the order of additions is hadamard_block's, so results are equal
// bit for bit.
inline HWY_ATTR void hadamard_simd(float* HWY_RESTRICT x, int size) {
  const DF df;
  for (int i = 0; i < size; i += kLanes) {
    auto v = hn::LoadU(df, x + i);
    v = butterfly(v, hn::Shuffle2301(v), 1);
    v = butterfly(v, hn::Shuffle1032(v), 2);
    if constexpr (kLanes == 8) {
      v = butterfly(v, hn::ConcatLowerUpper(df, v, v), 4);
    } else if constexpr (kLanes == 16) {
      v = butterfly(v, hn::SwapAdjacentBlocks(v), 4);
      v = butterfly(v, hn::ConcatLowerUpper(df, v, v), 8);
    }
    hn::StoreU(v, df, x + i);
  }
  for (int stride = kLanes; stride < size; stride *= 2) {
    for (int base = 0; base < size; base += 2 * stride) {
      for (int i = base; i < base + stride; i += kLanes) {
        const auto a = hn::LoadU(df, x + i);
        const auto b = hn::LoadU(df, x + i + stride);
        hn::StoreU(hn::Add(a, b), df, x + i);
        hn::StoreU(hn::Sub(a, b), df, x + i + stride);
      }
    }
  }
}

inline HWY_ATTR void scale_row(float* HWY_RESTRICT x, int size, float factor) {
  const DF df;
  for (int i = 0; i < size; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(df, x + i), hn::Set(df, factor)), df, x + i);
}

// x <- R x, the orthonormal rotation of codec/hadamard.h.
inline HWY_ATTR void rotate_simd(float* x, int dim) {
  for_each_hadamard_block(dim, [x](int offset, int size) HWY_ATTR {
    hadamard_simd(x + offset, size);
    scale_row(x + offset, size, 1.0f / std::sqrt(static_cast<float>(size)));
  });
}

// out[dim] <- e4m3 bytes as floats. e4m3 fits in fp16 with its exponent off by 8, and fp16 hardware converts subnormals
// without the penalty that float denormals cost.
inline HWY_ATTR void decode_e4m3(const uint8_t* HWY_RESTRICT row, int dim, float* HWY_RESTRICT out) {
  const DF df;
  const hn::Rebind<uint8_t, DF> d8;
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Rebind<hwy::float16_t, DF> df16;
  for (int i = 0; i < dim; i += kLanes) {
    const auto b = hn::PromoteTo(d16, hn::LoadU(d8, row + i));
    const auto magnitude = hn::ShiftLeft<7>(hn::And(b, hn::Set(d16, uint16_t{0x7f})));
    const auto sign = hn::ShiftLeft<8>(hn::And(b, hn::Set(d16, uint16_t{0x80})));
    const auto x = hn::PromoteTo(df, hn::BitCast(df16, hn::Or(magnitude, sign)));
    hn::StoreU(hn::Mul(x, hn::Set(df, 256.0f)), df, out + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tq
HWY_AFTER_NAMESPACE();

#endif
