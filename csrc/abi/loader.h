// loader.h - finds a kernel library, opens it once and never closes it. The only dlopen of the project.
#pragma once

#include <string>

#include "abi/error.h"
#include "kernels/kernels.h"

namespace tq {

constexpr int kDeviceKinds[] = {TQ_DEVICE_CPU, TQ_DEVICE_CUDA, TQ_DEVICE_HIP};

const char* device_kind_name(int device_kind);  // "cpu", "cuda", "hip"

// The folder of kernel libraries: given, or if that is null $TQ_KERNELS_DIR, or else the one that libtq_backend.so lay
// in when it was loaded.
Status kernels_dir(const char* given, std::string* dir);

std::string kernel_library_path(const std::string& dir, int device_kind);

// Compares build ids and opens the library; of one with another build id no code runs. On success *api stays valid for
// the life of the process.
Status load_kernel_library(const std::string& path, int device_kind, const KernelApi** api);

// One kind of kernel library on this machine: found and asked for its device.
struct Candidate {
  int device_kind;
  std::string path;
  const KernelApi* kernels;  // null: it cannot be used or is not there
  Status status;             // OK if it is usable
  int score;                 // 0 if it is not usable
};
Candidate examine(const std::string& dir, int device_kind);

// The kind with the highest score; an error with all reasons if none is usable, or the one that TQ_DEVICE names is not.
Status choose_kind(const std::string& dir, int* device_kind);

}  // namespace tq
