// structs.h - the caller's structs, of any age: how they are read, filled and walked in arrays. Nothing else in the
// library may use sizeof of a public struct on a caller's memory: it is the library's size, not the caller's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "abi/error.h"
#include "tq_backend.h"

namespace tq {

// What header 1.0 had of a struct, and so the least that a caller can bring.
template <class T>
inline constexpr uint32_t kSize10 = 0;

// The last field of 1.0 and where it ends. A multiple of 8: a padding byte before the first appended field would belong
// to neither version, and could hold anything.
#define TQ_STRUCT(T, last, size)                                                  \
  static_assert(offsetof(T, last) + sizeof(decltype(T::last)) == (size));         \
  static_assert((size) % 8 == 0 && offsetof(T, struct_size) == 0);                \
  static_assert(std::is_trivially_copyable_v<T> && std::is_standard_layout_v<T>); \
  template <>                                                                     \
  inline constexpr uint32_t kSize10<T> = size
TQ_STRUCT(TqError, message, TQ_ERROR_SIZE_1_0);
TQ_STRUCT(TqFormatInfo, rotates_keys, TQ_FORMAT_INFO_SIZE_1_0);
TQ_STRUCT(TqCodebookArgs, reserved, TQ_CODEBOOK_ARGS_SIZE_1_0);
TQ_STRUCT(TqCodebook, num_levels, TQ_CODEBOOK_SIZE_1_0);
TQ_STRUCT(TqFakeQuantizeArgs, out, TQ_FAKE_QUANTIZE_ARGS_SIZE_1_0);
TQ_STRUCT(TqLayerDesc, soft_cap, TQ_LAYER_DESC_SIZE_1_0);
TQ_STRUCT(TqKvCacheSpec, bytes_per_token, TQ_KV_CACHE_SPEC_SIZE_1_0);
TQ_STRUCT(TqPlanLayer, state_bytes, TQ_PLAN_LAYER_SIZE_1_0);
TQ_STRUCT(TqPagePlan, padding_bytes, TQ_PAGE_PLAN_SIZE_1_0);
TQ_STRUCT(TqPlanRequest, reserved, TQ_PLAN_REQUEST_SIZE_1_0);
TQ_STRUCT(TqPlanSummary, longest_sequence, TQ_PLAN_SUMMARY_SIZE_1_0);
TQ_STRUCT(TqSkipRequest, num_skip_layers, TQ_SKIP_REQUEST_SIZE_1_0);
TQ_STRUCT(TqParallelFor, run, TQ_PARALLEL_FOR_SIZE_1_0);
TQ_STRUCT(TqBackendOptions, parallel_for, TQ_BACKEND_OPTIONS_SIZE_1_0);
TQ_STRUCT(TqCaps, device_name, TQ_CAPS_SIZE_1_0);
TQ_STRUCT(TqLibraryInfo, reason, TQ_LIBRARY_INFO_SIZE_1_0);
TQ_STRUCT(TqCounters, compressed_kv_reads, TQ_COUNTERS_SIZE_1_0);
TQ_STRUCT(TqPages, reserved, TQ_PAGES_SIZE_1_0);
TQ_STRUCT(TqStoreKvArgs, key_offset, TQ_STORE_KV_ARGS_SIZE_1_0);
TQ_STRUCT(TqAttendArgs, reserved, TQ_ATTEND_ARGS_SIZE_1_0);
TQ_STRUCT(TqDequantKvArgs, stream, TQ_DEQUANT_KV_ARGS_SIZE_1_0);
TQ_STRUCT(TqRotateArgs, stream, TQ_ROTATE_ARGS_SIZE_1_0);
TQ_STRUCT(TqCopyPagesArgs, stream, TQ_COPY_PAGES_ARGS_SIZE_1_0);
#undef TQ_STRUCT

// Far above what any struct will have. A larger struct_size was never set, and bytes up to it are not the caller's.
constexpr uint32_t kMaxStructSize = 4096;

template <class T>
Status check_struct_size(const std::string& name, const T* given) {
  static_assert(kSize10<T> != 0, "the struct has no row above");
  if (given == nullptr) return invalid(name + " is NULL; it must point to a struct with struct_size set");
  const uint32_t size = given->struct_size;
  if (size >= kSize10<T> && size <= kMaxStructSize && size % alignof(T) == 0) return {};
  return invalid(name + ".struct_size is " + std::to_string(size) + "; it must be the struct's sizeof, from " +
                 std::to_string(kSize10<T>) + " to " + std::to_string(kMaxStructSize) + ", set before the call");
}

// A caller's struct of any age as today's: fields beyond its struct_size are zero. What this library does not know must
// be zero too, or a field of a newer header would be dropped in silence.
template <class T>
Status read_struct(const std::string& name, const T* given, T* out) {
  if (Status s = check_struct_size(name, given); !s.ok()) return s;
  const uint32_t size = given->struct_size;
  std::memset(static_cast<void*>(out), 0, sizeof(T));
  std::memcpy(static_cast<void*>(out), given, size < sizeof(T) ? size : sizeof(T));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return invalid(name + " has something at byte " + std::to_string(i) + " and this library, header " +
                     std::to_string(TQ_ABI_MAJOR) + "." + std::to_string(TQ_ABI_MINOR) + ", knows the first " +
                     std::to_string(sizeof(T)) + " bytes; fields of a newer header must be zero");
    }
  }
  if constexpr (requires { out->reserved; }) {
    if (out->reserved != 0) {
      return invalid(name + ".reserved is " + std::to_string(out->reserved) + "; it must be 0");
    }
  }
  return {};
}

// Fills a caller's struct, which check_struct_size has passed, and keeps its struct_size. Fields of a newer header are
// left alone.
template <class T>
void write_struct(const T& value, T* out) {
  const uint32_t size = out->struct_size;
  std::memcpy(static_cast<void*>(out), &value, size < sizeof(T) ? size : sizeof(T));
  out->struct_size = size;
}

// A caller's array of structs: elements are as far apart as the caller's header says.
template <class T>
class Rows {
 public:
  // first may be null: no rows.
  static Status check(const std::string& name, T* first, int64_t number, Rows* out) {
    *out = {};
    if (first == nullptr || number == 0) return {};
    if (Status s = check_struct_size<std::remove_const_t<T>>(name + "[0]", first); !s.ok()) return s;
    *out = Rows(first, first->struct_size);
    for (int64_t i = 1; i < number; ++i) {
      const uint32_t size = (*out)[i]->struct_size;
      if (size != first->struct_size) {
        const std::string which = name + "[" + std::to_string(i) + "]";
        return invalid(which + ".struct_size is " + std::to_string(size) + "; it must be that of the first element, " +
                       std::to_string(first->struct_size));
      }
    }
    return {};
  }

  Rows() = default;
  bool empty() const { return first_ == nullptr; }
  T* operator[](int64_t i) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first_) + i * int64_t{stride_});
  }

 private:
  Rows(T* first, uint32_t stride) : first_(first), stride_(stride) {}
  T* first_ = nullptr;
  uint32_t stride_ = 0;
};

// The count convention: capacity in, number out; without out only the number.
inline Status check_capacity(const void* out, const int64_t* count, int64_t number, const char* what) {
  if (count == nullptr) return invalid("count is NULL; it must hold the capacity of out");
  if (out != nullptr && *count < number) {
    return invalid("*count is " + std::to_string(*count) + "; out must have room for " + std::to_string(number) + " " +
                   what);
  }
  return {};
}

}  // namespace tq
