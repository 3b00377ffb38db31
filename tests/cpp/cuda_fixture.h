// cuda_fixture.h - the CUDA kernel library on this machine's GPU, and device copies of an attention case. Tests that
// use it are skipped, with the library's own reason, where there is no GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "attention_case.h"
#include "kernels/cuda/decode_memory.h"

namespace tq::testing {

inline const KernelApi& cuda_kernels() {
  static const KernelApi* api = [] {
    const char* path = std::getenv("TQ_TEST_CUDA_LIBRARY");
    void* handle = dlopen(path != nullptr ? path : TQ_KERNELS_CUDA_PATH, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      ADD_FAILURE() << dlerror();
      std::abort();
    }
    return reinterpret_cast<TqKernelsGetApi>(dlsym(handle, "tq_kernels_get_api"))();
  }();
  return *api;
}

// The names of all formats that are not for tests.
inline const std::vector<const char*>& served_formats() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> all;
    for (const Format& format : all_formats()) {
      if (!format.test_only) all.push_back(format.name);
    }
    return all;
  }();
  return names;
}

inline void cuda_ok(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

// A device copy of host bytes.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t size) : size_(size) { cuda_ok(cudaMalloc(&data_, size + 16)); }
  DeviceBytes(const void* from, size_t size) : DeviceBytes(size) { upload(from); }
  template <class T>
  explicit DeviceBytes(const std::vector<T>& from) : DeviceBytes(from.data(), from.size() * sizeof(T)) {}
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;

  // Has arrived when it returns, for any stream: a small copy of pageable memory may not have yet.
  void upload(const void* from) {
    cuda_ok(cudaMemcpy(data_, from, size_, cudaMemcpyHostToDevice));
    cuda_ok(cudaDeviceSynchronize());
  }
  void download(void* to) const { cuda_ok(cudaMemcpy(to, data_, size_, cudaMemcpyDeviceToHost)); }
  template <class T = void>
  T* get() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_;
};

class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const KernelStatus status = cuda_kernels().probe();
    if (status.code != 0) GTEST_SKIP() << status.message;
    const KernelStatus made = cuda_kernels().create(0, nullptr, &device);
    // A HIP library that is named (TQ_HIP_LIBRARY) is first asked here.
    const bool optional = std::getenv("TQ_HIP_LIBRARY") != nullptr && std::getenv("TQ_TEST_REQUIRE_DEVICE") == nullptr;
    if (made.code == 14 && optional) GTEST_SKIP() << made.message;
    ASSERT_EQ(made.code, 0) << made.message;
  }
  void TearDown() override {
    if (device != nullptr) {
      cuda_ok(cudaDeviceSynchronize());
      cuda_kernels().destroy(device);
    }
  }
  DeviceState* device = nullptr;
};

// A case with its buffers on the GPU.
class CudaCase {
 public:
  CudaCase(const Config& config, uint32_t seed, DeviceState* device)
      : host(config, seed),
        device_(device),
        bytes_(cuda_kernels().workspace_size(device, host.layout, config.num_heads)),
        pages_(host.pages.data(), static_cast<size_t>(host.num_blocks * host.stride)),
        query_(host.query),
        out_(host.out),
        lse_(host.lse),
        start_(host.start),
        lens_(host.c.seq_lens),
        table_(host.table),
        sinks_(host.sinks),
        slopes_(host.slopes),
        spans_(host.spans),
        workspace_(fresh_workspace(bytes_)) {}

  // As the kernels find it: zero where launches count, bytes that are NaN elsewhere, which they must not read.
  static std::vector<uint8_t> fresh_workspace(uint64_t bytes) {
    std::vector<uint8_t> workspace(bytes, 0xff);
    std::fill_n(workspace.begin(), std::min(bytes, cuda::kCounterBytes), uint8_t{0});
    return workspace;
  }

  AttendParams params() {
    AttendParams p = host.params(workspace_.get(), bytes_);
    p.cache.data = pages_.get<uint8_t>();
    p.query = query_.get();
    p.out = out_.get();
    p.query_start_loc = start_.get<int32_t>();
    p.seq_lens = lens_.get<int32_t>();
    p.block_table = table_.get<int32_t>();
    if (p.sinks != nullptr) p.sinks = sinks_.get<float>();
    if (p.alibi_slopes != nullptr) p.alibi_slopes = slopes_.get<float>();
    if (p.spans != nullptr) p.spans = spans_.get<int32_t>();
    p.lse = lse_.get<float>();
    return p;
  }

  // New lengths for the same buffers, none longer than before.
  void set_lengths(const std::vector<int>& query_lens, const std::vector<int>& seq_lens) {
    host.c.query_lens = query_lens;
    host.c.seq_lens = seq_lens;
    host.start = {0};
    for (int q : query_lens) host.start.push_back(host.start.back() + q);
    start_.upload(host.start.data());
    lens_.upload(host.c.seq_lens.data());
  }

  // In its own workspace, or another of at least its size.
  void run(cudaStream_t stream = nullptr, void* workspace = nullptr) {
    AttendParams p = params();
    p.stream = stream;
    if (workspace != nullptr) p.workspace = workspace;
    const KernelStatus status = cuda_kernels().attend(device_, p);
    ASSERT_EQ(status.code, 0) << status.message << " " << host.c.describe();
  }

  // Poisons the outputs, so that a row that is not written is seen.
  void poison() {
    std::fill(host.out.begin(), host.out.end(), 0xff);
    std::fill(host.lse.begin(), host.lse.end(), std::numeric_limits<float>::quiet_NaN());
    out_.upload(host.out.data());
    lse_.upload(host.lse.data());
  }

  void fetch() {
    cuda_ok(cudaDeviceSynchronize());
    out_.download(host.out.data());
    lse_.download(host.lse.data());
  }

  double run_and_compare() {
    run();
    fetch();
    return host.worst_error();
  }

  uint64_t workspace_bytes() const { return bytes_; }

  Case host;

 private:
  DeviceState* device_;
  uint64_t bytes_;
  DeviceBytes pages_, query_, out_, lse_, start_, lens_, table_, sinks_, slopes_, spans_, workspace_;
};

}  // namespace tq::testing
