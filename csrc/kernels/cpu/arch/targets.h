// targets.h - which instruction sets Highway compiles and dispatches over: SSE4 (the baseline on x86-64, by compiler
// flags in CMakeLists.txt), AVX2, AVX-512 and AVX-512 with VNNI (Highway's AVX3_DL); NEON on Arm. Scalable-vector
// targets are left out because the kernels keep vectors in arrays, and later AVX-512 variants because these kernels
// gain nothing from them.
#pragma once

#define HWY_WANT_AVX3_DL
#if defined(__aarch64__)
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#else
#define HWY_DISABLED_TARGETS \
  ((1LL << 4) | (1LL << 6) | HWY_SSSE3)  // AVX3_SPR, AVX3_ZEN4: unknown to Highway 1.0.3 by name
#endif
