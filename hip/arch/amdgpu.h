// amdgpu.h - the target of kernels/gpu/target.h in a build for AMD GPUs.
#pragma once

#include "hip/arch/words.h"
// Behind the words that it is written in.
#include "hip/arch/target.h"
