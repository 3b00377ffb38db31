// instances.h - the kernels of the HIP library: what kernels.hip defines, by the names that the host asks for.
#pragma once

// X(name, format of kernels/gpu/formats.h)
#define TQ_HIP_FORMATS(X) \
  X(k8v4, K8V4) X(k4v4, K4V4) X(k3v4, K3V4) X(k3v3, K3V3) X(tq8, Tq8) X(tqk5v4, TqK5V4) X(tq4, Tq4)
// X(format name, format, lanes of a vector of 16 dimensions each): store_<format>_<lanes>, dequant_<format>_<lanes>
#define TQ_HIP_LANES(X, name, F) X(name, F, 4) X(name, F, 8) X(name, F, 16) X(name, F, 32)
// X(format name, format, head dimension): attend_<format>_<dimension>
#define TQ_HIP_DIMS(X, name, F) X(name, F, 64) X(name, F, 128) X(name, F, 256) X(name, F, 512)
// Besides: rotate_<lanes>, merge, merge_rotated, copy_pages.
