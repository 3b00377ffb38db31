// targets.h - which instruction sets Highway compiles and dispatches over: SSE4 (the baseline on x86-64, by compiler flags in
// CMakeLists.txt), AVX2 and AVX-512; NEON on Arm. Scalable-vector targets are left out because the kernels keep vectors in
// arrays, and AVX-512 variants that these kernels gain nothing from are left out to compile in half the time.
#pragma once

#if defined(__aarch64__)
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#else
#define HWY_DISABLED_TARGETS ((1LL << 4) | (1LL << 6) | (1LL << 7) | HWY_SSSE3)  // AVX3_SPR, AVX3_ZEN4, AVX3_DL
#endif
