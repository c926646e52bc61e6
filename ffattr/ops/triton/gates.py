"""Elementary functions and the gates s of activations g(z) = z s(z) in float32, as in csrc/elementary.h and gates.h.

Every function is element-wise and lets a NaN through. The formulas are derived in `ffattr.decomposition.closed_forms`;
Triton's language has neither log1p nor tanh nor erfc, and libdevice's do not run in the interpreter, hence the
polynomials. The gates are those of ``ACTIVATION`` "gelu", "gelu_tanh", "quick_gelu" and "silu".
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "clenshaw",
    "gate",
    "gate_derivative",
    "log1p_unit",
    "logistic",
    "logistic_derivative",
    "moment",
    "polynomial",
    "positive",
    "sinh_unit",
    "step",
    "tanh_of",
]

_ATANH = tl.constexpr((1.0, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13, 1 / 15))
_TANH = tl.constexpr(  # Cephes, tanhf
    (1.0, -3.33332819422e-1, 1.33314422036e-1, -5.37397155531e-2, 2.06390887954e-2, -5.70498872745e-3)
)
_SINH = tl.constexpr((1.0, 1 / 6, 1 / 120, 1 / 5040))

# Phi(-x) e^(x^2/2) as a polynomial in t = 1 / (1 + 0.3 x) without constant, minimax on 0 <= x <= 14.2: 4e-9.
_NORMAL_TAIL = tl.constexpr(
    (
        *(0.1196866729, 0.1195720809, 0.1102337189, 0.07839524355, 0.09614728459),
        *(-0.07941749322, 0.191790676, -0.2282275383, 0.1124452086, -0.02062585571),
    )
)

# Odd part of the moment near zero, in u^2.
_GELU_SERIES = tl.constexpr(
    (
        *(0.1329807601338109, -0.01329807601338109, 0.0014247938585765455, -0.00013192535727560607),
        *(1.0494062510559573e-05, -7.265120199618166e-07, 4.439795677544435e-08, -2.4250984793309938e-09),
    )
)
_SILU_SERIES = tl.constexpr(
    (
        *(0.08333333333333333, -0.004166666666666667, 0.0002976190476190476, -2.3423721340388004e-05),
        *(1.9415383998717333e-06, -1.6645198936865603e-07, 1.4616406398813805e-08, -1.3067217542323556e-09),
    )
)
# -Li2(-q) - L - L^2/4 over L^3 in L^2, L = log(1 + q): Bernoulli numbers over factorials.
_DILOGARITHM = tl.constexpr((1 / 36, -1 / 3600, 4.72411186696901e-06, -9.185773074661964e-08))

# moment(-x) of gelu_tanh on 0 <= x <= 7 in Chebyshev polynomials; beyond, 0.2496 / x^2.
_GELU_TANH_SERIES = tl.constexpr(
    (
        *(0.070392306243710928, -0.10392790831905588, 0.054902379039623181, -0.020257160328681224),
        *(0.0035881277544068469, 0.0013136616243899558, -0.0013448327031860157, 0.00048989323295198684),
        *(-2.3076040051563107e-05, -6.8215060497531691e-05, 3.4962014717069646e-05, -5.2552799415268624e-06),
        *(-2.7278041121245088e-06, 1.8598904209908792e-06, -4.2951247804581816e-07, -5.1896866951987399e-08),
        *(8.2530801333071294e-08, -3.4843981398108292e-08, 4.7147334589677419e-09, 4.1243374421702965e-09),
        *(-2.9963430139834379e-09, 5.9906905940561762e-10),
    )
)
# On the right of a tensor only: the interpreter makes no tensor of `constexpr * tensor`.
_TANH_SCALE = tl.constexpr(1.5957691216057308)
_TANH_CUBE = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


# ---- elementary functions


@triton.jit
def polynomial(y, TABLE: tl.constexpr, TERMS: tl.constexpr):
    """``sum_i TABLE[i] y^i``."""
    value = TABLE[TERMS - 1]
    for i in tl.static_range(1, TERMS):
        value = value * y + TABLE[TERMS - 1 - i]
    return value


@triton.jit
def clenshaw(t, TABLE: tl.constexpr, TERMS: tl.constexpr):
    """``sum_i TABLE[i] T_i(t)`` in Chebyshev polynomials."""
    last = tl.zeros_like(t)
    before = tl.zeros_like(t)
    for i in tl.static_range(1, TERMS):
        following = 2 * t * last - before + TABLE[TERMS - i]
        before = last
        last = following
    return t * last - before + TABLE[0]


@triton.jit
def log1p_unit(q):
    """``log(1 + q)`` for ``0 <= q <= 1``."""
    w = q / (2 + q)
    return 2 * w * polynomial(w * w, _ATANH, 8)


@triton.jit
def sinh_unit(x):
    """``sinh(x)`` for ``|x| <= 1/2``."""
    return x * polynomial(x * x, _SINH, 4)


@triton.jit
def tanh_of(x):
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    small = x * polynomial(x * x, _TANH, 6)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def logistic(z):
    e = tl.exp(-tl.abs(z))
    r = 1 / (1 + e)
    return tl.where(z < 0, e * r, r)


@triton.jit
def logistic_derivative(z):
    e = tl.exp(-tl.abs(z))
    r = 1 / (1 + e)
    return e * r * r


@triton.jit
def positive(z):
    return tl.where(z < 0, 0.0, z)  # tl.maximum would drop a NaN


@triton.jit
def step(z):
    """1 where ``z > 0``, else 0; a NaN stays one."""
    return tl.where(z != z, z, tl.where(z > 0, 1.0, 0.0))


# ---- gates


@triton.jit
def _normal_density(x):
    return tl.exp(x * x * -0.5) * 0.3989422804014327


@triton.jit
def _normal_left(x):
    """``Phi(-x)`` for ``x >= 0``."""
    t = 1 / (1 + 0.3 * x)
    return tl.exp(x * x * -0.5) * (t * polynomial(t, _NORMAL_TAIL, 10))


@triton.jit
def _gelu_tanh_bounded(z):
    low = tl.where(z < -50, -50.0, z)  # saturated long before; the cube must not overflow
    return tl.where(low > 50, 50.0, low)


@triton.jit
def _gelu_tanh_inner(z):
    b = _gelu_tanh_bounded(z)
    return b * _TANH_SCALE * (b * b * _TANH_CUBE + 1)


@triton.jit
def gate(z, ACTIVATION: tl.constexpr):
    """``s(z)``."""
    if ACTIVATION == "gelu":
        left = _normal_left(tl.abs(z))
        s = tl.where(z < 0, left, 1 - left)
    elif ACTIVATION == "gelu_tanh":
        s = logistic(_gelu_tanh_inner(z))
    elif ACTIVATION == "quick_gelu":
        s = logistic(z * _QUICK)
    else:
        tl.static_assert(ACTIVATION == "silu")
        s = logistic(z)
    return s


@triton.jit
def gate_derivative(z, ACTIVATION: tl.constexpr):
    """``s'(z)``."""
    if ACTIVATION == "gelu":
        slope = _normal_density(z)
    elif ACTIVATION == "gelu_tanh":
        b = _gelu_tanh_bounded(z)
        slope = logistic_derivative(_gelu_tanh_inner(z)) * (b * b * (_TANH_SCALE * 3 * _TANH_CUBE) + _TANH_SCALE)
    elif ACTIVATION == "quick_gelu":
        slope = logistic_derivative(z * _QUICK) * _QUICK
    else:
        tl.static_assert(ACTIVATION == "silu")
        slope = logistic_derivative(z)
    return slope


@triton.jit
def _moment_of(u, left, SERIES: tl.constexpr):
    """The moment from ``left``, its value at ``-|u|``, and near zero from a series in ``u^2``."""
    small = 0.25 + u * polynomial(u * u, SERIES, 8)
    return tl.where(tl.abs(u) < 1, small, tl.where(u < 0, left, 0.5 - left))


@triton.jit
def _silu_moment(u):
    x = tl.abs(u)
    log = log1p_unit(tl.exp(-x))
    square = log * log
    rest = log * (x + 1 + log / 4 + square * polynomial(square, _DILOGARITHM, 4))
    return _moment_of(u, (0.8224670334241132 - rest) / x / x, _SILU_SERIES)


@triton.jit
def moment(u, ACTIVATION: tl.constexpr):
    """``integral_0^1 a s(a u) da``."""
    if ACTIVATION == "gelu":
        x = tl.abs(u)
        inverse = 1 / x
        square = inverse * inverse
        left = ((1 - square) * _normal_left(x) - _normal_density(x) * inverse) / 2 + square / 4
        mean = _moment_of(u, left, _GELU_SERIES)
    elif ACTIVATION == "gelu_tanh":
        x = tl.abs(u)
        t = x * (2 / 7) - 1
        near = clenshaw(tl.where(t > 1, 1.0, t), _GELU_TANH_SERIES, 22)
        left = tl.where(x < 7, near, 0.24958576776842642 / x / x)
        mean = tl.where(u < 0, left, 0.5 - left)
    elif ACTIVATION == "quick_gelu":
        mean = _silu_moment(u * _QUICK)
    else:
        tl.static_assert(ACTIVATION == "silu")
        mean = _silu_moment(u)
    return mean
