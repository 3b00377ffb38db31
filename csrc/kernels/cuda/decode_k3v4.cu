// decode_k3v4.cu - the decode kernels of one preset.
#include "kernels/cuda/decode_instances.cuh"

namespace tq::cuda {

std::span<const DecodeInstance> decode_k3v4() {
  static const auto table = decode_table<K3V4>();
  return table;
}

}  // namespace tq::cuda
