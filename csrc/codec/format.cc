#include "codec/format.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

namespace tq {
namespace {

using enum NormRule;

constexpr std::array<Format, 8> kFormats = {{
    {kTurboquantK8V4, "turboquant_k8v4", KeyCodec::kFp8E4M3, 8, ValueCodec::kUniform, 4, kPreserving, false},
    {kTurboquant4BitNc, "turboquant_4bit_nc", KeyCodec::kLloydMax, 4, ValueCodec::kUniform, 4, kPreserving, false},
    {kTurboquantK3V4Nc, "turboquant_k3v4_nc", KeyCodec::kLloydMax, 3, ValueCodec::kUniform, 4, kPreserving, false},
    {kTurboquant3BitNc, "turboquant_3bit_nc", KeyCodec::kLloydMax, 3, ValueCodec::kUniform, 3, kPreserving, false},
    {kTq8, "tq_8", KeyCodec::kInteger, 8, ValueCodec::kLloydMax, 4, kUnbiased, false},
    {kTqK5V4, "tq_k5v4", KeyCodec::kLloydMax, 5, ValueCodec::kLloydMax, 4, kUnbiased, false},
    {kTq4, "tq_4", KeyCodec::kLloydMax, 4, ValueCodec::kLloydMax, 4, kUnbiased, false},
    {kRawF32, "raw_f32", KeyCodec::kF32, 32, ValueCodec::kF32, 32, kPreserving, true},
}};

// Levenshtein distance, one row at a time.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] != b[j - 1] ? 1 : 0);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row.back();
}

}  // namespace

std::span<const Format> all_formats() { return kFormats; }

const Format* find_format(uint32_t id) {
  for (const Format& format : kFormats) {
    if (format.id == id) return &format;
  }
  return nullptr;
}

const Format* find_format(std::string_view name) {
  for (const Format& format : kFormats) {
    if (name == format.name) return &format;
  }
  return nullptr;
}

const Format* nearest_format(std::string_view name) {
  const Format* nearest = nullptr;
  size_t least = SIZE_MAX;
  for (const Format& format : kFormats) {
    const std::string_view known = format.name;
    const size_t distance = edit_distance(name, known);
    // More than a third of the letters wrong is another name, not a misspelt one.
    if (format.test_only || distance >= least || 3 * distance > std::max(name.size(), known.size())) continue;
    nearest = &format;
    least = distance;
  }
  return nearest;
}

}  // namespace tq
