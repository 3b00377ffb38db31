// kernels.hip - the entry points of the HIP kernels: shared bodies (csrc/kernels/gpu), instantiated for the wave that
// this file is compiled for.
#include "hip/instances.h"
#include "kernels/gpu/atom.cuh"
#include "kernels/gpu/attend.cuh"
#include "kernels/gpu/copy_pages.cuh"
#include "kernels/gpu/dequant.cuh"
#include "kernels/gpu/store.cuh"

using namespace tq::gpu;

// What the host has to know of the code that the runtime chose.
TQ_CONSTANT(int, tq_wave_size, kTargetWave);

#define TQ_STORE(name, F, lanes) \
  TQ_ENTRY(tq_store_##name##_##lanes, kStoreThreads, StoreArgs) { store_kernel<F, lanes, kTargetWave>(p); }
#define TQ_DEQUANT(name, F, lanes) \
  TQ_ENTRY(tq_dequant_##name##_##lanes, kDequantThreads, DequantArgs) { dequant_kernel<F, lanes, kTargetWave>(p); }
#define TQ_ATTEND(name, F, dim)                                               \
  TQ_ENTRY(tq_attend_##name##_##dim, kAttendWarps* kTargetWave, AttendArgs) { \
    attend_kernel<AttendConfig<F, dim, kTargetWave>>(p);                      \
  }
#define TQ_FORMAT(name, F) \
  TQ_HIP_LANES(TQ_STORE, name, F) TQ_HIP_LANES(TQ_DEQUANT, name, F) TQ_HIP_DIMS(TQ_ATTEND, name, F)
TQ_HIP_FORMATS(TQ_FORMAT)

TQ_ENTRY(tq_rotate_4, kRotateThreads, RotateArgs) { rotate_kernel<4, kTargetWave>(p); }
TQ_ENTRY(tq_rotate_8, kRotateThreads, RotateArgs) { rotate_kernel<8, kTargetWave>(p); }
TQ_ENTRY(tq_rotate_16, kRotateThreads, RotateArgs) { rotate_kernel<16, kTargetWave>(p); }
TQ_ENTRY(tq_rotate_32, kRotateThreads, RotateArgs) { rotate_kernel<32, kTargetWave>(p); }
TQ_ENTRY(tq_merge, kMergeThreads, MergeArgs) { merge_kernel<kTargetWave, false>(p); }
TQ_ENTRY(tq_merge_rotated, kMergeThreads, MergeArgs) { merge_kernel<kTargetWave, true>(p); }
TQ_ENTRY(tq_copy_pages, kCopyThreads, tq::CopyParams) { copy_pages_kernel<kCopyThreads>(p); }
