#include "layout/reference_page.h"

#include <cstring>
#include <vector>

#include "codec/reference.h"

namespace tq {

int unpack_code(const uint8_t* row, int bits, int head_dim, int d) {
  if (bits == 8) return row[d];
  const int low = bits == 3 ? (row[d / 4] >> (d % 4 * 2)) & 3 : (row[d / 2] >> (d % 2 * 4)) & 15;
  if (bits == 4) return low;
  const int bit = high_plane_bit(bits, d, head_dim);
  const int high = (row[high_plane_offset(bits, head_dim) + bit / 8] >> (bit % 8)) & 1;
  return low | high << (bits - 1);
}

void pack_code(uint8_t* row, int bits, int head_dim, int d, int code) {
  auto put = [](uint8_t& byte, int value, int shift) { byte = static_cast<uint8_t>(byte | value << shift); };
  if (bits == 8) {
    row[d] = static_cast<uint8_t>(code);
  } else if (bits == 4) {
    put(row[d / 2], code, d % 2 * 4);
  } else {
    if (bits == 5) {
      put(row[d / 2], code & 15, d % 2 * 4);
    } else {
      put(row[d / 4], code & 3, d % 4 * 2);
    }
    const int bit = high_plane_bit(bits, d, head_dim);
    put(row[high_plane_offset(bits, head_dim) + bit / 8], code >> (bits - 1), bit % 8);
  }
}

template <class T>
void reference_store(const Format& format, const PageLayout& layout, uint8_t* page, int kv_head, int token,
                     const float* key, const float* value) {
  uint8_t* atom = page + layout.atom_offset(kv_head, token);
  const int t = token % kAtomTokens;
  uint8_t* key_row = atom + layout.key_row_offset(t);
  uint8_t* value_row = atom + layout.value_row_offset(t);
  std::memset(key_row, 0, layout.key_row_bytes());
  std::memset(value_row, 0, layout.value_row_bytes());
  std::vector<uint8_t> codes(kMaxHeadDim);
  uint16_t norm, scale, zero;
  encode_key<T>(format, layout.head_dim, key, codes.data(), &norm);
  if (format.key_codec == KeyCodec::kF32) {
    std::memcpy(key_row, key, layout.key_row_bytes());
  } else {
    for (int d = 0; d < layout.head_dim; ++d) pack_code(key_row, layout.key_bits, layout.head_dim, d, codes[d]);
  }
  if (layout.has_key_norm) std::memcpy(atom + layout.key_norm_offset(t), &norm, sizeof(norm));
  encode_value<T>(format, layout.head_dim_v, value, codes.data(), &scale, &zero);
  if (format.value_codec == ValueCodec::kF32) {
    std::memcpy(value_row, value, layout.value_row_bytes());
  } else {
    for (int d = 0; d < layout.head_dim_v; ++d) pack_code(value_row, layout.value_bits, layout.head_dim_v, d, codes[d]);
    std::memcpy(atom + layout.value_scale_offset(t), &scale, sizeof(scale));
    if (layout.has_value_zero) std::memcpy(atom + layout.value_zero_offset(t), &zero, sizeof(zero));
  }
}

template <class T>
void reference_load(const Format& format, const PageLayout& layout, const uint8_t* page, int kv_head, int token,
                    T* key_out, T* value_out) {
  const uint8_t* atom = page + layout.atom_offset(kv_head, token);
  const int t = token % kAtomTokens;
  std::vector<uint8_t> codes(kMaxHeadDim);
  auto u16_at = [atom](int offset) {
    uint16_t bits;
    std::memcpy(&bits, atom + offset, sizeof(bits));
    return bits;
  };
  auto floats_at = [atom](int offset, int count, T* out) {
    for (int d = 0; d < count; ++d) {
      float x;
      std::memcpy(&x, atom + offset + 4 * d, sizeof(x));
      out[d] = x;
    }
  };
  if (key_out != nullptr) {
    const int offset = layout.key_row_offset(t);
    if (format.key_codec == KeyCodec::kF32) {
      floats_at(offset, layout.head_dim, key_out);
    } else {
      for (int d = 0; d < layout.head_dim; ++d) {
        codes[d] = static_cast<uint8_t>(unpack_code(atom + offset, layout.key_bits, layout.head_dim, d));
      }
      const uint16_t norm = layout.has_key_norm ? u16_at(layout.key_norm_offset(t)) : uint16_t{0};
      decode_key<T>(format, layout.head_dim, codes.data(), norm, key_out);
    }
  }
  if (value_out != nullptr) {
    const int offset = layout.value_row_offset(t);
    if (format.value_codec == ValueCodec::kF32) {
      floats_at(offset, layout.head_dim_v, value_out);
    } else {
      for (int d = 0; d < layout.head_dim_v; ++d) {
        codes[d] = static_cast<uint8_t>(unpack_code(atom + offset, layout.value_bits, layout.head_dim_v, d));
      }
      const uint16_t zero = layout.has_value_zero ? u16_at(layout.value_zero_offset(t)) : uint16_t{0};
      decode_value<T>(format, layout.head_dim_v, codes.data(), u16_at(layout.value_scale_offset(t)), zero, value_out);
    }
  }
}

template void reference_store<float>(const Format&, const PageLayout&, uint8_t*, int, int, const float*, const float*);
template void reference_store<double>(const Format&, const PageLayout&, uint8_t*, int, int, const float*, const float*);
template void reference_load<float>(const Format&, const PageLayout&, const uint8_t*, int, int, float*, float*);
template void reference_load<double>(const Format&, const PageLayout&, const uint8_t*, int, int, double*, double*);

}  // namespace tq
