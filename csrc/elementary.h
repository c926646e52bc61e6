// Elementary functions for CPU and CUDA; no torch header.
//
// The float functions have neither branches nor library calls on the CPU, so that loops over neurons vectorise; their
// relative error is below 3e-7. The double ones, and all on a GPU, call the standard library.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FFATTR_HD __host__ __device__ __forceinline__
#else
#define FFATTR_HD inline __attribute__((always_inline))
#endif

namespace ffattr {

template <class T>
struct Pair2 {
  T first, second;
};

// Polynomials: a table is a type, so that its entries become immediates in unrolled code.
template <class Table, int Terms, int I = 0, class T>
FFATTR_HD T polynomial(T y) {
  constexpr T c = static_cast<T>(Table::c[I]);
  if constexpr (I + 1 < Terms)
    return polynomial<Table, Terms, I + 1>(y) * y + c;
  else
    return c;
}

template <class Table, int I, class T>
FFATTR_HD T clenshaw(T t, T last, T before) {
  constexpr T c = static_cast<T>(Table::c[I]);
  if constexpr (I > 0)
    return clenshaw<Table, I - 1>(t, 2 * t * last - before + c, last);
  else
    return t * last - before + c;
}

template <class T>
constexpr int terms(int single, int twice) {
  return sizeof(T) == 4 ? single : twice;
}

// Elementary functions.

FFATTR_HD double exp_down(double x) { return exp(x); }      // e^x for x <= 0
FFATTR_HD double log1p_unit(double q) { return log1p(q); }  // log(1 + q) for 0 <= q <= 1
FFATTR_HD double magnitude(double x) { return fabs(x); }
FFATTR_HD double tanh_of(double x) { return tanh(x); }
FFATTR_HD double sinh_unit(double x) { return sinh(x); }  // for |x| <= 1/2

#ifdef __CUDA_ARCH__
FFATTR_HD float exp_down(float x) { return expf(x); }
FFATTR_HD float log1p_unit(float q) { return log1pf(q); }
FFATTR_HD float magnitude(float x) { return fabsf(x); }
FFATTR_HD float tanh_of(float x) { return tanhf(x); }
FFATTR_HD float sinh_unit(float x) { return sinhf(x); }
#else
FFATTR_HD float magnitude(float x) { return __builtin_fabsf(x); }

struct ExpTable {
  static constexpr double c[] = {5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2,
                                 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4};  // Cephes, expf
};

FFATTR_HD float exp_down(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504089f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  const float mantissa = polynomial<ExpTable, 6>(r) * r * r + r + 1.0f;
  const int32_t exponent = (__builtin_bit_cast(int32_t, shifted) - 0x4B400000 + 127) << 23;
  const float value = mantissa * __builtin_bit_cast(float, exponent);
  return x < -87.0f ? 0.0f : value;
}

struct AtanhTable {
  static constexpr double c[] = {1.0, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15};
};

FFATTR_HD float log1p_unit(float q) {
  const float w = q / (2 + q);
  return 2 * w * polynomial<AtanhTable, 8>(w * w);
}

struct TanhTable {
  static constexpr double c[] = {1.0,
                                 -3.33332819422e-1,
                                 1.33314422036e-1,
                                 -5.37397155531e-2,
                                 2.06390887954e-2,
                                 -5.70498872745e-3};  // Cephes, tanhf
};

FFATTR_HD float tanh_of(float x) {
  const float e = exp_down(-2 * magnitude(x));
  const float large = (1 - e) / (1 + e);
  const float small = x * polynomial<TanhTable, 6>(x * x);
  const float signed_large = x < 0 ? -large : large;
  return magnitude(x) < 0.625f ? small : signed_large;
}

struct SinhTable {
  static constexpr double c[] = {1.0, 1.0 / 6, 1.0 / 120, 1.0 / 5040};
};

FFATTR_HD float sinh_unit(float x) { return x * polynomial<SinhTable, 4>(x * x); }
#endif

template <class T>
FFATTR_HD T logistic(T z) {
  const T e = exp_down(-magnitude(z)), r = 1 / (1 + e), left = e * r;
  return z < 0 ? left : r;
}

template <class T>
FFATTR_HD T logistic_derivative(T z) {
  const T e = exp_down(-magnitude(z)), r = 1 / (1 + e);
  return e * r * r;
}

template <class T>
FFATTR_HD T positive(T z) {
  return z < 0 ? T(0) : z;  // a NaN stays one
}

// 1 where z > 0, else 0; a NaN stays one.
template <class T>
FFATTR_HD T step(T z) {
  const T indicator = z > 0 ? T(1) : T(0);
  return z != z ? z : indicator;
}

}  // namespace ffattr
