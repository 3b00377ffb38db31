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
  return {reinterpret_cast<const void*>(&store_kernel<F, kLanes, kWarp>), F::kKeyBits, F::kValueBits, kLanes};
}
template <class F, int kLanes>
RowInstance dequant_instance() {
  return {reinterpret_cast<const void*>(&dequant_kernel<F, kLanes, kWarp>), F::kKeyBits, F::kValueBits, kLanes};
}
template <int kLanes>
RotateInstance rotate_instance() {
  return {reinterpret_cast<const void*>(&rotate_kernel<kLanes, kWarp>), kLanes};
}

}  // namespace

std::span<const RowInstance> store_instances() {
  static const std::array table = {
      store_instance<K8V4, 4>(), store_instance<K8V4, 8>(), store_instance<K8V4, 16>(), store_instance<K8V4, 32>(),
      store_instance<K4V4, 4>(), store_instance<K4V4, 8>(), store_instance<K4V4, 16>(), store_instance<K4V4, 32>(),
      store_instance<K3V4, 4>(), store_instance<K3V4, 8>(), store_instance<K3V4, 16>(), store_instance<K3V4, 32>(),
      store_instance<K3V3, 4>(), store_instance<K3V3, 8>(), store_instance<K3V3, 16>(), store_instance<K3V3, 32>(),
  };
  return table;
}

std::span<const RowInstance> dequant_instances() {
  static const std::array table = {
      dequant_instance<K8V4, 4>(),  dequant_instance<K8V4, 8>(),  dequant_instance<K8V4, 16>(),
      dequant_instance<K8V4, 32>(), dequant_instance<K4V4, 4>(),  dequant_instance<K4V4, 8>(),
      dequant_instance<K4V4, 16>(), dequant_instance<K4V4, 32>(), dequant_instance<K3V4, 4>(),
      dequant_instance<K3V4, 8>(),  dequant_instance<K3V4, 16>(), dequant_instance<K3V4, 32>(),
      dequant_instance<K3V3, 4>(),  dequant_instance<K3V3, 8>(),  dequant_instance<K3V3, 16>(),
      dequant_instance<K3V3, 32>(),
  };
  return table;
}

std::span<const RotateInstance> rotate_instances() {
  static const std::array table = {rotate_instance<4>(), rotate_instance<8>(), rotate_instance<16>(),
                                   rotate_instance<32>()};
  return table;
}

const void* copy_pages_function() { return reinterpret_cast<const void*>(&copy_pages_kernel<kCopyThreads>); }

}  // namespace tq::cuda
