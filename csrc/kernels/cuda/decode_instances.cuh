// decode_instances.cuh - which decode kernels exist for each preset.
#pragma once

#include <array>

#include "kernels/cuda/choose.h"
#include "kernels/cuda/decode.cuh"

namespace tq::cuda {

template <class C>
DecodeInstance decode_instance() {
  constexpr int kAtomBytes = AtomShape<typename C::F, C::kDim, true>::kLayout.atom_bytes();  // the largest
  constexpr int kTuringLimit = 64 * 1024 - kStaticSharedBytes;
  static_assert(decode_shape(C::traits(), kAtomBytes, kTuringLimit, false).warps > 0, "no GPU may be too small");
  return {reinterpret_cast<const void*>(&decode_kernel<C>), C::kDim, C::kExact, C::traits()};
}

// Head dimensions with instances of their own, for up to 8 and up to 16 query columns; then one for each range of the
// others. Atoms per tile and warps are what fits the registers: 168 a thread with 12 warps, 255 with 8.
template <class F>
std::array<DecodeInstance, 10> decode_table() {
  return {
      decode_instance<DecodeConfig<F, 64, true, 1, 2, 12>>(),  decode_instance<DecodeConfig<F, 64, true, 2, 2, 8>>(),
      decode_instance<DecodeConfig<F, 128, true, 1, 2, 12>>(), decode_instance<DecodeConfig<F, 128, true, 2, 2, 8>>(),
      decode_instance<DecodeConfig<F, 256, true, 1, 1, 8>>(),  decode_instance<DecodeConfig<F, 256, true, 2, 1, 8>>(),
      decode_instance<DecodeConfig<F, 512, true, 1, 1, 8>>(),  decode_instance<DecodeConfig<F, 128, false, 1, 1, 8>>(),
      decode_instance<DecodeConfig<F, 256, false, 1, 1, 8>>(), decode_instance<DecodeConfig<F, 512, false, 1, 1, 8>>(),
  };
}

}  // namespace tq::cuda
