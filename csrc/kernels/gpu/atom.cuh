// atom.cuh - a page layout as a kernel sees it: constants where the head dimension is one that has its own instance.
#pragma once

#include "kernels/gpu/target.h"
#include "kernels/gpu/formats.h"

namespace tq::gpu {

// kExact: head_dim == head_dim_v == kDim, all offsets are constants. Otherwise both are at most kDim and known at run
// time.
template <class F, int kDim, bool kExact>
struct AtomShape;

template <class F, int kDim>
struct AtomShape<F, kDim, true> {
  static constexpr PageLayout kLayout{
      F::kKeyBits, F::kValueBits, F::kRotatesKeys, true, !F::kRotatesValues, kDim, kDim, 1, 16};
  TQ_DEVICE explicit AtomShape(const PageLayout&) {}
  TQ_DEVICE static constexpr int head_dim() { return kDim; }
  TQ_DEVICE static constexpr int head_dim_v() { return kDim; }
  TQ_DEVICE static constexpr int key_row_bytes() { return kLayout.key_row_bytes(); }
  TQ_DEVICE static constexpr int value_row_bytes() { return kLayout.value_row_bytes(); }
  TQ_DEVICE static constexpr int value_offset() { return kLayout.value_row_offset(0); }
  TQ_DEVICE static constexpr int norm_offset() { return kLayout.key_norm_offset(0); }
  TQ_DEVICE static constexpr int scale_offset() { return kLayout.value_scale_offset(0); }
  TQ_DEVICE static constexpr int zero_offset() { return kLayout.value_zero_offset(0); }
  TQ_DEVICE static constexpr int atom_bytes() { return kLayout.atom_bytes(); }
};

template <class F, int kDim>
struct AtomShape<F, kDim, false> {
  int dim, dim_v, key_row, value_row, values, norms, scales, zeros, bytes;
  TQ_DEVICE explicit AtomShape(const PageLayout& l)
      : dim(l.head_dim),
        dim_v(l.head_dim_v),
        key_row(l.key_row_bytes()),
        value_row(l.value_row_bytes()),
        values(l.value_row_offset(0)),
        norms(l.key_norm_offset(0)),
        scales(l.value_scale_offset(0)),
        zeros(l.value_zero_offset(0)),
        bytes(l.atom_bytes()) {}
  TQ_DEVICE int head_dim() const { return dim; }
  TQ_DEVICE int head_dim_v() const { return dim_v; }
  TQ_DEVICE int key_row_bytes() const { return key_row; }
  TQ_DEVICE int value_row_bytes() const { return value_row; }
  TQ_DEVICE int value_offset() const { return values; }
  TQ_DEVICE int norm_offset() const { return norms; }
  TQ_DEVICE int scale_offset() const { return scales; }
  TQ_DEVICE int zero_offset() const { return zeros; }
  TQ_DEVICE int atom_bytes() const { return bytes; }
};

}  // namespace tq::gpu
