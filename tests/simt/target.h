// target.h - the target of kernels/gpu/target.h in the model: AMD's own, over modelled builtins.
#pragma once

#include "simt/words.h"
// Behind the words.
#include "simt/amdgpu.h"
// Behind both.
#include "hip/arch/target.h"
