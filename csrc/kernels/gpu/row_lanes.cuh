// row_lanes.cuh - one vector spread over kLanes neighbouring lanes, 16 dimensions each, and its Hadamard rotation.
//
// kLanes is a power of two >= dim / 16; lanes beyond the vector hold zeros. A rotation of a dimension that is not a
// power of two consists of blocks (codec/hadamard.h), each of which starts at a multiple of its size, so a lane takes
// part in the exchange of stride o exactly if its block spans more than o lanes.
#pragma once

#include "kernels/gpu/target.h"

namespace tq::gpu {

template <int kLanes, class T, class F>
TQ_DEVICE T reduce_row(T x, F f) {
#pragma unroll
  for (int o = 1; o < kLanes; o <<= 1) x = f(x, shuffle_xor(x, o));
  return x;
}

// Dimensions of the Hadamard block that holds dimensions [16 * lane, 16 * lane + 16) of a vector; 16 beyond its end.
TQ_DEVICE int hadamard_block_of(int lane, int dim) {
  int offset = 0, size = 16;
  while (offset < dim) {
    size = 1 << (31 - __clz(dim - offset));
    if (16 * lane < offset + size) return size;
    offset += size;
  }
  return 16;
}

// Where a vector lies otherwise: whether dimension d exchanges with d ^ stride, which it does in the blocks that are
// larger than stride and come first; and what makes the rotation of d < dim orthonormal.
TQ_DEVICE bool rotates_over(int d, int stride, int dim) { return d < (dim & -2 * stride); }
TQ_DEVICE float rotation_norm(int d, int dim) {
  return rsqrtf(static_cast<float>(1 << (31 - __clz(dim ^ d))));  // the first binary digit of dim that d has not
}

// x <- H x, unnormalised, in blocks. All lanes of the warp take part.
template <int kLanes>
TQ_DEVICE void hadamard_lanes(float (&x)[16], int lane, int block) {
#pragma unroll
  for (int o = 1; o < 16; o <<= 1) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if ((i & o) == 0) {
        const float a = x[i], b = x[i + o];
        x[i] = a + b;
        x[i + o] = a - b;
      }
    }
  }
#pragma unroll
  for (int o = 1; o < kLanes; o <<= 1) {
    const bool take = block > 16 * o;
    const bool upper = (lane & o) != 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float other = shuffle_xor(x[i], o);
      if (take) x[i] = upper ? other - x[i] : x[i] + other;
    }
  }
}

}  // namespace tq::gpu
