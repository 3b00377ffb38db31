// store_task.cc - the CPU store, dequantize and rotate kernels, one token at a time.
//
// Encode follows codec/reference.cc's float arithmetic operation by operation, so that codes are equal bit for bit
// (away from ties: the norm is summed in another order here).
#include "kernels/cpu/store_task.h"

#include <algorithm>
#include <cmath>

#include "codec/float_bits.h"
#include "kernels/cpu/arch/targets.h"
#include "kernels/cpu/attend_task.h"
#include "layout/reference_page.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/arch/store_task.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/arch/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tq {
namespace HWY_NAMESPACE {

constexpr int kRow = kMaxHeadDim + kVectorPad;

// NaN -> 0, then clamp to +-limit.
HWY_ATTR void make_finite(float* HWY_RESTRICT x, int dim, float limit) {
  const DF df;
  for (int i = 0; i < dim; i += kLanes) {
    const auto v = hn::LoadU(df, x + i);
    const auto finite = hn::IfThenElseZero(hn::Eq(v, v), v);
    hn::StoreU(hn::Min(hn::Max(finite, hn::Set(df, -limit)), hn::Set(df, limit)), df, x + i);
  }
}

// out[dim] <- codes in dimension order, one byte each.
HWY_ATTR void store_codes(hn::Vec<DI> codes, uint8_t* HWY_RESTRICT out) {
  const hn::Rebind<uint8_t, DI> d8;
  hn::StoreU(hn::DemoteTo(d8, codes), d8, out);
}

void pack_row(int bits, const uint8_t* HWY_RESTRICT codes, int dim, uint8_t* HWY_RESTRICT row) {
  if (bits == 8) {
    std::memcpy(row, codes, static_cast<size_t>(dim));
    return;
  }
  if (bits == 3) {
    for (int i = 0; i < dim / 4; ++i) {
      const uint8_t* c = codes + 4 * i;
      row[i] = static_cast<uint8_t>((c[0] & 3) | (c[1] & 3) << 2 | (c[2] & 3) << 4 | (c[3] & 3) << 6);
    }
  } else {
    for (int i = 0; i < dim / 2; ++i) row[i] = static_cast<uint8_t>((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
  }
  if (bits == 4) return;
  uint8_t bits_of_plane[kMaxHeadDim / 8] = {};
  for (int d = 0; d < dim; ++d) {
    const int bit = high_plane_bit(bits, d, dim);
    bits_of_plane[bit / 8] = static_cast<uint8_t>(bits_of_plane[bit / 8] | (codes[d] >> (bits - 1)) << (bit % 8));
  }
  std::memcpy(row + high_plane_offset(bits, dim), bits_of_plane, static_cast<size_t>(dim) / 8);
}

// x[dim] to codes; returns the norm. reference.h has the formulas.
HWY_ATTR uint16_t encode_lloyd_max(const Codebook& book, NormRule rule, float* HWY_RESTRICT x, int dim,
                                   uint8_t* HWY_RESTRICT codes) {
  const DF df;
  const DI di;
  make_finite(x, dim, 1e15f);
  auto squares = hn::Zero(df);
  for (int i = 0; i < dim; i += kLanes) {
    const auto v = hn::LoadU(df, x + i);
    squares = hn::MulAdd(v, v, squares);
  }
  const float norm = std::sqrt(hn::GetLane(hn::SumOfLanes(df, squares)));
  for_each_hadamard_block(dim, [&](int offset, int size) HWY_ATTR {
    hadamard_simd(x + offset, size);
    scale_row(x + offset, size, std::sqrt(static_cast<float>(dim) / static_cast<float>(size)) / (norm + 1e-8f));
  });
  for (int i = 0; i < dim; i += kLanes) {
    const auto v = hn::LoadU(df, x + i);
    auto code = hn::Zero(di);
    for (int m = 0; m < book.num_levels - 1; ++m) {
      const auto above = hn::VecFromMask(df, hn::Ge(v, hn::Set(df, book.midpoints[m])));
      code = hn::Sub(code, hn::BitCast(di, above));  // a true mask is -1
    }
    store_codes(code, codes + i);
  }
  if (rule == NormRule::kUnbiased) {
    double along = 0;
    for (int i = 0; i < dim; ++i) along += double{x[i]} * book.levels[codes[i]];
    return along > 0 ? float_to_fp16_saturating(norm * static_cast<float>(double{book.scale} * dim / along))
                     : uint16_t{0};
  }
  int64_t level_squares = 0;
  for (int i = 0; i < dim; ++i) level_squares += book.levels[codes[i]] * book.levels[codes[i]];
  const float level_norm =
      std::sqrt(static_cast<float>(level_squares)) / (book.scale * std::sqrt(static_cast<float>(dim)));
  return float_to_fp16_saturating(norm / level_norm);
}

// The same of integers.
HWY_ATTR uint16_t encode_integers(float* HWY_RESTRICT x, int dim, uint8_t* HWY_RESTRICT codes) {
  const DF df;
  const DI di;
  make_finite(x, dim, 1e15f);
  rotate_simd(x, dim);
  auto largest = hn::Zero(df);
  for (int i = 0; i < dim; i += kLanes) largest = hn::Max(largest, hn::Abs(hn::LoadU(df, x + i)));
  const float levels = kIntegerScale * std::sqrt(static_cast<float>(dim));
  const uint16_t stored =
      float_to_fp16_saturating(hn::GetLane(hn::MaxOfLanes(df, largest)) * (levels / static_cast<float>(kIntegerTop)));
  const float step = fp16_to_float(stored) / levels;
  if (step == 0) {
    std::fill(codes, codes + dim, uint8_t{kIntegerZero});
    return stored;
  }
  const auto top = hn::Set(df, static_cast<float>(kIntegerTop));
  for (int i = 0; i < dim; i += kLanes) {
    const auto v = hn::Div(hn::LoadU(df, x + i), hn::Set(df, step));
    store_codes(hn::Add(hn::NearestInt(hn::Min(hn::Max(v, hn::Neg(top)), top)), hn::Set(di, kIntegerZero)), codes + i);
  }
  return stored;
}

HWY_ATTR void encode_uniform(const PagedCache& cache, float* HWY_RESTRICT x, uint8_t* HWY_RESTRICT codes, uint8_t* atom,
                             int t) {
  const PageLayout& layout = cache.layout;
  const int dim = layout.head_dim_v;
  const DF df;
  const DI di;
  make_finite(x, dim, kMaxFp16);
  auto smallest = hn::LoadU(df, x);
  auto largest = smallest;
  for (int i = kLanes; i < dim; i += kLanes) {
    const auto v = hn::LoadU(df, x + i);
    smallest = hn::Min(smallest, v);
    largest = hn::Max(largest, v);
  }
  const float min = hn::GetLane(hn::MinOfLanes(df, smallest));
  const float max = hn::GetLane(hn::MaxOfLanes(df, largest));
  const int top = (1 << layout.value_bits) - 1;
  const float scale = std::max((max - min) / static_cast<float>(top), 1e-8f);
  for (int i = 0; i < dim; i += kLanes) {
    const auto v = hn::Sub(hn::LoadU(df, x + i), hn::Set(df, min));
    const auto q = hn::ConvertTo(di, hn::Add(hn::Div(v, hn::Set(df, scale)), hn::Set(df, 0.5f)));
    store_codes(hn::Min(hn::Max(q, hn::Zero(di)), hn::Set(di, top)), codes + i);
  }
  const uint16_t stored_scale = float_to_fp16_saturating(scale);
  const uint16_t stored_zero = float_to_fp16_saturating(min);
  std::memcpy(atom + layout.value_scale_offset(t), &stored_scale, sizeof(stored_scale));
  std::memcpy(atom + layout.value_zero_offset(t), &stored_zero, sizeof(stored_zero));
  pack_row(layout.value_bits, codes, dim, atom + layout.value_row_offset(t));
}

// x[dim] <- levels times the norm, rotated. book null: integers.
void decode_levels(const Codebook* book, int bits, const uint8_t* row, int dim, float norm, float* HWY_RESTRICT x) {
  const float scale = book != nullptr ? book->scale : kIntegerScale;
  const float unit = norm / (scale * std::sqrt(static_cast<float>(dim)));
  for (int d = 0; d < dim; ++d) {
    const int code = unpack_code(row, bits, dim, d);
    x[d] = static_cast<float>(book != nullptr ? book->levels[code] : code - kIntegerZero) * unit;
  }
}

float load_fp16(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return fp16_to_float(bits);
}

HWY_ATTR void StoreTaskImpl(const StoreParams& p, int64_t token) {
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0) return;
  const PagedCache& cache = p.cache;
  const PageLayout& layout = cache.layout;
  HWY_ALIGN float x[kRow];
  HWY_ALIGN uint8_t codes[kRow];
  uint8_t* page = cache.data + slot / layout.block_size * cache.block_stride;
  const int in_block = static_cast<int>(slot % layout.block_size);
  const int t = in_block % kAtomTokens;
  for (int head = 0; head < layout.num_kv_heads; ++head) {
    uint8_t* atom = page + layout.atom_offset(head, in_block);
    load_row(p.dtype, p.key, token * p.key_token_stride + head * p.key_head_stride, layout.head_dim, x);
    uint8_t* key_row = atom + layout.key_row_offset(t);
    if (p.key_offset != nullptr) {
      for (int d = 0; d < layout.head_dim; ++d) x[d] -= p.key_offset[head * layout.head_dim + d];
    }
    switch (cache.format.key_codec) {
      case KeyCodec::kLloydMax:
      case KeyCodec::kInteger: {
        const Codebook* book = cache.key_book;
        const uint16_t norm = book != nullptr
                                  ? encode_lloyd_max(*book, cache.format.norm_rule, x, layout.head_dim, codes)
                                  : encode_integers(x, layout.head_dim, codes);
        std::memcpy(atom + layout.key_norm_offset(t), &norm, sizeof(norm));
        pack_row(layout.key_bits, codes, layout.head_dim, key_row);
        break;
      }
      case KeyCodec::kFp8E4M3:
        for (int d = 0; d < layout.head_dim; ++d) key_row[d] = float_to_e4m3_saturating(x[d]);
        break;
      case KeyCodec::kF32:
        std::memcpy(key_row, x, sizeof(float) * layout.head_dim);
        break;
    }
    load_row(p.dtype, p.value, token * p.value_token_stride + head * p.value_head_stride, layout.head_dim_v, x);
    uint8_t* value_row = atom + layout.value_row_offset(t);
    switch (cache.format.value_codec) {
      case ValueCodec::kLloydMax: {
        const uint16_t norm = encode_lloyd_max(*cache.value_book, cache.format.norm_rule, x, layout.head_dim_v, codes);
        std::memcpy(atom + layout.value_scale_offset(t), &norm, sizeof(norm));
        pack_row(layout.value_bits, codes, layout.head_dim_v, value_row);
        break;
      }
      case ValueCodec::kUniform:
        encode_uniform(cache, x, codes, atom, t);
        break;
      case ValueCodec::kF32:
        std::memcpy(value_row, x, sizeof(float) * layout.head_dim_v);
        break;
    }
  }
}

HWY_ATTR void DequantTaskImpl(const DequantParams& p, int seq, int64_t token, int64_t row) {
  const PagedCache& cache = p.cache;
  const PageLayout& layout = cache.layout;
  HWY_ALIGN float x[kRow];
  const int32_t* table = p.block_table + seq * p.block_table_stride;
  const uint8_t* page = cache.data + table[token / layout.block_size] * cache.block_stride;
  const int in_block = static_cast<int>(token % layout.block_size);
  const int t = in_block % kAtomTokens;
  for (int head = 0; head < layout.num_kv_heads; ++head) {
    const uint8_t* atom = page + layout.atom_offset(head, in_block);
    if (p.key_out != nullptr) {
      const int dim = layout.head_dim;
      const uint8_t* codes = atom + layout.key_row_offset(t);
      switch (cache.format.key_codec) {
        case KeyCodec::kLloydMax:
        case KeyCodec::kInteger:
          decode_levels(cache.key_book, layout.key_bits, codes, dim, load_fp16(atom + layout.key_norm_offset(t)), x);
          if (!p.keep_rotated) rotate_simd(x, dim);
          break;
        case KeyCodec::kFp8E4M3:
          decode_e4m3(codes, dim, x);
          break;
        case KeyCodec::kF32:
          std::memcpy(x, codes, sizeof(float) * dim);
          break;
      }
      store_row(p.dtype, x, dim, p.key_out, (row * layout.num_kv_heads + head) * dim);
    }
    if (p.value_out != nullptr) {
      const int dim = layout.head_dim_v;
      const uint8_t* codes = atom + layout.value_row_offset(t);
      const float scale = layout.has_value_scale ? load_fp16(atom + layout.value_scale_offset(t)) : 0.0f;
      switch (cache.format.value_codec) {
        case ValueCodec::kLloydMax:
          decode_levels(cache.value_book, layout.value_bits, codes, dim, scale, x);
          rotate_simd(x, dim);
          break;
        case ValueCodec::kUniform: {
          const float zero = load_fp16(atom + layout.value_zero_offset(t));
          for (int d = 0; d < dim; ++d) {
            x[d] = static_cast<float>(unpack_code(codes, layout.value_bits, dim, d)) * scale + zero;
          }
          break;
        }
        case ValueCodec::kF32:
          std::memcpy(x, codes, sizeof(float) * dim);
          break;
      }
      store_row(p.dtype, x, dim, p.value_out, (row * layout.num_kv_heads + head) * dim);
    }
  }
}

HWY_ATTR void RotateTaskImpl(const RotateParams& p, int64_t token) {
  HWY_ALIGN float x[kRow];
  for (int head = 0; head < p.num_heads; ++head) {
    load_row(p.dtype, p.x, token * p.x_token_stride + head * p.x_head_stride, p.head_dim, x);
    if (p.rotates) rotate_simd(x, p.head_dim);
    store_row(p.dtype, x, p.head_dim, p.out, token * p.out_token_stride + head * p.out_head_stride);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tq
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tq {

HWY_EXPORT(StoreTaskImpl);
HWY_EXPORT(DequantTaskImpl);
HWY_EXPORT(RotateTaskImpl);

void run_store_task(const StoreParams& params, int64_t token) { HWY_DYNAMIC_DISPATCH(StoreTaskImpl)(params, token); }

void run_dequant_task(const DequantParams& params, int seq, int64_t token, int64_t row) {
  HWY_DYNAMIC_DISPATCH(DequantTaskImpl)(params, seq, token, row);
}

void run_rotate_task(const RotateParams& params, int64_t token) { HWY_DYNAMIC_DISPATCH(RotateTaskImpl)(params, token); }

}  // namespace tq
#endif
