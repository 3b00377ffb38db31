// device_book.h - a codebook as the kernels take it, by value: levels as bytes for byte permutes, and thresholds.
#pragma once

#include <cstdint>

#include "codec/lloyd_max.h"

namespace tq::gpu {

constexpr int kLevelOffset = 64;  // levels lie within +-63, so offset bytes are in [1, 127]: never a sign bit

struct DeviceBook {
  uint32_t bytes[4];    // level + 64 of code i in byte i
  uint32_t upper[4];    // of code 16 + i, where there are 32
  float unit;           // 1 / scale: a level's value in standard deviations
  float midpoints[15];  // of the positive half, ascending: codes of |x|
};

// null (codes that are no indices) gives zeros.
inline DeviceBook make_device_book(const Codebook* book) {
  DeviceBook out = {};
  if (book == nullptr) return out;
  for (int i = 0; i < book->num_levels; ++i) {
    uint32_t& word = i < 16 ? out.bytes[i / 4] : out.upper[i / 4 - 4];
    word |= static_cast<uint32_t>(book->levels[i] + kLevelOffset) << (8 * (i % 4));
  }
  out.unit = 1.0f / book->scale;
  const int half = book->num_levels / 2;  // codes on one side of zero
  for (int i = 0; i + 1 < half; ++i) out.midpoints[i] = book->midpoints[half + i];
  return out;
}

}  // namespace tq::gpu
