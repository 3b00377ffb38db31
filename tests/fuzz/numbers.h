// numbers.h - the numbers that break arithmetic more often than random ones do.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <cstdint>
#include <limits>

namespace tq::fuzz {

inline int64_t number(FuzzedDataProvider& data) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  static constexpr int64_t kEdges[] = {
      0,           1,           -1,        2,         3,     15,    16,         17,
      48,          512,         513,       65535,     65536, 65537, 0x7fffffff, -0x80000000LL,
      0x100000000, 0x100000010, 1LL << 40, 1LL << 62, kMax,  ~kMax};
  switch (data.ConsumeIntegralInRange<int>(0, 3)) {
    case 0:
      return data.PickValueInArray(kEdges);
    case 1:
      return data.ConsumeIntegralInRange<int64_t>(0, 256);
    case 2:
      return int64_t{1} << data.ConsumeIntegralInRange<int>(0, 62);
    default:
      return data.ConsumeIntegral<int64_t>();
  }
}

// usual most of the time: with every field wrong, nothing but the first check is reached.
inline int64_t mostly(FuzzedDataProvider& data, int64_t usual) {
  return data.ConsumeIntegralInRange<int>(0, 7) == 0 ? number(data) : usual;
}

}  // namespace tq::fuzz
