// Integrated Gradients of some neurons at a time as the factors of their streams, for CPU and CUDA; no torch header.
//
// Arrays are [gate and up][neurons]; dense neurons have the first row only. `Nodes` has count, point(k) and weight(k).
#pragma once

#include "activations.h"

// A loop over neurons that may not index registers.
#ifdef __CUDACC__
#define FFATTR_UNROLL _Pragma("unroll")
#else
#define FFATTR_UNROLL
#endif

namespace ffattr {

// By the exact rule, a path no longer than this is integrated: a quotient of differences would cancel.
constexpr double kNear = 1;

// From b to z by the points of a rule.
template <class Activation, bool gated, int Lanes, class T, class Nodes>
FFATTR_HD void quadrature(const Nodes& nodes, const T (&z)[2][Lanes], const T (&b)[2][Lanes], T (&out)[2][Lanes]) {
  T first[Lanes] = {}, second[Lanes] = {};
  for (int64_t k = 0; k < nodes.count; ++k) {
    const T at = nodes.point(k), w = nodes.weight(k);
    FFATTR_UNROLL
    for (int i = 0; i < Lanes; ++i) {
      const T u = b[0][i] + at * (z[0][i] - b[0][i]);
      if constexpr (gated) {
        first[i] += w * (Activation::derivative(u) * (b[1][i] + at * (z[1][i] - b[1][i])));
        second[i] += w * Activation::value(u);
      } else {
        first[i] += w * Activation::derivative(u);
      }
    }
  }
  FFATTR_UNROLL
  for (int i = 0; i < Lanes; ++i) {
    out[0][i] = first[i];
    if constexpr (gated) out[1][i] = second[i];
  }
}

// From zero to z.
template <class Activation, bool gated, int Lanes, class T>
FFATTR_HD void exact(const T (&z)[2][Lanes], T (&out)[2][Lanes]) {
  FFATTR_UNROLL
  for (int i = 0; i < Lanes; ++i) {
    if constexpr (gated) {
      const Pair2<T> factors = Activation::gated(z[0][i]);
      out[0][i] = factors.second * z[1][i];
      out[1][i] = factors.first;
    } else {
      out[0][i] = Activation::slope(z[0][i]);
    }
  }
}

template <class T>
FFATTR_HD bool is_short(T z, T b) {
  return magnitude(z - b) <= T(kNear);
}

// From b to z where that is not short: there `out` is kept.
template <class Activation, bool gated, int Lanes, class T>
FFATTR_HD void exact_if_long(const T (&z)[2][Lanes], const T (&b)[2][Lanes], T (&out)[2][Lanes]) {
  T kept[2][Lanes];  // in place, g++ would branch instead of selecting
  FFATTR_UNROLL
  for (int i = 0; i < Lanes; ++i) {
    kept[0][i] = out[0][i];
    if constexpr (gated) kept[1][i] = out[1][i];
  }
  FFATTR_UNROLL
  for (int i = 0; i < Lanes; ++i) {
    Pair2<T> factors;
    if constexpr (gated)
      factors = Activation::path(z[0][i], z[1][i], b[0][i], b[1][i]);
    else
      factors.first = Activation::rise(z[0][i], b[0][i]);
    const bool keep = !Activation::polynomial && is_short(z[0][i], b[0][i]);
    out[0][i] = keep ? kept[0][i] : factors.first;
    if constexpr (gated) out[1][i] = keep ? kept[1][i] : factors.second;
  }
}

// From b, which is zero if not `from_base`, to z. The exact rule comes with `nodes` for short paths.
template <class Activation, bool gated, int Lanes, class T, class Nodes>
FFATTR_HD void path_factors(bool is_exact, bool from_base, const Nodes& nodes, const T (&z)[2][Lanes],
                            const T (&b)[2][Lanes], T (&out)[2][Lanes]) {
  if (is_exact && !from_base) return exact<Activation, gated>(z, out);
  int integrated = is_exact ? 0 : 1;
  if (is_exact && !Activation::polynomial) {
    FFATTR_UNROLL
    for (int i = 0; i < Lanes; ++i) integrated |= is_short(z[0][i], b[0][i]) ? 1 : 0;
  }
  if (integrated != 0) quadrature<Activation, gated>(nodes, z, b, out);
  if (is_exact) exact_if_long<Activation, gated>(z, b, out);
}

}  // namespace ffattr
