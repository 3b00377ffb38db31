#include "check/device_memory.h"

#include <dlfcn.h>
#include <fmt/core.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "tq_backend.h"

namespace tq::check {
namespace {

class HostMemory : public DeviceMemory {
 public:
  ~HostMemory() override { HostMemory::clear(); }
  void clear() override {
    for (void* p : held_) std::free(p);
    held_.clear();
  }
  void* allocate(size_t bytes) override {
    void* p = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (p == nullptr) throw std::runtime_error("host memory is exhausted");
    held_.push_back(p);
    return p;
  }
  void upload(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  std::vector<void*> held_;
};

// A driver's library and its functions, which all return 0 on success.
class DriverMemory : public DeviceMemory {
 public:
  struct Names {
    std::vector<const char*> libraries;
    const char *allocate, *free, *upload, *download, *synchronize;
  };

  explicit DriverMemory(const Names& names) : names_(names) {
    for (const char* name : names.libraries) {
      if (name != nullptr && *name != '\0' && library_ == nullptr) library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
    if (library_ == nullptr) throw std::runtime_error(fmt::format("there is no {}", names.libraries.back()));
  }
  ~DriverMemory() override { DriverMemory::clear(); }
  void clear() override {
    try_call(names_.synchronize);
    for (void* p : held_) try_call(names_.free, p);
    held_.clear();
  }
  void* allocate(size_t bytes) override {
    void* p = nullptr;
    call(names_.allocate, &p, bytes + 64);
    held_.push_back(p);
    return p;
  }
  void upload(void* to, const void* from, size_t bytes) override { call(names_.upload, to, from, bytes); }
  void download(void* to, const void* from, size_t bytes) override {
    call(names_.synchronize);
    call(names_.download, to, from, bytes);
  }

 protected:
  template <class... Args>
  int try_call(const char* name, Args... args) {
    const auto function = reinterpret_cast<int (*)(Args...)>(dlsym(library_, name));
    return function != nullptr ? function(args...) : -1;
  }
  template <class... Args>
  void call(const char* name, Args... args) {
    if (const int error = try_call(name, args...); error != 0) {
      throw std::runtime_error(fmt::format("{} failed with error {}", name, error));
    }
  }

 private:
  Names names_;
  void* library_ = nullptr;
  std::vector<void*> held_;
};

// The driver and not the runtime, which need not be installed: its context is the one that the runtime uses too.
class CudaMemory : public DriverMemory {
 public:
  CudaMemory()
      : DriverMemory({{"libcuda.so.1"},
                      "cuMemAlloc_v2",
                      "cuMemFree_v2",
                      "cuMemcpyHtoD_v2",
                      "cuMemcpyDtoH_v2",
                      "cuCtxSynchronize"}) {
    void* context = nullptr;
    call("cuInit", 0u);
    call("cuDevicePrimaryCtxRetain", &context, 0);
    call("cuCtxSetCurrent", context);
  }
};

}  // namespace

std::unique_ptr<DeviceMemory> make_device_memory(int device_kind) {
  if (device_kind == TQ_DEVICE_CUDA) return std::make_unique<CudaMemory>();
  if (device_kind == TQ_DEVICE_HIP) {
    return std::make_unique<DriverMemory>(
        DriverMemory::Names{{std::getenv("TQ_HIP_LIBRARY"), "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"},
                            "hipMalloc",
                            "hipFree",
                            "hipMemcpyHtoD",
                            "hipMemcpyDtoH",
                            "hipDeviceSynchronize"});
  }
  return std::make_unique<HostMemory>();
}

}  // namespace tq::check
