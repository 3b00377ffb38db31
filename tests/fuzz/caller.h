// caller.h - what a caller owns: structs of any size and arrays, each in memory of exactly its own, so that the address
// sanitizer sees every byte that is read or written beyond them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "numbers.h"

namespace tq::fuzz {

constexpr int64_t kMostBytes = 1 << 20;  // of one array; a caller that cannot have it passes NULL

// Zeroed memory of exactly so many bytes at an aligned address; null for a size that no caller has here.
class Memory {
 public:
  explicit Memory(__int128 bytes, size_t alignment = 64) {
    if (bytes > kMostBytes) return;
    const size_t size = bytes > 0 ? static_cast<size_t>(bytes) : 0;
    void* at = nullptr;
    if (posix_memalign(&at, alignment, size) != 0) std::abort();
    if (size > 0) std::memset(at, 0, size);
    bytes_.reset(static_cast<char*>(at));
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(bytes_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> bytes_;
};

// Changes up to three numbers of a struct, before its pointers are set.
template <class T>
void spoil(FuzzedDataProvider& data, T* value) {
  for (int n = data.ConsumeIntegralInRange<int>(0, 3); n > 0; --n) {
    const auto at = 4 * data.ConsumeIntegralInRange<size_t>(0, sizeof(T) / 4 - 1);
    const int64_t x = number(data);
    const size_t size = at % 8 == 0 && at + 8 <= sizeof(T) && data.ConsumeBool() ? 8 : 4;
    std::memcpy(reinterpret_cast<char*>(value) + at, &x, size);
  }
}

// The size that a caller of some age gives its struct. In an array it keeps the next one aligned, as sizeof does.
inline uint32_t struct_size(FuzzedDataProvider& data, size_t today, size_t multiple) {
  if (data.ConsumeIntegralInRange<int>(0, 3) != 0) return static_cast<uint32_t>(today);
  const auto size = data.ConsumeIntegralInRange<size_t>(0, today + 40);
  return static_cast<uint32_t>(size / multiple * multiple);
}

// An array of structs as a caller of some age has it: all of one size, and bytes beyond today's zero or not.
template <class T>
class Structs {
 public:
  Structs(FuzzedDataProvider& data, const std::vector<T>& values)
      : size_(struct_size(data, sizeof(T), values.size() > 1 ? alignof(T) : 1)),
        stride_(std::max<size_t>(size_, 4)),
        memory_(stride_ * values.size(), 8) {
    const bool dirty = data.ConsumeIntegralInRange<int>(0, 7) == 0;
    for (size_t i = 0; i < values.size(); ++i) {
      char* at = memory_.template as<char>() + i * stride_;
      std::memset(at, dirty ? 1 : 0, stride_);
      std::memcpy(at, &values[i], std::min(stride_, sizeof(T)));
      std::memcpy(at, &size_, 4);
    }
    bytes_ = stride_ * values.size();
  }
  T* get() const { return memory_.template as<T>(); }
  std::vector<char> copy() const { return {memory_.template as<char>(), memory_.template as<char>() + bytes_}; }

 private:
  uint32_t size_;
  size_t stride_;
  Memory memory_;
  size_t bytes_;
};

template <class T>
class Struct : public Structs<T> {
 public:
  Struct(FuzzedDataProvider& data, const T& value) : Structs<T>(data, std::vector<T>{value}) {}
};

}  // namespace tq::fuzz
