// instances.h - the kernels that exist, as rows of hand-written tables; one .cu file per format and kernel fills one.
#pragma once

#include <span>

#include "kernels/cuda/decode_memory.h"
#include "kernels/gpu/formats.h"

namespace tq::cuda {

struct DecodeInstance {
  const void* function;  // decode_kernel<DecodeConfig<...>>
  int dim;
  bool exact;  // head_dim == head_dim_v == dim; otherwise both are at most dim
  DecodeTraits traits;
};

struct PrefillInstance {
  const void* function;  // prefill_kernel<PrefillConfig<...>>
  gpu::FormatTraits format;
  int dim;  // head_dim and head_dim_v are at most dim
  int rows, threads, shared_bytes;
};

struct RowInstance {  // store_kernel, dequant_kernel
  const void* function;
  gpu::FormatTraits format;
  int lanes;  // of a vector, 16 dimensions each
};

struct RotateInstance {  // rotate_kernel
  const void* function;
  int lanes;
};

std::span<const DecodeInstance> decode_k8v4();
std::span<const DecodeInstance> decode_k4v4();
std::span<const DecodeInstance> decode_k3v4();
std::span<const DecodeInstance> decode_k3v3();
std::span<const DecodeInstance> decode_tq8();
std::span<const DecodeInstance> decode_tqk5v4();
std::span<const DecodeInstance> decode_tq4();
std::span<const PrefillInstance> prefill_instances();
std::span<const RowInstance> store_instances();
std::span<const RowInstance> dequant_instances();
std::span<const RotateInstance> rotate_instances();
const void* copy_pages_function();

}  // namespace tq::cuda
