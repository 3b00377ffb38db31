// instances.h - the kernels that exist, as rows of hand-written tables; one .cu file per format and kernel fills one.
#pragma once

#include <cstdint>
#include <span>

namespace tq::cuda {

struct DecodeInstance {
  const void* function;  // decode_kernel<DecodeConfig<...>>
  int key_bits, value_bits;
  int dim;
  bool exact;   // head_dim == head_dim_v == dim; otherwise both are at most dim
  int columns;  // query columns of a row
  int atoms;    // of a tile
  int max_warps;
  int dump_pitch;     // floats of a column of a partial result
  int query_bytes;    // of shared memory, of a prepared row
  int query_vectors;  // that a warp prepares at once
};

struct PrefillInstance {
  const void* function;  // prefill_kernel<PrefillConfig<...>>
  int key_bits, value_bits;
  int dim;  // head_dim and head_dim_v are at most dim
  int rows, threads, shared_bytes;
};

struct RowInstance {  // store_kernel, dequant_kernel
  const void* function;
  int key_bits, value_bits;
  int lanes;  // of a vector, 16 dimensions each
};

std::span<const DecodeInstance> decode_k8v4();
std::span<const DecodeInstance> decode_k4v4();
std::span<const DecodeInstance> decode_k3v4();
std::span<const DecodeInstance> decode_k3v3();
std::span<const PrefillInstance> prefill_instances();
std::span<const RowInstance> store_instances();
std::span<const RowInstance> dequant_instances();
const void* copy_pages_function();

}  // namespace tq::cuda
