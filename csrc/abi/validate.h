// validate.h - everything a caller can get wrong, checked before any memory but the argument structs is touched. Each
// failure is one sentence: the argument, what came, what is allowed.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>

#include "abi/error.h"
#include "codec/format.h"
#include "kernels/kernels.h"
#include "tq_backend.h"

namespace tq {

// A caller's struct of any age, as today's: fields beyond its struct_size are zero. required is the size of the first
// published version, below which the struct cannot be one.
template <class T>
Status read_struct(const char* name, const T* given, size_t required, T* out) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (given == nullptr) return invalid(std::string(name) + " is NULL; it must point to a struct");
  if (given->struct_size < required) {
    return invalid(std::string(name) + ".struct_size is " + std::to_string(given->struct_size) +
                   "; it must be at least " + std::to_string(required) + " (set it to sizeof before the call)");
  }
  std::memset(static_cast<void*>(out), 0, sizeof(T));
  std::memcpy(static_cast<void*>(out), given, given->struct_size < sizeof(T) ? given->struct_size : sizeof(T));
  return {};
}

// Copies today's struct into a caller's of any age and keeps the caller's struct_size.
template <class T>
Status write_struct(const char* name, const T& value, size_t required, T* out) {
  if (out == nullptr) return invalid(std::string(name) + " is NULL; it must point to a struct to fill");
  if (out->struct_size < required) {
    return invalid(std::string(name) + ".struct_size is " + std::to_string(out->struct_size) +
                   "; it must be at least " + std::to_string(required) + " (set it to sizeof before the call)");
  }
  const uint32_t size = out->struct_size;
  std::memcpy(static_cast<void*>(out), &value, size < sizeof(T) ? size : sizeof(T));
  out->struct_size = size;
  return {};
}

// A layer whose numbers are in range; head_dim_v is filled in.
struct CheckedLayer {
  TqLayerDesc desc;
  const Format* format;
};

// device_kind is where the call's tables live: on a CPU block tables and slots are checked too, on a GPU reading them
// would need a sync.
Status check_format(uint32_t format_id, const Format** out);
Status check_layer_desc(const TqLayerDesc* layer, CheckedLayer* out);
Status check_pages(const TqPages* pages, const CheckedLayer& layer, PagedCache* out);
Status check_store(const TqStoreKvArgs* args, bool host_tables, StoreParams* out);
Status check_attend(const TqAttendArgs* args, bool host_tables, AttendParams* out, CheckedLayer* layer);
Status check_dequant(const TqDequantKvArgs* args, bool host_tables, DequantParams* out);
Status check_copy(const TqCopyPagesArgs* args, bool host_tables, CopyParams* out);
Status check_rotate(const TqRotateArgs* args, RotateParams* out, CheckedLayer* layer);

}  // namespace tq
