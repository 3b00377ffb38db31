// lloyd_max.h - the Lloyd-Max scalar quantizer of a standard normal variable, and the codebooks of the formats.
//
// After a random rotation each coordinate of a unit vector of dimension D follows N(0, 1/D) closely (arXiv 2504.19874,
// Section 3.1), so the optimal scalar quantizer of N(0, 1), scaled by 1/sqrt(D), is the optimal codebook (Eq. 4 there).
#pragma once

#include <cstdint>
#include <vector>

#include "codec/format.h"

namespace tq {

struct LloydMax {
  std::vector<double> centroids;  // ascending, 2^bits
  std::vector<double> midpoints;  // 2^bits - 1 decision thresholds
  double mse;                     // E[(x - Q(x))^2] of N(0, 1)
};

// The optimum, by exact integrals of the normal density (erf and exp), iterated to a fixed point: a centroid is the
// mean of its cell to better than 1e-9. bits in [1, 8].
LloydMax solve_lloyd_max(int bits);

// vLLM's own discretisation of the same problem (centroids.py, 0.32: trapezoids of 200 steps, edges at +-10.5 sigma, at
// most 200 iterations, tolerance 1e-10), for N(0, 1/head_dim). Reproduces get_centroids(head_dim, bits) to 1e-6; used
// only to compare with and to read vLLM's own pages.
LloydMax solve_lloyd_max_like_vllm(int head_dim, int bits);

// Mean squared error over N(0, 1) of the symmetric or asymmetric quantizer with these ascending centroids and nearest
// assignment.
double gaussian_mse(const std::vector<double>& centroids);

// A format's codebook: the Lloyd-Max optimum rounded to a 7-bit integer grid, levels[i] / scale, |level| <= 63. The
// scale is the one that minimises gaussian_mse of the rounded table over a documented search; midpoints are those of
// the rounded table. Byte permutes and integer matrix units can use it as is, and encode and decode share it: there is
// no second truth.
struct Codebook {
  int bits;
  int num_levels;
  float scale;
  int8_t levels[32];
  float midpoints[31];  // (levels[i] + levels[i+1]) / (2 * scale)
};

// bits is 3, 4 or 5. Computed once, on first use.
const Codebook& format_codebook(int bits);

// Of a format's keys and of its values; null where codes are not indices of one.
const Codebook* key_codebook(const Format& format);
const Codebook* value_codebook(const Format& format);

}  // namespace tq
