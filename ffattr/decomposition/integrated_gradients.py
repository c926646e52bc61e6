"""Integrated Gradients (Sundararajan et al. 2017) through a feed-forward activation, as one factor per neuron.

Along the straight path to the pre-activation, every input of neuron ``k`` gets its own share times the same number,
the mean of ``g'`` on the path (after Kobayashi et al. 2024; the formulas are ours): exactly ``(g(z) - g(0)) / z``,
or a quadrature of it. `slope` computes that number for a dense block, `gated_slopes` the two numbers of a gated block
``phi(u) * v``. Neither differentiates its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .activations import ACTIVATIONS, FALLBACK_NODES, Activation
from .closed_forms import gauss_legendre

__all__ = [
    "ACTIVATIONS",
    "FALLBACK_NODES",
    "RULES",
    "Activation",
    "GaussLegendre",
    "Riemann",
    "gated_slopes",
    "nodes",
    "rule_of",
    "slope",
    "slopes",
]

_RIEMANN = ("right", "left", "midpoint", "trapezoid")
_MOST_STEPS, _MOST_NODES = 2**16, 2**10
"""More points would take minutes and gigabytes for what the exact rule gives (`csrc/quadrature.h` has them, too)."""

RULES = ("exact", *_RIEMANN, "gauss-legendre")
"""Names of the rules, as the operators take them."""

_BLOCK = 1 << 17
"""Elements worked on at a time on a CPU: temporaries of a quadrature stay in the cache and are never ``[N, F]``."""

_NEAR = 1.0  # a path in z no longer than this is integrated numerically: a quotient of differences would cancel


@dataclass(frozen=True)
class Riemann:
    """A Riemann sum with ``steps`` evaluations of the gradient, as Integrated Gradients are often computed.

    ``rule``: "right", "left", "midpoint" (equal weights on ``steps`` intervals) or "trapezoid" (``steps`` points on
    ``steps - 1`` intervals, half weight at both ends). Weights sum to one for each of them.

    >>> exact = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer)["layer"]
    >>> summed = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, ig=ffattr.Riemann(50))["layer"]
    >>> bool((summed - exact).norm() / exact.norm() < 0.005), torch.allclose(summed, exact)  # close, not equal
    (True, False)
    """

    steps: int
    rule: Literal["right", "left", "midpoint", "trapezoid"] = "right"

    def __post_init__(self) -> None:
        if self.rule not in _RIEMANN:
            raise ValueError(f"unknown Riemann rule {self.rule!r}, expected one of {', '.join(_RIEMANN)}")
        _check_steps(self.rule, self.steps)


@dataclass(frozen=True)
class GaussLegendre:
    """Gauss-Legendre quadrature with ``nodes`` evaluations of the gradient.

    >>> exact = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer)["layer"]
    >>> quadrature = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, ig=ffattr.GaussLegendre(16))["layer"]
    >>> bool((quadrature - exact).norm() / exact.norm() < 1e-12)
    True
    """

    nodes: int

    def __post_init__(self) -> None:
        _check_steps("gauss-legendre", self.nodes)


def rule_of(ig: Literal["exact"] | Riemann | GaussLegendre) -> tuple[str, int]:
    """The operators' ``(rule, steps)`` for a user's choice; the exact rule has 0 steps."""
    if isinstance(ig, Riemann):
        return ig.rule, ig.steps
    if isinstance(ig, GaussLegendre):
        return "gauss-legendre", ig.nodes
    if ig == "exact":
        return "exact", 0
    raise ValueError(
        f'unknown Integrated-Gradients rule {ig!r}, expected "exact", Riemann(steps) or GaussLegendre(nodes)'
    )


def nodes(rule: str, steps: int) -> tuple[Tensor, Tensor]:
    """Points on [0, 1] and weights summing to one, ``[steps]`` each in float64, of any rule but "exact"."""
    _check_steps(rule, steps)
    if rule == "gauss-legendre":
        return gauss_legendre(steps)
    if rule == "trapezoid":
        weights = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
        weights[[0, -1]] /= 2
        return torch.linspace(0, 1, steps, dtype=torch.float64), weights
    offset = {"right": 1.0, "left": 0.0, "midpoint": 0.5}[rule]
    points = (torch.arange(steps, dtype=torch.float64) + offset) / steps
    return points, torch.full((steps,), 1 / steps, dtype=torch.float64)


def slope(z: Tensor, activation: Activation, rule: str = "exact", steps: int = 0, base: Tensor | None = None) -> Tensor:
    """Integrated-Gradients factor ``integral_0^1 g'(b + a (z - b)) da`` of each pre-activation.

    ``z`` any shape, any floating dtype (half types are computed in float32); ``base`` the path's start, broadcastable
    to ``z``, zero by default. Returns ``z``'s shape and dtype. Exact for every ``z``, including 0 and ``b`` themselves
    (where it is ``g'``). Raises ValueError for an unknown rule or a number of steps it cannot have.
    """
    points = _path_points(rule, steps, activation)

    def compute(z: Tensor, b: Tensor | None = None) -> tuple[Tensor]:
        return (_mean_derivative(z, b, activation, points) if points else _exact_slope(z, b, activation),)

    (out,) = _compute_in_blocks(compute, 1, z, base)
    return out


def gated_slopes(
    u: Tensor,
    v: Tensor,
    activation: Activation,
    rule: str = "exact",
    steps: int = 0,
    base: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrated-Gradients factors ``(C_u, C_v)`` of gate and up in a gated block ``phi(u) * v``.

    On the straight path ``(u(a), v(a))`` from ``base = (u0, v0)``, each broadcastable to ``u`` and zero by default:
    ``C_v = integral_0^1 phi(u(a)) da`` and ``C_u = integral_0^1 phi'(u(a)) v(a) da``, so that
    ``(u - u0) C_u + (v - v0) C_v = phi(u) v - phi(u0) v0``. ``u`` and ``v`` have one shape and dtype, which the results
    take. Exact means rounding error of order ``eps * max(1, |v|)`` (relu2: times ``|u|``). Raises ValueError as
    `slope` does.
    """
    if u.shape != v.shape:
        raise ValueError(f"gate and up must have one shape, got {list(u.shape)} and {list(v.shape)}")
    points = _path_points(rule, steps, activation)

    def compute(u: Tensor, v: Tensor, *start: Tensor) -> tuple[Tensor, Tensor]:
        if points:
            return _mean_gated(u, v, start, activation, points)
        return _exact_gated(u, v, start, activation)

    c_u, c_v = _compute_in_blocks(compute, 2, u, v, *((None,) if base is None else base))
    return c_u, c_v


def slopes(z: Tensor, activation: Activation, rule: str, steps: int, base: Tensor | None = None) -> Tensor:
    """The factors of a whole block, ``[S, N, F]`` like ``z``: `slope` for ``S`` = 1, `gated_slopes` for 2 (gate, up).

    ``base`` ``[S, N or 1, F]`` is where the path starts, zero by default.
    """
    if len(z) == 1:
        return slope(z[0], activation, rule, steps, None if base is None else base[0])[None]
    start = None if base is None else (base[0], base[1])
    return torch.stack(gated_slopes(z[0], z[1], activation, rule, steps, start))


def _check_steps(rule: str, steps: int) -> None:
    if rule not in RULES[1:]:
        raise ValueError(f"unknown Integrated-Gradients rule {rule!r}, expected one of {', '.join(RULES)}")
    least = 2 if rule == "trapezoid" else 1
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ValueError(f"the {rule} rule needs an integer number of steps >= {least}, got {steps!r}")
    most = _MOST_NODES if rule == "gauss-legendre" else _MOST_STEPS
    if steps > most:
        raise ValueError(
            f"the {rule} rule takes at most {most} steps, got {steps}; ig='exact' costs less and has no error"
        )


def _path_points(rule: str, steps: int, activation: Activation) -> list[tuple[float, float]]:
    """``(point, weight)`` of the quadrature; none where closed forms are to be used."""
    if rule == "exact":
        if activation.slope is not None:
            return []
        rule, steps = "gauss-legendre", FALLBACK_NODES
    points, weights = nodes(rule, steps)
    return list(zip(points.tolist(), weights.tolist(), strict=True))


def _short_path(x: Tensor) -> list[tuple[float, float]]:
    # On a path of length one the error of n nodes is about 6.4^-2n for tanh, whose poles are the nearest.
    points, weights = gauss_legendre(12 if x.dtype == torch.float64 else 6)
    return list(zip(points.tolist(), weights.tolist(), strict=True))


def _mean_derivative(z: Tensor, b: Tensor | None, activation: Activation, points: list[tuple[float, float]]) -> Tensor:
    total = torch.zeros_like(z)
    for a, weight in points:  # one at a time: [steps, N, F] would not fit
        total.add_(activation.derivative(z * a if b is None else torch.lerp(b, z, a)), alpha=weight)
    return total


def _mean_gated(
    u: Tensor, v: Tensor, start: tuple[Tensor, ...], activation: Activation, points: list[tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    c_u, c_v = torch.zeros_like(u), torch.zeros_like(u)
    for a, weight in points:
        at_u = torch.lerp(start[0], u, a) if start else u * a
        at_v = torch.lerp(start[1], v, a) if start else v * a
        c_u.add_(activation.derivative(at_u).mul_(at_v), alpha=weight)
        c_v.add_(activation.value(at_u), alpha=weight)
    return c_u, c_v


def _exact_slope(z: Tensor, b: Tensor | None, activation: Activation) -> Tensor:
    assert activation.slope is not None
    assert activation.rise is not None
    if b is None:
        return activation.slope(z)
    out = activation.rise(z, b)
    if not activation.polynomial:
        near = (z - b).abs() <= _NEAR
        out[near] = _mean_derivative(z[near], b[near], activation, _short_path(z))
    return out


def _exact_gated(u: Tensor, v: Tensor, start: tuple[Tensor, ...], activation: Activation) -> tuple[Tensor, Tensor]:
    assert activation.gated is not None
    assert activation.path is not None
    if not start:
        c_v, moment = activation.gated(u)
        return moment * v, c_v
    c_u, c_v = activation.path(u, v, *start)
    if not activation.polynomial:
        near = (u - start[0]).abs() <= _NEAR
        there = (start[0][near], start[1][near])
        c_u[near], c_v[near] = _mean_gated(u[near], v[near], there, activation, _short_path(u))
    return c_u, c_v


def _compute_in_blocks(
    compute: Callable[..., tuple[Tensor, ...]], results: int, x: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    """``compute`` on blocks of rows of ``x`` and of ``others`` (broadcast to it), widening half types."""
    if not x.is_floating_point():
        raise ValueError(f"pre-activations must be floating-point, got {x.dtype}")
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = x.shape if x.dim() else (1,)
    inputs = [t.expand(shape) for t in (x, *others) if t is not None]
    outputs = tuple(torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(results))
    limit = _BLOCK if x.device.type == "cpu" else _BLOCK << 7
    rows = max(1, limit * shape[0] // max(1, x.numel()))
    for first in range(0, shape[0], rows):
        block = slice(first, first + rows)
        for out, value in zip(outputs, compute(*(t[block].to(wide) for t in inputs)), strict=True):
            out[block] = value
    return tuple(out.view(x.shape) for out in outputs)
