// prefill.cu - the prefill kernels: all formats, four ranges of head dimensions.
#include "kernels/cuda/prefill.cuh"

#include <array>

#include "kernels/gpu/atom.cuh"
#include "kernels/cuda/instances.h"

namespace tq::cuda {
namespace {

template <class C>
PrefillInstance prefill_instance() {
  return {reinterpret_cast<const void*>(&prefill_kernel<C>),
          gpu::traits_of<typename C::F>(),
          C::kDim,
          C::kRows,
          C::kThreads,
          static_cast<int>(sizeof(PrefillShared<C>))};
}

// Row groups, value parts and tokens of a tile: what fits 255 registers and, up to 256 dimensions, 64 KiB.
template <class F>
std::array<PrefillInstance, 4> of_format() {
  return {prefill_instance<PrefillConfig<F, 64, 8, 1, 64>>(), prefill_instance<PrefillConfig<F, 128, 8, 1, 32>>(),
          prefill_instance<PrefillConfig<F, 256, 4, 2, 16>>(), prefill_instance<PrefillConfig<F, 512, 2, 4, 16>>()};
}

}  // namespace

std::span<const PrefillInstance> prefill_instances() {
  static const auto table = [] {
    std::array<PrefillInstance, 28> all;
    size_t n = 0;
    for (const auto& of : {of_format<K8V4>(), of_format<K4V4>(), of_format<K3V4>(), of_format<K3V3>(), of_format<Tq8>(),
                           of_format<TqK5V4>(), of_format<Tq4>()}) {
      for (const PrefillInstance& i : of) all[n++] = i;
    }
    return all;
  }();
  return table;
}

}  // namespace tq::cuda
