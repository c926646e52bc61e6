"""Closed forms of path integrals of activations: the formulas behind `ffattr.decomposition.activations`.

Notation: ``g`` an activation, ``s(z) = (g(z) - g(0)) / z`` its slope. GELU (both forms), quick GELU and SiLU are
*self-gated*, ``g(z) = z s(z)`` with ``s(z) + s(-z) = 1``; all their path integrals follow from ``s`` and one bounded
function, ``moment(u) = integral_0^1 a s(a u) da``, without any division by ``u``; ``moment(u) = 1/2 - moment(-u)``.
``rise(z, b)`` is ``(g(z) - g(b)) / (z - b)``; ``path(u, v, u0, v0)`` the factors ``(C_u, C_v)`` of
`ffattr.decomposition.integrated_gradients`.

Every function is element-wise and expects float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor]

_SMALL = 1.0  # |u| below which a Taylor series replaces a closed form that subtracts nearly equal terms


@lru_cache
def gauss_legendre(count: int) -> Pair:
    """Nodes and weights ``[count]`` on [0, 1], float64, by Newton's method on the Legendre polynomial."""
    x = torch.cos(math.pi * (torch.arange(count, 0, -1, dtype=torch.float64) - 0.25) / (count + 0.5))
    for _ in range(8):  # quadratic convergence from a guess good to 1/count^2: four are enough, eight are cheap
        previous, current = torch.ones_like(x), x
        for k in range(2, count + 1):
            previous, current = current, ((2 * k - 1) * x * current - (k - 1) * previous) / k
        slope = count * (x * current - previous) / (x * x - 1)
        x = x - current / slope
    weights = 1 / ((1 - x * x) * slope * slope)
    return (x + 1) / 2, weights / weights.sum()


# ReLU and its square: exact at any distance.


def step(z: Tensor) -> Tensor:
    return torch.where(z.isnan(), z, (z > 0).to(z.dtype))  # a comparison alone would hide a NaN


def relu(z: Tensor) -> Tensor:
    return z.clamp_min(0)


def relu_rise(z: Tensor, b: Tensor) -> Tensor:
    """Also the share of the path from ``b`` to ``z`` that is positive."""
    return torch.where(z == b, step(z), (relu(z) - relu(b)) / (z - b))


def _difference_of_ends(u: Tensor, v: Tensor, u0: Tensor, v0: Tensor) -> Pair:
    """``v`` at the start and at the end of the positive part of the path."""
    crossing = v0 * (u / (u - u0)) - v * (u0 / (u - u0))
    return torch.where(u0 > 0, v0, crossing), torch.where(u > 0, v, crossing)


def relu_path(u: Tensor, v: Tensor, u0: Tensor, v0: Tensor) -> Pair:
    share = relu_rise(u, u0)
    start, end = _difference_of_ends(u, v, u0, v0)
    # No positive part: the crossing is meaningless, and may be infinite.
    c_u = torch.where(share == 0, share, share * (start + end) / 2)
    return c_u, share * (relu(u0) + relu(u)) / 2


def relu2_path(u: Tensor, v: Tensor, u0: Tensor, v0: Tensor) -> Pair:
    share = relu_rise(u, u0)
    start, end = _difference_of_ends(u, v, u0, v0)
    p, q = relu(u0), relu(u)
    c_u = share * (p * (2 * start + end) + q * (start + 2 * end)) / 3
    return torch.where(share == 0, share, c_u), share * (p * p + p * q + q * q) / 3


# Self-gated activations: slope, its derivative and its moment.


def _from_tail(u: Tensor, small: Tensor, tail: Tensor) -> Tensor:
    """The moment from its series near zero and, elsewhere, from its value at ``-|u|``."""
    return torch.where(u.abs() < _SMALL, small, torch.where(u < 0, tail, 0.5 - tail))


def _evaluate_polynomial(coefficients: Sequence[float], y: Tensor) -> Tensor:
    total = torch.full_like(y, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total.mul_(y).add_(coefficient)
    return total


def _sum_terms(single: int, double: int, x: Tensor) -> int:
    return double if x.dtype == torch.float64 else single


def density(z: Tensor) -> Tensor:
    return torch.exp(z * z * -0.5) * (1 / math.sqrt(2 * math.pi))


def normal(z: Tensor) -> Tensor:
    return torch.erfc(z * -math.sqrt(0.5)) * 0.5  # 1 + erf would lose the digits of the left tail


_GELU_SERIES = [
    (-1) ** n / (math.factorial(n) * 2**n * (2 * n + 1) * (2 * n + 3) * math.sqrt(2 * math.pi)) for n in range(14)
]


def gelu_moment(u: Tensor) -> Tensor:
    x = u.abs()
    inverse = 1 / x
    square = inverse * inverse
    tail = ((1 - square) * normal(-x) - density(x) * inverse) / 2 + square / 4
    small = 0.25 + u * _evaluate_polynomial(_GELU_SERIES[: _sum_terms(8, 14, u)], u * u)
    return _from_tail(u, small, tail)


def _sigmoid_series(count: int) -> list[float]:
    """Taylor coefficients of the logistic function, from ``s' = s - s^2``."""
    series = [0.5]
    for n in range(count):
        square = sum(series[i] * series[n - i] for i in range(n + 1))
        series.append((series[n] - square) / (n + 1))
    return series


_SILU_SERIES = [c / (2 * n + 3) for n, c in enumerate(_sigmoid_series(36)[1::2])]
# -Li2(-q) as a series in log(1 + q): the Bernoulli numbers over factorials, n >= 2.
_DILOGARITHM = [
    b / math.factorial(2 * n + 3)
    for n, b in enumerate((1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510))
]


def silu_moment(u: Tensor) -> Tensor:
    # integral_0^x t s(-t) dt = pi^2/12 - x log(1 + q) + Li2(-q) with q = e^-x
    x = u.abs()
    logarithm = torch.log1p(torch.exp(-x))
    square = logarithm * logarithm
    odd = _evaluate_polynomial(_DILOGARITHM[: _sum_terms(4, 8, u)], square)
    rest = logarithm * (x + 1 + logarithm / 4 + square * odd)
    small = 0.25 + u * _evaluate_polynomial(_SILU_SERIES[: _sum_terms(8, 18, u)], u * u)
    tail = (math.pi**2 / 12 - rest) / x / x
    return _from_tail(u, small, tail)


def sigmoid_derivative(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


QUICK = 1.702


def quick_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z * QUICK)


_TANH_SCALE = 2 * math.sqrt(2 / math.pi)
_TANH_CUBE = 0.044715


def _inner_derivative(z: Tensor) -> Tensor:
    z = z.clamp(-50, 50)  # saturated long before; the cube must not overflow
    return _TANH_SCALE * z * (1 + _TANH_CUBE * z * z)


def gelu_tanh_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(_inner_derivative(z))


def gelu_tanh_slope_derivative(z: Tensor) -> Tensor:
    inner = (_TANH_SCALE * 3 * _TANH_CUBE) * z.clamp(-50, 50).square() + _TANH_SCALE
    return sigmoid_derivative(_inner_derivative(z)) * inner


_GELU_TANH_RANGE = 7.0  # where the tail has vanished in float64


@lru_cache
def _gelu_tanh_series() -> tuple[list[float], float]:
    """Chebyshev series of ``moment(-x)`` on ``0..7``, which has no closed form, and ``49 moment(-7)``."""
    count = 48
    angle = math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x = (torch.cos(angle) + 1) * (_GELU_TANH_RANGE / 2)
    points, weights = gauss_legendre(80)

    def moment(x: Tensor) -> Tensor:
        return gelu_tanh_slope(-x[:, None] * points) @ (points * weights)

    series = torch.cos(torch.arange(count, dtype=torch.float64)[:, None] * angle) @ moment(x) * (2 / count)
    series[0] /= 2
    end = moment(torch.tensor([_GELU_TANH_RANGE], dtype=torch.float64)).item()
    return series.tolist(), end * _GELU_TANH_RANGE**2


def gelu_tanh_moment(u: Tensor) -> Tensor:
    series, total = _gelu_tanh_series()
    x = u.abs()
    t = (x * (2 / _GELU_TANH_RANGE) - 1).clamp_max(1)
    double = 2 * t
    last, before = torch.zeros_like(t), torch.zeros_like(t)
    for coefficient in series[_sum_terms(22, 38, u) - 1 : 0 : -1]:  # Clenshaw
        last, before = double * last - before + coefficient, last
    tail = torch.where(x < _GELU_TANH_RANGE, t * last - before + series[0], total / x / x)
    return torch.where(u < 0, tail, 0.5 - tail)


# tanh and the logistic function, 1/2 + tanh(z/2)/2.


def tanh_slope(z: Tensor) -> Tensor:
    return torch.where(z.abs() < 1e-5, 1 - z * z / 3, torch.tanh(z) / z)


def tanh_derivative(z: Tensor) -> Tensor:
    e = torch.exp(-2 * z.abs())  # 1 - tanh^2 would cancel
    return 4 * e / (1 + e).square()


def log_cosh(z: Tensor) -> Tensor:
    x = z.abs()
    small = torch.log1p(2 * torch.sinh(x.clamp_max(1) / 2).square())
    return torch.where(x < 1, small, (x - math.log(2)) + torch.log1p(torch.exp(-2 * x)))


def tanh_gated(u: Tensor) -> Pair:
    mean = torch.where(u.abs() < 1e-5, u / 2, log_cosh(u) / u)
    return mean, torch.where(u.abs() < 1e-5, 0.5 - u * u / 4, (torch.tanh(u) - mean) / u)


def tanh_rise(z: Tensor, b: Tensor) -> Tensor:
    return (torch.tanh(z) - torch.tanh(b)) / (z - b)


def tanh_path(u: Tensor, v: Tensor, u0: Tensor, v0: Tensor) -> Pair:
    # log cosh without its linear part: two large arguments would otherwise cancel
    near = torch.log1p(torch.exp(-2 * u.abs())) - torch.log1p(torch.exp(-2 * u0.abs()))
    mean = ((u.abs() - u0.abs()) + near) / (u - u0)
    return (torch.tanh(u) * v - torch.tanh(u0) * v0 - (v - v0) * mean) / (u - u0), mean


def sigmoid_gated(u: Tensor) -> Pair:
    mean, moment = tanh_gated(u / 2)
    return mean / 2 + 0.5, moment / 4


def sigmoid_path(u: Tensor, v: Tensor, u0: Tensor, v0: Tensor) -> Pair:
    c_u, c_v = tanh_path(u / 2, v, u0 / 2, v0)
    return c_u / 4, c_v / 2 + 0.5
