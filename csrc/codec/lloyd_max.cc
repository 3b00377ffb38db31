#include "codec/lloyd_max.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

namespace tq {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double pdf(double x) { return std::isinf(x) ? 0.0 : std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::numbers::pi); }

// P(a < X < b) of N(0, 1), by the complementary error function on the side where it does not cancel.
double mass(double a, double b) {
  if (a > 0) return 0.5 * (std::erfc(a / std::numbers::sqrt2) - std::erfc(b / std::numbers::sqrt2));
  return 0.5 * (std::erfc(-b / std::numbers::sqrt2) - std::erfc(-a / std::numbers::sqrt2));
}

// Integral of x^2 pdf(x) over (a, b): integration by parts.
double second_moment(double a, double b) {
  const double at_a = std::isinf(a) ? 0.0 : a * pdf(a);
  const double at_b = std::isinf(b) ? 0.0 : b * pdf(b);
  return mass(a, b) + at_a - at_b;
}

std::vector<double> midpoints_of(const std::vector<double>& centroids) {
  std::vector<double> mid(centroids.size() - 1);
  for (size_t i = 0; i + 1 < centroids.size(); ++i) mid[i] = (centroids[i] + centroids[i + 1]) / 2;
  return mid;
}

}  // namespace

double gaussian_mse(const std::vector<double>& centroids) {
  const std::vector<double> mid = midpoints_of(centroids);
  double mse = 0;
  for (size_t i = 0; i < centroids.size(); ++i) {
    const double a = i == 0 ? -kInf : mid[i - 1];
    const double b = i == mid.size() ? kInf : mid[i];
    const double c = centroids[i];
    mse += second_moment(a, b) - 2 * c * (pdf(a) - pdf(b)) + c * c * mass(a, b);
  }
  return mse;
}

LloydMax solve_lloyd_max(int bits) {
  const int n = 1 << bits;
  std::vector<double> c(n);
  for (int i = 0; i < n; ++i) c[i] = -3.5 + 7.0 * (i + 0.5) / n;
  double moved = 1;
  // The map contracts (the normal density is log-concave): steps shrink geometrically, down to rounding noise near
  // 1e-15.
  for (int step = 0; step < 1000000 && moved > 1e-13; ++step) {
    const std::vector<double> mid = midpoints_of(c);
    moved = 0;
    for (int i = 0; i < n; ++i) {
      const double a = i == 0 ? -kInf : mid[i - 1];
      const double b = i == n - 1 ? kInf : mid[i];
      const double mean = (pdf(a) - pdf(b)) / mass(a, b);
      moved = std::max(moved, std::fabs(mean - c[i]));
      c[i] = mean;
    }
  }
  return {c, midpoints_of(c), gaussian_mse(c)};
}

LloydMax solve_lloyd_max_like_vllm(int head_dim, int bits) {
  const int n = 1 << bits;
  const double variance = 1.0 / head_dim;
  const double sigma = std::sqrt(variance);
  auto density = [variance](double x) {
    return 1.0 / std::sqrt(2 * std::numbers::pi * variance) * std::exp(-x * x / (2 * variance));
  };
  auto trapezoid = [](auto&& f, double a, double b) {
    constexpr int kSteps = 200;
    const double h = (b - a) / kSteps;
    double sum = 0.5 * (f(a) + f(b));
    for (int i = 1; i < kSteps; ++i) sum += f(a + i * h);
    return sum * h;
  };
  const double lo = -3.5 * sigma;
  const double hi = 3.5 * sigma;
  std::vector<double> c(n);
  for (int i = 0; i < n; ++i) c[i] = lo + (hi - lo) * (i + 0.5) / n;
  for (int step = 0; step < 200; ++step) {
    const std::vector<double> mid = midpoints_of(c);
    std::vector<double> next(n);
    double moved = 0;
    for (int i = 0; i < n; ++i) {
      const double a = i == 0 ? lo * 3 : mid[i - 1];
      const double b = i == n - 1 ? hi * 3 : mid[i];
      const double den = trapezoid(density, a, b);
      next[i] = den > 1e-15 ? trapezoid([&](double x) { return x * density(x); }, a, b) / den : c[i];
      moved = std::max(moved, std::fabs(next[i] - c[i]));
    }
    if (moved < 1e-10) break;  // vLLM leaves before it takes the last step
    c = next;
  }
  // The error in units of the standard deviation, as solve_lloyd_max gives it.
  std::vector<double> unit = c;
  for (double& x : unit) x /= sigma;
  return {c, midpoints_of(c), gaussian_mse(unit)};
}

namespace {

// The rounding rule: for each scale on a grid of 1/100 such that the largest level is at most 63, round the centroids
// to the nearest integers; keep the scale with the least mean squared error.
Codebook round_to_grid(int bits) {
  const LloydMax exact = solve_lloyd_max(bits);
  const double largest = exact.centroids.back();
  Codebook best = {};
  double best_mse = kInf;
  for (int hundredths = 100; std::lround(largest * hundredths / 100.0) <= 63; ++hundredths) {
    const double scale = hundredths / 100.0;
    std::vector<double> rounded;
    rounded.reserve(exact.centroids.size());
    for (double c : exact.centroids) rounded.push_back(static_cast<double>(std::lround(c * scale)) / scale);
    const double mse = gaussian_mse(rounded);
    if (mse >= best_mse) continue;
    best_mse = mse;
    best.bits = bits;
    best.num_levels = 1 << bits;
    best.scale = static_cast<float>(scale);
    for (int i = 0; i < best.num_levels; ++i)
      best.levels[i] = static_cast<int8_t>(std::lround(exact.centroids[i] * scale));
    for (int i = 0; i + 1 < best.num_levels; ++i) {
      best.midpoints[i] = static_cast<float>((best.levels[i] + best.levels[i + 1]) / (2 * scale));
    }
  }
  return best;
}

}  // namespace

const Codebook& format_codebook(int bits) {
  static const Codebook three = round_to_grid(3);
  static const Codebook four = round_to_grid(4);
  static const Codebook five = round_to_grid(5);
  return bits == 3 ? three : bits == 4 ? four : five;
}

const Codebook* key_codebook(const Format& format) {
  return format.key_codec == KeyCodec::kLloydMax ? &format_codebook(format.key_bits) : nullptr;
}

const Codebook* value_codebook(const Format& format) {
  return format.value_codec == ValueCodec::kLloydMax ? &format_codebook(format.value_bits) : nullptr;
}

}  // namespace tq
