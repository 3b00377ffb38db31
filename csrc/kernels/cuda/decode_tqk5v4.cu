// decode_tqk5v4.cu - the decode kernels of one format.
#include "kernels/cuda/decode_instances.cuh"

namespace tq::cuda {

std::span<const DecodeInstance> decode_tqk5v4() {
  static const auto table = decode_table<TqK5V4>();
  return table;
}

}  // namespace tq::cuda
