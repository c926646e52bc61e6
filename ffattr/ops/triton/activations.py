"""Feed-forward activations and their path integrals in float32, as in csrc/activations.h.

Every function is element-wise. ``ACTIVATION`` is a key of `ffattr.decomposition.integrated_gradients.ACTIVATIONS`,
known when a kernel is compiled; the formulas are derived in `ffattr.decomposition.activations` and
`ffattr.decomposition.closed_forms`. `rise` and `path` are accurate for ``|z - b| >= 1``, everywhere for "relu" and
"relu2". A NaN stays one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gates import (
    gate,
    gate_derivative,
    log1p_unit,
    logistic,
    logistic_derivative,
    moment,
    positive,
    sinh_unit,
    step,
    tanh_of,
)

__all__ = ["derivative", "gated", "path", "rise", "slope", "value"]


# ---- of a piecewise linear path, exact at any distance


@triton.jit
def _relu_rise(z, b):
    return tl.where(z == b, step(z), (positive(z) - positive(b)) / (z - b))


@triton.jit
def _positive_ends(u, v, u0, v0):
    """The up stream at both ends of the part of the path on which the gate is positive."""
    span = u - u0
    crossing = v0 * (u / span) - v * (u0 / span)
    return tl.where(u0 > 0, v0, crossing), tl.where(u > 0, v, crossing)


@triton.jit
def _relu_path(u, v, u0, v0):
    share = _relu_rise(u, u0)
    start, end = _positive_ends(u, v, u0, v0)
    c_u = tl.where(share == 0, share, share * (start + end) / 2)
    return c_u, share * (positive(u0) + positive(u)) / 2


@triton.jit
def _relu2_path(u, v, u0, v0):
    share = _relu_rise(u, u0)
    p = positive(u0)
    q = positive(u)
    start, end = _positive_ends(u, v, u0, v0)
    c_u = share * (p * (2 * start + end) + q * (start + 2 * end)) / 3
    return tl.where(share == 0, share, c_u), share * (p * p + p * q + q * q) / 3


# ---- of z s(z): what remains after ReLU is bounded, so that differences between large arguments lose no digits


@triton.jit
def _tail(z, ACTIVATION: tl.constexpr):
    return -tl.abs(z) * gate(-tl.abs(z), ACTIVATION)


@triton.jit
def _tail_integral(z, ACTIVATION: tl.constexpr):
    return -z * tl.abs(z) * moment(-tl.abs(z), ACTIVATION)


@triton.jit
def _self_gated_path(u, v, u0, v0, ACTIVATION: tl.constexpr):
    relu_u, relu_v = _relu_path(u, v, u0, v0)
    mean = (_tail_integral(u, ACTIVATION) - _tail_integral(u0, ACTIVATION)) / (u - u0)
    by_parts = (_tail(u, ACTIVATION) * v - _tail(u0, ACTIVATION) * v0 - (v - v0) * mean) / (u - u0)
    return relu_u + by_parts, relu_v + mean


# ---- tanh, which sigmoid shares: it is 1/2 + tanh(z/2)/2


@triton.jit
def _tanh_slope(z):
    return tl.where(tl.abs(z) < 1e-5, 1 - z * z / 3, tanh_of(z) / z)


@triton.jit
def _log_cosh(z):
    x = tl.abs(z)
    s = sinh_unit(tl.where(x < 1, x, 1.0) / 2)
    large = (x - 0.6931471805599453) + log1p_unit(tl.exp(-2 * x))
    return tl.where(x < 1, log1p_unit(2 * s * s), large)  # small ones keep their relative error


@triton.jit
def _tanh_gated(u):
    quotient = _log_cosh(u) / u
    by_parts = (tanh_of(u) - quotient) / u
    small = tl.abs(u) < 1e-5
    return tl.where(small, u / 2, quotient), tl.where(small, 0.5 - u * u / 4, by_parts)


@triton.jit
def _tanh_rise(z, b):
    return (tanh_of(z) - tanh_of(b)) / (z - b)


@triton.jit
def _tanh_path(u, v, u0, v0):
    x = tl.abs(u)
    x0 = tl.abs(u0)
    near = log1p_unit(tl.exp(-2 * x)) - log1p_unit(tl.exp(-2 * x0))
    mean = ((x - x0) + near) / (u - u0)
    return (tanh_of(u) * v - tanh_of(u0) * v0 - (v - v0) * mean) / (u - u0), mean


# ---- by name


@triton.jit
def value(z, ACTIVATION: tl.constexpr):
    """``g(z)``."""
    if ACTIVATION == "relu":
        g = positive(z)
    elif ACTIVATION == "relu2":
        g = positive(z) * positive(z)
    elif ACTIVATION == "tanh":
        g = tanh_of(z)
    elif ACTIVATION == "sigmoid":
        g = logistic(z)
    else:
        g = z * gate(z, ACTIVATION)
    return g


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """``g'(z)``."""
    if ACTIVATION == "relu":
        d = step(z)
    elif ACTIVATION == "relu2":
        d = 2 * positive(z)
    elif ACTIVATION == "tanh":
        d = 4 * logistic_derivative(2 * z)
    elif ACTIVATION == "sigmoid":
        d = logistic_derivative(z)
    else:
        d = gate(z, ACTIVATION) + z * gate_derivative(z, ACTIVATION)
    return d


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """``(g(z) - g(0)) / z``."""
    if ACTIVATION == "relu":
        s = step(z)
    elif ACTIVATION == "relu2":
        s = positive(z)
    elif ACTIVATION == "tanh":
        s = _tanh_slope(z)
    elif ACTIVATION == "sigmoid":
        s = _tanh_slope(z / 2) / 4
    else:
        s = gate(z, ACTIVATION)
    return s


@triton.jit
def gated(u, ACTIVATION: tl.constexpr):
    """``(integral_0^1 g(a u) da, integral_0^1 a g'(a u) da)``."""
    if ACTIVATION == "relu":
        mean = positive(u) / 2
        rest = step(u) / 2
    elif ACTIVATION == "relu2":
        mean = positive(u) * positive(u) / 3
        rest = positive(u) * 2 / 3
    elif ACTIVATION == "tanh":
        mean, rest = _tanh_gated(u)
    elif ACTIVATION == "sigmoid":
        half_mean, half_rest = _tanh_gated(u / 2)
        mean = half_mean / 2 + 0.5
        rest = half_rest / 4
    else:
        share = moment(u, ACTIVATION)
        mean = u * share
        rest = gate(u, ACTIVATION) - share
    return mean, rest


@triton.jit
def rise(z, b, ACTIVATION: tl.constexpr):
    """``(g(z) - g(b)) / (z - b)``."""
    if ACTIVATION == "relu":
        r = _relu_rise(z, b)
    elif ACTIVATION == "relu2":
        r = _relu_rise(z, b) * (positive(z) + positive(b))
    elif ACTIVATION == "tanh":
        r = _tanh_rise(z, b)
    elif ACTIVATION == "sigmoid":
        r = _tanh_rise(z / 2, b / 2) / 4
    else:
        r = _relu_rise(z, b) + (_tail(z, ACTIVATION) - _tail(b, ACTIVATION)) / (z - b)
    return r


@triton.jit
def path(u, v, u0, v0, ACTIVATION: tl.constexpr):
    """The factors ``(C_u, C_v)`` of gate and up on the path from ``(u0, v0)`` to ``(u, v)``."""
    if ACTIVATION == "relu":
        c_u, c_v = _relu_path(u, v, u0, v0)
    elif ACTIVATION == "relu2":
        c_u, c_v = _relu2_path(u, v, u0, v0)
    elif ACTIVATION == "tanh":
        c_u, c_v = _tanh_path(u, v, u0, v0)
    elif ACTIVATION == "sigmoid":
        half_u, half_v = _tanh_path(u / 2, v, u0 / 2, v0)
        c_u = half_u / 4
        c_v = half_v / 2 + 0.5
    else:
        c_u, c_v = _self_gated_path(u, v, u0, v0, ACTIVATION)
    return c_u, c_v
