// rows.cu - the kernels that work on vectors one by one: store, dequantize, rotate, copy pages.
#include <array>

#include "kernels/cuda/atom.cuh"
#include "kernels/cuda/dequant.cuh"
#include "kernels/cuda/instances.h"
#include "kernels/cuda/store.cuh"

namespace tq::cuda {
namespace {

template <class F, int kLanes>
RowInstance store_instance() {
  return {reinterpret_cast<const void*>(&store_kernel<F, kLanes>), F::kKeyBits, F::kValueBits, kLanes};
}
template <class F, int kLanes>
RowInstance dequant_instance() {
  return {reinterpret_cast<const void*>(&dequant_kernel<F, kLanes>), F::kKeyBits, F::kValueBits, kLanes};
}
template <int kLanes>
RotateInstance rotate_instance() {
  return {reinterpret_cast<const void*>(&rotate_kernel<kLanes>), kLanes};
}

__global__ void __launch_bounds__(256) copy_pages_kernel(const __grid_constant__ CopyParams p) {
  wait_for_previous_grid();
  const int64_t from = p.src_dst[2 * blockIdx.x], to = p.src_dst[2 * blockIdx.x + 1];
  if (from < 0 || to < 0 || from >= p.cache.num_blocks || to >= p.cache.num_blocks) return;
  const auto* source = reinterpret_cast<const uint4*>(p.cache.data + from * p.cache.block_stride);
  auto* target = reinterpret_cast<uint4*>(p.cache.data + to * p.cache.block_stride);
  const int64_t count = p.cache.layout.page_bytes() / 16;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.y} * blockDim.x) {
    target[i] = source[i];
  }
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

const void* copy_pages_function() { return reinterpret_cast<const void*>(&copy_pages_kernel); }

}  // namespace tq::cuda
