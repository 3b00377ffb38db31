// scores.cuh - what happens to a score between q.k and the softmax, the same in every attention kernel. Scores are in
// log2 units (score * log2 e), so that weights are exp2.
#pragma once

#include "kernels/gpu/target.h"
#include "kernels/kernels.h"

namespace tq::gpu {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMasked = -1e38f;
constexpr float kLargest = 3.402823466e38f;

// Soft cap and ALiBi; slope is 0 without.
TQ_DEVICE float modify_score(float x, float soft_cap, float slope, int distance) {
  if (soft_cap > 0.0f) {
    const float cap = soft_cap * kLog2e;
    // cap * tanh(x / cap), through exp2; saturates without overflow
    const float e = exp2_approx(fminf(fmaxf(2.0f * kLog2e * divide_approx(x, cap), -60.0f), 60.0f));
    x = cap * (1.0f - divide_approx(2.0f, e + 1.0f));
  }
  return fmaf(slope * kLog2e, static_cast<float>(distance), x);
}

// Whether the query at position sees token, both counted from the sequence's start. spans: [max_spans, 2] of this
// sequence or null.
TQ_DEVICE bool visible(int position, int token, bool causal, int window, const int32_t* spans, int max_spans) {
  if ((!causal || token <= position) && (window <= 0 || token > position - window)) return true;
  if (spans != nullptr) {
    for (int i = 0; i < max_spans; ++i) {
      const int first = spans[2 * i], end = spans[2 * i + 1];
      if (position >= first && position < end && token >= first && token < end) return true;
    }
  }
  return false;
}

// Adds a row's sink to its softmax, of which reference is in log2 units and sum is relative to it. Returns the factor
// of the row's outputs. A sink of which no log2 is finite, as that of +inf, counts as the largest number: the row is
// zeros. A NaN stays one.
TQ_DEVICE float add_sink(float sink, float& reference, float& sum) {
  const float log2_sink = sink * kLog2e, finite = log2_sink > kLargest ? kLargest : log2_sink;
  const float higher = fmaxf(reference, finite);
  const float factor = exp2_approx(reference - higher);
  sum = fmaf(sum, factor, exp2_approx(finite - higher));
  reference = higher;
  return factor;
}

// The LSE of a row, log2_sum being that of its sum.
TQ_DEVICE float natural_lse(float reference, float sum, float log2_sum) {
  if (sum == 0.0f) return -INFINITY;
  return reference == kLargest ? kLargest : kLn2 * (reference + log2_sum);
}

}  // namespace tq::gpu
