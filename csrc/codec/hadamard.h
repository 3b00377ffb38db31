// hadamard.h - the rotation: Sylvester Hadamard in natural order, no sign flips, symmetric and its own inverse.
//
// A dimension that is not a power of two is rotated in blocks: its binary digits from the largest, e.g. 80 = 64 + 16,
// 112 = 64 + 32 + 16. (vLLM's in-tree rotation [[H, H], [H, -H]] / sqrt(D) serves powers of two only and is the same
// there.)
#pragma once

#include <bit>
#include <cmath>

namespace tq {

// Calls f(offset, size) for each power-of-two block of a rotation of dimension dim.
template <class F>
constexpr void for_each_hadamard_block(int dim, F&& f) {
  for (int offset = 0; offset < dim;) {
    const int size = static_cast<int>(std::bit_floor(static_cast<unsigned>(dim - offset)));
    f(offset, size);
    offset += size;
  }
}

// In-place butterflies of strides 1, 2, 4, ...: x <- H x, unnormalised, for one block.
template <class T>
void hadamard_block(T* x, int size) {
  for (int stride = 1; stride < size; stride *= 2) {
    for (int base = 0; base < size; base += 2 * stride) {
      for (int i = base; i < base + stride; ++i) {
        const T a = x[i];
        const T b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
  }
}

// x <- R x with R orthonormal, x[dim]. Applying it twice gives x back.
template <class T>
void rotate(T* x, int dim) {
  for_each_hadamard_block(dim, [x](int offset, int size) {
    hadamard_block(x + offset, size);
    const T norm = T(1) / std::sqrt(T(size));
    for (int i = offset; i < offset + size; ++i) x[i] *= norm;
  });
}

}  // namespace tq
