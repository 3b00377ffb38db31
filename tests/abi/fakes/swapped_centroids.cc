// swapped_centroids.cc - the real CPU kernels, but in every stored Lloyd-Max key the codes of two neighbouring
// centroids trade places. The smallest mistake a codebook can have; checks of quality and of exactness must fail with
// it.
#include <dlfcn.h>

#include "build_id.h"
#include "elf/build_note.h"
#include "kernels/kernels.h"
#include "layout/reference_page.h"

namespace {

const tq::KernelApi* real() {
  static const tq::KernelApi* api = [] {
    void* handle = dlopen(TQ_KERNELS_CPU_PATH, RTLD_NOW | RTLD_LOCAL);
    return reinterpret_cast<TqKernelsGetApi>(dlsym(handle, "tq_kernels_get_api"))();
  }();
  return api;
}

tq::KernelStatus store_kv(tq::DeviceState* state, const tq::StoreParams& p) {
  const tq::KernelStatus status = real()->store_kv(state, p);
  const tq::PageLayout& l = p.cache.layout;
  if (status.code != 0 || l.key_bits > 4) return status;
  const int a = 1 << (l.key_bits - 1);  // the first positive centroid, and the one above it
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    if (p.slot_mapping[i] < 0) continue;
    uint8_t* page = p.cache.data + p.slot_mapping[i] / l.block_size * p.cache.block_stride;
    const int token = static_cast<int>(p.slot_mapping[i] % l.block_size);
    for (int h = 0; h < l.num_kv_heads; ++h) {
      uint8_t* row = page + l.atom_offset(h, token) + l.key_row_offset(token % tq::kAtomTokens);
      uint8_t packed[tq::kMaxHeadDim] = {};
      for (int d = 0; d < l.head_dim; ++d) {
        const int code = tq::unpack_code(row, l.key_bits, l.head_dim, d);
        tq::pack_code(packed, l.key_bits, l.head_dim, d, code == a ? a + 1 : code == a + 1 ? a : code);
      }
      for (int b = 0; b < l.key_row_bytes(); ++b) row[b] = packed[b];
    }
  }
  return status;
}

}  // namespace

TQ_BUILD_NOTE(tq::kBuildId);

extern "C" __attribute__((visibility("default"))) const tq::KernelApi* tq_kernels_get_api() {
  static const tq::KernelApi api = [] {
    tq::KernelApi copy = *real();
    copy.store_kv = &store_kv;
    return copy;
  }();
  return &api;
}
