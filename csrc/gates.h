// The gates s of activations g(z) = z s(z), for CPU and CUDA; no torch header. Each has s, its derivative, and the
// moment integral_0^1 a s(a u) da, derived in ffattr/decomposition/closed_forms.py.
#pragma once

#include "elementary.h"

namespace ffattr {

// The moment from `left`, its value at -|u|, and near zero from a series in u^2.
template <class Series, class T>
FFATTR_HD T moment_of(T u, T left) {
  const T small = T(0.25) + u * polynomial<Series, terms<T>(8, Series::terms)>(u * u);
  const T right = T(0.5) - left, large = u < 0 ? left : right;
  return magnitude(u) < 1 ? small : large;
}

struct GeluForm {
  struct Series {
    static constexpr int terms = 14;
    static constexpr double c[] = {0.1329807601338109,      -0.01329807601338109,    0.0014247938585765455,
                                   -0.00013192535727560607, 1.0494062510559573e-05,  -7.265120199618166e-07,
                                   4.439795677544435e-08,   -2.4250984793309938e-09, 1.1965946444067404e-10,
                                   -5.381510305532959e-12,  2.2227977348940483e-13,  -8.487045896868185e-15,
                                   3.012377401666177e-16,   -9.98798873231491e-18};
  };
  // Phi(-x) e^(x^2/2) as a polynomial in t = 1 / (1 + 0.3 x) without constant, minimax on 0 <= x <= 14.2: 4e-9.
  struct Tail {
    static constexpr double c[] = {0.1196866729,   0.1195720809, 0.1102337189,  0.07839524355, 0.09614728459,
                                   -0.07941749322, 0.191790676,  -0.2282275383, 0.1124452086,  -0.02062585571};
  };
  template <class T>
  static FFATTR_HD T density(T x) {
    return exp_down(x * x * T(-0.5)) * T(0.3989422804014327);
  }
#ifdef __CUDA_ARCH__
  static FFATTR_HD float left(float x) { return 0.5f * erfcf(x * 0.70710678f); }
#else
  static FFATTR_HD float left(float x) {
    const float t = 1 / (1 + 0.3f * x);
    return exp_down(x * x * -0.5f) * (t * polynomial<Tail, 10>(t));
  }
#endif
  static FFATTR_HD double left(double x) { return 0.5 * erfc(x * 0.7071067811865476); }  // Phi(-x), x >= 0
  template <class T>
  static FFATTR_HD T slope(T z) {
    const T q = left(magnitude(z)), p = 1 - q;
    return z < 0 ? q : p;
  }
  template <class T>
  static FFATTR_HD T slope_derivative(T z) {
    return density(z);
  }
  template <class T>
  static FFATTR_HD T moment(T u) {
    const T x = magnitude(u), inverse = 1 / x, square = inverse * inverse;
    return moment_of<Series>(u, ((1 - square) * left(x) - density(x) * inverse) / 2 + square / 4);
  }
};

struct SiluForm {
  struct Series {
    static constexpr int terms = 18;
    static constexpr double c[] = {0.08333333333333333,     -0.004166666666666667,   0.0002976190476190476,
                                   -2.3423721340388004e-05, 1.9415383998717333e-06,  -1.6645198936865603e-07,
                                   1.4616406398813805e-08,  -1.3067217542323556e-09, 1.1846189819046541e-10,
                                   -1.0859585455192948e-11, 1.0046272647825998e-12,  -9.364682169751366e-14,
                                   8.785561869171461e-15,   -8.287729394404321e-16,  7.855469034356078e-17,
                                   -7.47687516346281e-18,   7.1427636485044655e-19,  -6.845936312712903e-20};
  };
  // -Li2(-q) - L - L^2/4 over L^3 in L^2, L = log(1 + q): Bernoulli numbers over factorials.
  struct Dilogarithm {
    static constexpr double c[] = {1.0 / 36,
                                   -1.0 / 3600,
                                   4.72411186696901e-06,
                                   -9.185773074661964e-08,
                                   1.8978869988971e-09,
                                   -4.0647616451442256e-11,
                                   8.921691020456453e-13,
                                   -1.9939295860721074e-14};
  };
  template <class T>
  static FFATTR_HD T slope(T z) {
    return logistic(z);
  }
  template <class T>
  static FFATTR_HD T slope_derivative(T z) {
    return logistic_derivative(z);
  }
  template <class T>
  static FFATTR_HD T moment(T u) {
    const T x = magnitude(u), log = log1p_unit(exp_down(-x)), square = log * log;
    const T odd = polynomial<Dilogarithm, terms<T>(4, 8)>(square);
    const T rest = log * (x + 1 + log / 4 + square * odd);
    return moment_of<Series>(u, (T(0.8224670334241132) - rest) / x / x);
  }
};

struct QuickGeluForm {
  template <class T>
  static FFATTR_HD T slope(T z) {
    return logistic(z * T(1.702));
  }
  template <class T>
  static FFATTR_HD T slope_derivative(T z) {
    return logistic_derivative(z * T(1.702)) * T(1.702);
  }
  template <class T>
  static FFATTR_HD T moment(T u) {
    return SiluForm::moment(u * T(1.702));
  }
};

struct GeluTanhForm {
  // moment(-x) on 0 <= x <= 7 in Chebyshev polynomials; beyond, 0.2496 / x^2.
  struct Series {
    static constexpr double c[] = {
        0.070392306243710928,    -0.10392790831905588,    0.054902379039623181,    -0.020257160328681224,
        0.0035881277544068469,   0.0013136616243899558,   -0.0013448327031860157,  0.00048989323295198684,
        -2.3076040051563107e-05, -6.8215060497531691e-05, 3.4962014717069646e-05,  -5.2552799415268624e-06,
        -2.7278041121245088e-06, 1.8598904209908792e-06,  -4.2951247804581816e-07, -5.1896866951987399e-08,
        8.2530801333071294e-08,  -3.4843981398108292e-08, 4.7147334589677419e-09,  4.1243374421702965e-09,
        -2.9963430139834379e-09, 5.9906905940561762e-10,  2.7795334957281259e-10,  -2.0959397296442064e-10,
        3.9169582508047363e-11,  1.3586039122418884e-11,  -1.0403739212720234e-11, 3.0336745846885429e-12,
        -1.8417385672098163e-13, -4.5637105205997841e-13, 3.3616049758637223e-13,  -8.4099394115355608e-14,
        -3.1229648496851795e-14, 2.9864999362416711e-14,  -6.4948046940571658e-15, -2.2875220236547494e-15,
        1.7486012637846216e-15,  -6.1987452208237904e-16};
  };
  static constexpr double kScale = 1.5957691216057308, kCube = 0.044715;
  template <class T>
  static FFATTR_HD T bounded(T z) {  // saturated long before; the cube must not overflow
    const T low = z < -50 ? T(-50) : z;
    return low > 50 ? T(50) : low;
  }
  template <class T>
  static FFATTR_HD T inner(T z) {
    const T b = bounded(z);
    return T(kScale) * b * (1 + T(kCube) * b * b);
  }
  template <class T>
  static FFATTR_HD T slope(T z) {
    return logistic(inner(z));
  }
  template <class T>
  static FFATTR_HD T slope_derivative(T z) {
    const T b = bounded(z);
    return logistic_derivative(inner(z)) * (T(kScale * 3 * kCube) * b * b + T(kScale));
  }
  template <class T>
  static FFATTR_HD T moment(T u) {
    const T x = magnitude(u), t = x * T(2.0 / 7) - 1, inside = t > 1 ? T(1) : t;
    const T near = clenshaw<Series, terms<T>(21, 37)>(inside, T(0), T(0)), far = T(0.24958576776842642) / x / x;
    const T left = x < 7 ? near : far, right = T(0.5) - left;
    return u < 0 ? left : right;
  }
};

}  // namespace ffattr
