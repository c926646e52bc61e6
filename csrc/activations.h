// Feed-forward activations and their path integrals (Integrated Gradients), for CPU and CUDA; no torch header.
// The formulas are those of ffattr/decomposition/closed_forms.py and ffattr/decomposition/activations.py, where they
// are derived. Relative error in float: below 3e-7, left tails of GELU z^2 times that.
#pragma once

#include "gates.h"

namespace ffattr {

// Factors of a piecewise linear path, exact at any distance.
template <class T>
FFATTR_HD T relu_rise(T z, T b) {
  const T quotient = (positive(z) - positive(b)) / (z - b), at = step(z);
  return z == b ? at : quotient;
}

// The up stream at both ends of the part of the path on which the gate is positive.
template <class T>
FFATTR_HD Pair2<T> positive_ends(T u, T v, T u0, T v0) {
  const T span = u - u0, crossing = v0 * (u / span) - v * (u0 / span);
  return {u0 > 0 ? v0 : crossing, u > 0 ? v : crossing};
}

template <class T>
FFATTR_HD Pair2<T> relu_path(T u, T v, T u0, T v0) {
  const T share = relu_rise(u, u0);
  const Pair2<T> ends = positive_ends(u, v, u0, v0);
  const T c_u = share * (ends.first + ends.second) / 2;
  return {share == 0 ? share : c_u, share * (positive(u0) + positive(u)) / 2};
}

// An activation g has
//   value, derivative, slope (g(z) - g(0)) / z;
//   gated(u): (integral_0^1 g(a u) da, integral_0^1 a g'(a u) da);
//   rise(z, b): (g(z) - g(b)) / (z - b), path(u, v, u0, v0): (C_u, C_v), for |z - b| >= 1, anywhere if `polynomial`.

struct Relu {
  static constexpr bool polynomial = true;
  template <class T>
  static FFATTR_HD T value(T z) {
    return positive(z);
  }
  template <class T>
  static FFATTR_HD T derivative(T z) {
    return step(z);
  }
  template <class T>
  static FFATTR_HD T slope(T z) {
    return step(z);
  }
  template <class T>
  static FFATTR_HD Pair2<T> gated(T u) {
    return {positive(u) / 2, step(u) / 2};
  }
  template <class T>
  static FFATTR_HD T rise(T z, T b) {
    return relu_rise(z, b);
  }
  template <class T>
  static FFATTR_HD Pair2<T> path(T u, T v, T u0, T v0) {
    return relu_path(u, v, u0, v0);
  }
};

struct Relu2 {
  static constexpr bool polynomial = true;
  template <class T>
  static FFATTR_HD T value(T z) {
    return positive(z) * positive(z);
  }
  template <class T>
  static FFATTR_HD T derivative(T z) {
    return 2 * positive(z);
  }
  template <class T>
  static FFATTR_HD T slope(T z) {
    return positive(z);
  }
  template <class T>
  static FFATTR_HD Pair2<T> gated(T u) {
    return {positive(u) * positive(u) / 3, positive(u) * 2 / 3};
  }
  template <class T>
  static FFATTR_HD T rise(T z, T b) {
    return relu_rise(z, b) * (positive(z) + positive(b));
  }
  template <class T>
  static FFATTR_HD Pair2<T> path(T u, T v, T u0, T v0) {
    const T share = relu_rise(u, u0), p = positive(u0), q = positive(u);
    const Pair2<T> ends = positive_ends(u, v, u0, v0);
    const T c_u = share * (p * (2 * ends.first + ends.second) + q * (ends.first + 2 * ends.second)) / 3;
    return {share == 0 ? share : c_u, share * (p * p + p * q + q * q) / 3};
  }
};

// g(z) = z s(z) with s(z) + s(-z) = 1; Form has s, s' and the moment integral_0^1 a s(a u) da.
template <class Form>
struct SelfGated {
  static constexpr bool polynomial = false;
  template <class T>
  static FFATTR_HD T value(T z) {
    return z * Form::slope(z);
  }
  template <class T>
  static FFATTR_HD T derivative(T z) {
    return Form::slope(z) + z * Form::slope_derivative(z);
  }
  template <class T>
  static FFATTR_HD T slope(T z) {
    return Form::slope(z);
  }
  template <class T>
  static FFATTR_HD Pair2<T> gated(T u) {
    const T moment = Form::moment(u);
    return {u * moment, Form::slope(u) - moment};
  }
  // What remains of g after ReLU: bounded, so that differences between large arguments lose no digits.
  template <class T>
  static FFATTR_HD T tail(T z) {
    return -magnitude(z) * Form::slope(-magnitude(z));
  }
  template <class T>
  static FFATTR_HD T tail_integral(T z) {
    return -z * magnitude(z) * Form::moment(-magnitude(z));
  }
  template <class T>
  static FFATTR_HD T rise(T z, T b) {
    return relu_rise(z, b) + (tail(z) - tail(b)) / (z - b);
  }
  template <class T>
  static FFATTR_HD Pair2<T> path(T u, T v, T u0, T v0) {
    const Pair2<T> relu = relu_path(u, v, u0, v0);
    const T mean = (tail_integral(u) - tail_integral(u0)) / (u - u0);
    const T by_parts = (tail(u) * v - tail(u0) * v0 - (v - v0) * mean) / (u - u0);
    return {relu.first + by_parts, relu.second + mean};
  }
};

using Gelu = SelfGated<GeluForm>;
using GeluTanh = SelfGated<GeluTanhForm>;
using QuickGelu = SelfGated<QuickGeluForm>;
using Silu = SelfGated<SiluForm>;

struct Tanh {
  static constexpr bool polynomial = false;
  template <class T>
  static FFATTR_HD T value(T z) {
    return tanh_of(z);
  }
  template <class T>
  static FFATTR_HD T derivative(T z) {
    return 4 * logistic_derivative(2 * z);
  }
  template <class T>
  static FFATTR_HD T slope(T z) {
    const T quotient = tanh_of(z) / z, limit = 1 - z * z / 3;
    return magnitude(z) < T(1e-5) ? limit : quotient;
  }
  // log cosh; log(1 + e) where |z| < 1 keeps the relative error of its small values.
  template <class T>
  static FFATTR_HD T log_cosh(T z) {
    const T x = magnitude(z), bounded = x < 1 ? x : T(1), s = sinh_unit(bounded / 2);
    const T large = (x - T(0.6931471805599453)) + log1p_unit(exp_down(-2 * x)), small = log1p_unit(2 * s * s);
    return x < 1 ? small : large;
  }
  template <class T>
  static FFATTR_HD Pair2<T> gated(T u) {
    const T quotient = log_cosh(u) / u, by_parts = (tanh_of(u) - quotient) / u;
    const T half = u / 2, limit = T(0.5) - u * u / 4;
    const bool small = magnitude(u) < T(1e-5);
    return {small ? half : quotient, small ? limit : by_parts};
  }
  template <class T>
  static FFATTR_HD T rise(T z, T b) {
    return (tanh_of(z) - tanh_of(b)) / (z - b);
  }
  template <class T>
  static FFATTR_HD Pair2<T> path(T u, T v, T u0, T v0) {
    const T x = magnitude(u), x0 = magnitude(u0);
    const T near = log1p_unit(exp_down(-2 * x)) - log1p_unit(exp_down(-2 * x0));
    const T mean = ((x - x0) + near) / (u - u0);
    return {(tanh_of(u) * v - tanh_of(u0) * v0 - (v - v0) * mean) / (u - u0), mean};
  }
};

struct Sigmoid {
  static constexpr bool polynomial = false;
  template <class T>
  static FFATTR_HD T value(T z) {
    return logistic(z);
  }
  template <class T>
  static FFATTR_HD T derivative(T z) {
    return logistic_derivative(z);
  }
  template <class T>
  static FFATTR_HD T slope(T z) {
    return Tanh::slope(z / 2) / 4;
  }
  template <class T>
  static FFATTR_HD Pair2<T> gated(T u) {
    const Pair2<T> tanh = Tanh::gated(u / 2);
    return {tanh.first / 2 + T(0.5), tanh.second / 4};
  }
  template <class T>
  static FFATTR_HD T rise(T z, T b) {
    return Tanh::rise(z / 2, b / 2) / 4;
  }
  template <class T>
  static FFATTR_HD Pair2<T> path(T u, T v, T u0, T v0) {
    const Pair2<T> tanh = Tanh::path(u / 2, v, u0 / 2, v0);
    return {tanh.first / 4, tanh.second / 2 + T(0.5)};
  }
};

// Calls visitor(Activation{}) for the activation of this name (a key of
// ffattr.decomposition.integrated_gradients.ACTIVATIONS); false if there is none.
constexpr const char* kActivationNames = "gelu, gelu_tanh, quick_gelu, silu, relu, relu2, tanh, sigmoid";

template <class Name, class Visitor>
bool with_activation(const Name& name, Visitor&& visitor) {
  if (name == "gelu") return visitor(Gelu{}), true;
  if (name == "gelu_tanh") return visitor(GeluTanh{}), true;
  if (name == "quick_gelu") return visitor(QuickGelu{}), true;
  if (name == "silu") return visitor(Silu{}), true;
  if (name == "relu") return visitor(Relu{}), true;
  if (name == "relu2") return visitor(Relu2{}), true;
  if (name == "tanh") return visitor(Tanh{}), true;
  if (name == "sigmoid") return visitor(Sigmoid{}), true;
  return false;
}

}  // namespace ffattr
