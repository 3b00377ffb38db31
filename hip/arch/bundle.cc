#include "hip/arch/bundle.h"

// The section that ROCm's own compiler uses, so that its tools find the code in this library.
asm(R"(
.section .hip_fatbin, "a", @progbits
.p2align 12
.globl tq_hip_bundle
.hidden tq_hip_bundle
tq_hip_bundle:
.incbin ")" TQ_HIP_BUNDLE R"("
.previous
)");

extern "C" const char tq_hip_bundle[];

namespace tq::hip {

const void* bundle() { return tq_hip_bundle; }

}  // namespace tq::hip
