// rows.cu - the kernels that work on vectors one by one: store, dequantize, rotate, copy pages.
#include <array>

#include "kernels/gpu/atom.cuh"
#include "kernels/gpu/copy_pages.cuh"
#include "kernels/gpu/dequant.cuh"
#include "kernels/cuda/instances.h"
#include "kernels/gpu/store.cuh"

namespace tq::cuda {
namespace {

constexpr int kWarp = 32;

template <class F, int kLanes>
RowInstance store_instance() {
  return {reinterpret_cast<const void*>(&store_kernel<F, kLanes, kWarp>), gpu::traits_of<F>(), kLanes};
}
template <class F, int kLanes>
RowInstance dequant_instance() {
  return {reinterpret_cast<const void*>(&dequant_kernel<F, kLanes, kWarp>), gpu::traits_of<F>(), kLanes};
}
template <int kLanes>
RotateInstance rotate_instance() {
  return {reinterpret_cast<const void*>(&rotate_kernel<kLanes, kWarp>), kLanes};
}

// For vectors of up to 64, 128, 256 and 512 dimensions.
template <class... F>
auto store_table() {
  return std::array{store_instance<F, 4>()..., store_instance<F, 8>()..., store_instance<F, 16>()...,
                    store_instance<F, 32>()...};
}
template <class... F>
auto dequant_table() {
  return std::array{dequant_instance<F, 4>()..., dequant_instance<F, 8>()..., dequant_instance<F, 16>()...,
                    dequant_instance<F, 32>()...};
}

}  // namespace

std::span<const RowInstance> store_instances() {
  static const std::array table = store_table<K8V4, K4V4, K3V4, K3V3, Tq8, TqK5V4, Tq4>();
  return table;
}

std::span<const RowInstance> dequant_instances() {
  static const std::array table = dequant_table<K8V4, K4V4, K3V4, K3V3, Tq8, TqK5V4, Tq4>();
  return table;
}

std::span<const RotateInstance> rotate_instances() {
  static const std::array table = {rotate_instance<4>(), rotate_instance<8>(), rotate_instance<16>(),
                                   rotate_instance<32>()};
  return table;
}

const void* copy_pages_function() { return reinterpret_cast<const void*>(&copy_pages_kernel<kCopyThreads>); }

}  // namespace tq::cuda
