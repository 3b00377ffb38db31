// dot4-inl.h - the integer multiply-accumulate of the CPU kernels: four unsigned by four signed bytes into each 32-bit
// lane.
//
// Highway 1.0.3 (Debian 12) has no such operation, so this is the one place with intrinsics: VNNI where there is
// AVX3_DL, the multiply-add pair before it. The pair saturates 16-bit sums, which 2 * 127 * 128 < 32768 cannot reach: a
// is at most 127. dot4_wide takes all unsigned bytes, by 16-bit products where there is no VNNI.
#if defined(TQ_CPU_DOT4_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TQ_CPU_DOT4_INL_H_
#undef TQ_CPU_DOT4_INL_H_
#else
#define TQ_CPU_DOT4_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels/cpu/arch/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tq {
namespace HWY_NAMESPACE {

using DU8 = hn::Repartition<uint8_t, DF>;
using DI8 = hn::Repartition<int8_t, DF>;
using VI = hn::Vec<DI>;
using VU8 = hn::Vec<DU8>;

// acc[i] + sum over j < 4 of a[4i + j] * b[4i + j]; a in [0, 127], b a 32-bit lane of four signed bytes.
HWY_INLINE HWY_ATTR VI dot4(VI acc, VU8 a, VI b) {
#if HWY_TARGET == HWY_AVX3_DL
  // Written as asm because Highway 1.0.3's target attribute for AVX3_DL leaves avx512vnni out, though its CPU check has
  // it.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.raw) : "v"(a.raw), "v"(b.raw));
  return acc;
#elif HWY_TARGET == HWY_AVX3
  const __m512i pairs = _mm512_maddubs_epi16(a.raw, b.raw);
  return VI{_mm512_add_epi32(acc.raw, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif HWY_TARGET == HWY_AVX2
  const __m256i pairs = _mm256_maddubs_epi16(a.raw, b.raw);
  return VI{_mm256_add_epi32(acc.raw, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#elif HWY_TARGET == HWY_SSE4
  const __m128i pairs = _mm_maddubs_epi16(a.raw, b.raw);
  return VI{_mm_add_epi32(acc.raw, _mm_madd_epi16(pairs, _mm_set1_epi16(1)))};
#else
  const DI d32;
  const hn::Repartition<int16_t, DI> d16;
  const hn::Half<DU8> half_u8;
  const hn::Half<DI8> half_i8;
  const auto bytes = hn::BitCast(DI8(), b);
  auto odd_low = hn::Zero(d32);
  auto odd_high = hn::Zero(d32);
  auto low = hn::ReorderWidenMulAccumulate(d32, hn::PromoteTo(d16, hn::LowerHalf(half_u8, a)),
                                           hn::PromoteTo(d16, hn::LowerHalf(half_i8, bytes)), hn::Zero(d32), odd_low);
  auto high = hn::ReorderWidenMulAccumulate(d32, hn::PromoteTo(d16, hn::UpperHalf(half_u8, a)),
                                            hn::PromoteTo(d16, hn::UpperHalf(half_i8, bytes)), hn::Zero(d32), odd_high);
  low = hn::RearrangeToOddPlusEven(low, odd_low);  // sums of adjacent pairs
  high = hn::RearrangeToOddPlusEven(high, odd_high);
  return hn::Add(acc, hn::Add(hn::ConcatEven(d32, high, low), hn::ConcatOdd(d32, high, low)));
#endif
}

// The same for a in [0, 255].
HWY_INLINE HWY_ATTR VI dot4_wide(VI acc, VU8 a, VI b) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4
  const hn::Repartition<int16_t, DI> d16;
  const auto a16 = hn::BitCast(d16, a), b16 = hn::BitCast(d16, b);
  const auto a_odd = hn::BitCast(d16, hn::ShiftRight<8>(hn::BitCast(hn::Repartition<uint16_t, DI>(), a)));
  const auto a_even = hn::And(a16, hn::Set(d16, int16_t{0xff}));
  const auto b_odd = hn::ShiftRight<8>(b16), b_even = hn::ShiftRight<8>(hn::ShiftLeft<8>(b16));
#if HWY_TARGET == HWY_AVX3
  return VI{_mm512_add_epi32(
      acc.raw, _mm512_add_epi32(_mm512_madd_epi16(a_even.raw, b_even.raw), _mm512_madd_epi16(a_odd.raw, b_odd.raw)))};
#elif HWY_TARGET == HWY_AVX2
  return VI{_mm256_add_epi32(
      acc.raw, _mm256_add_epi32(_mm256_madd_epi16(a_even.raw, b_even.raw), _mm256_madd_epi16(a_odd.raw, b_odd.raw)))};
#else
  return VI{_mm_add_epi32(acc.raw,
                          _mm_add_epi32(_mm_madd_epi16(a_even.raw, b_even.raw), _mm_madd_epi16(a_odd.raw, b_odd.raw)))};
#endif
#else
  return dot4(acc, a, b);  // neither saturates
#endif
}

// A vector filled from kParts places that lie `distance` bytes apart, in order. kParts is 1, 2 or 4 and at most kLanes
// / 4: one part is at least 16 bytes.
template <int kParts>
HWY_INLINE HWY_ATTR VU8 load_side_by_side(const uint8_t* from, [[maybe_unused]] int64_t distance) {
  const DU8 d;
#if HWY_MAX_BYTES >= 32
  const hn::Half<DU8> half;
  if constexpr (kParts == 2) return hn::Combine(d, hn::LoadU(half, from + distance), hn::LoadU(half, from));
#endif
#if HWY_MAX_BYTES >= 64
  const hn::Half<decltype(half)> quarter;
  if constexpr (kParts == 4) {
    const auto low = hn::Combine(half, hn::LoadU(quarter, from + distance), hn::LoadU(quarter, from));
    const auto high =
        hn::Combine(half, hn::LoadU(quarter, from + 3 * distance), hn::LoadU(quarter, from + 2 * distance));
    return hn::Combine(d, high, low);
  }
#endif
  return hn::LoadU(d, from);
}

// The same from kParts 32-bit integers, each repeated through its part.
template <int kParts>
HWY_INLINE HWY_ATTR VI set_side_by_side(const int8_t* from) {
  const DI d;
  int32_t x[kParts];
  std::memcpy(x, from, sizeof(x));
#if HWY_MAX_BYTES >= 32
  const hn::Half<DI> half;
  if constexpr (kParts == 2) return hn::Combine(d, hn::Set(half, x[1]), hn::Set(half, x[0]));
#endif
#if HWY_MAX_BYTES >= 64
  const hn::Half<decltype(half)> quarter;
  if constexpr (kParts == 4) {
    return hn::Combine(d, hn::Combine(half, hn::Set(quarter, x[3]), hn::Set(quarter, x[2])),
                       hn::Combine(half, hn::Set(quarter, x[1]), hn::Set(quarter, x[0])));
  }
#endif
  return hn::Set(d, x[0]);
}

// A signed 16-bit integer as high * 256 + low, both signed bytes: two dot4 give its exact products.
constexpr int kPlaneLimit = 127 * 256 + 127;  // the largest magnitude of both signs
inline void split_planes(int x, int8_t* high, int8_t* low) {
  *low = static_cast<int8_t>(x & 0xff);
  *high = static_cast<int8_t>((x - *low) / 256);
}

}  // namespace HWY_NAMESPACE
}  // namespace tq
HWY_AFTER_NAMESPACE();

#endif
