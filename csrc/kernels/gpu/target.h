// target.h - what the shared kernel bodies are compiled for. A body is written in CUDA's words (threadIdx, fmaf, uint4,
// __syncthreads, ...) and, where devices differ, in the functions of a target: shuffles, permutes, dot products, fp16
// and bfloat16, matrix products. Each target defines all of them; a build names its target's header in TQ_GPU_TARGET.
//
// No body knows how many lanes a warp has: that is its template parameter kWave.
#pragma once

#if defined(TQ_GPU_TARGET)
#include TQ_GPU_TARGET
#else
#include "kernels/cuda/arch/target.cuh"
#endif
