// decode_k8v4.cu - the decode kernels of one preset.
#include "kernels/cuda/decode_instances.cuh"

namespace tq::cuda {

std::span<const DecodeInstance> decode_k8v4() {
  static const auto table = decode_table<K8V4>();
  return table;
}

}  // namespace tq::cuda
