// device_memory.h - memory of a CPU, CUDA or HIP device, through the driver's own library, which is opened by name.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace tq::check {

class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  // All of these throw std::runtime_error with a sentence. Memory is freed with the object, or by clear.
  virtual void* allocate(size_t bytes) = 0;
  virtual void clear() = 0;
  virtual void upload(void* to, const void* from, size_t bytes) = 0;
  // Waits for what was enqueued before.
  virtual void download(void* to, const void* from, size_t bytes) = 0;

  template <class T>
  T* put(const std::vector<T>& from) {
    const size_t bytes = from.size() * sizeof(T);
    auto* to = static_cast<T*>(allocate(bytes));
    if (bytes > 0) upload(to, from.data(), bytes);
    return to;
  }
  template <class T>
  std::vector<T> get(const void* from, size_t count) {
    std::vector<T> out(count);
    if (count > 0) download(out.data(), from, count * sizeof(T));
    return out;
  }
};

// device_kind: TqDeviceKind, not AUTO.
std::unique_ptr<DeviceMemory> make_device_memory(int device_kind);

}  // namespace tq::check
