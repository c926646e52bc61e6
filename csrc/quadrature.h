// Points and weights of the Integrated-Gradients rules on [0, 1], for every device; as
// ffattr.decomposition.integrated_gradients.nodes.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "common.h"

namespace ffattr {

template <class T>
struct Points {
  std::vector<T> a, weight;
};

// Nodes and weights on [0, 1] by Newton's method on the Legendre polynomial.
inline void gauss_legendre(int64_t count, std::vector<double>& a, std::vector<double>& weight) {
  double total = 0;
  for (int64_t i = count; i > 0; --i) {
    double x = std::cos(3.141592653589793 * (i - 0.25) / (count + 0.5)), slope = 1;
    for (int iteration = 0; iteration < 8; ++iteration) {
      double previous = 1, current = x;
      for (int64_t k = 2; k <= count; ++k) {
        const double next = ((2 * k - 1) * x * current - (k - 1) * previous) / k;
        previous = current;
        current = next;
      }
      slope = count * (x * current - previous) / (x * x - 1);
      x -= current / slope;
    }
    a.push_back((x + 1) / 2);
    weight.push_back(1 / ((1 - x * x) * slope * slope));
    total += weight.back();
  }
  for (double& w : weight) w /= total;
}

// No points for the exact rule.
template <class T>
Points<T> points_of(const std::string& rule, int64_t steps) {
  const bool gauss = rule == "gauss-legendre", trapezoid = rule == "trapezoid";
  FFATTR_CHECK(rule == "exact" || rule == "right" || rule == "left" || rule == "midpoint" || trapezoid || gauss,
               "ig_slope: unknown Integrated-Gradients rule '", rule,
               "', expected one of exact, right, left, midpoint, trapezoid, gauss-legendre");
  if (rule == "exact") return {};
  FFATTR_CHECK(steps >= (trapezoid ? 2 : 1), "ig_slope: the ", rule,
               " rule needs a number of steps >= ", trapezoid ? 2 : 1, ", got ", steps);
  const int64_t most = gauss ? 1 << 10 : 1 << 16;  // as in integrated_gradients.py, which says why
  FFATTR_CHECK(steps <= most, "ig_slope: the ", rule, " rule takes at most ", most, " steps, got ", steps);
  std::vector<double> a, weight;
  if (gauss) {
    gauss_legendre(steps, a, weight);
  } else {
    const double offset = rule == "right" ? 1 : rule == "midpoint" ? 0.5 : 0;
    const double intervals = static_cast<double>(trapezoid ? steps - 1 : steps);
    for (int64_t k = 0; k < steps; ++k) {
      a.push_back((k + offset) / intervals);
      weight.push_back((trapezoid && (k == 0 || k == steps - 1) ? 0.5 : 1) / intervals);
    }
  }
  return {{a.begin(), a.end()}, {weight.begin(), weight.end()}};
}

// Those of the exact rule's short paths: the error of n nodes on a path of length 1 is about 6.4^-2n for tanh, whose
// poles are the nearest.
template <class T>
Points<T> near_points() {
  return points_of<T>("gauss-legendre", sizeof(T) == sizeof(float) ? 6 : 12);
}

}  // namespace ffattr
