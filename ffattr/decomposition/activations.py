"""Feed-forward activations with what Integrated Gradients needs of them in closed form.

Every function here is element-wise and expects float32 or float64 (`ffattr.decomposition.integrated_gradients` widens
half types first). The formulas are in `ffattr.decomposition.closed_forms`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import closed_forms as forms
from .closed_forms import Function, Pair

__all__ = ["ACTIVATIONS", "FALLBACK_NODES", "Activation", "make_swish"]


FALLBACK_NODES = 64


"""Gauss-Legendre nodes of the "exact" rule for an activation that has no closed form here: 1e-12 for functions as
smooth as softplus on ``|z| <= 100``; a kink inside the path costs about ``1 / FALLBACK_NODES``."""


@dataclass(frozen=True)
class Activation:
    """An element-wise function ``g`` with its derivative and, where known, its Integrated-Gradients factors.

    The fields from ``gated`` on serve `ffattr.decomposition.integrated_gradients` and are None together with ``slope``:
    ``gated(u)``: ``(integral_0^1 g(a u) da, integral_0^1 a g'(a u) da)``;
    ``rise(z, b)``: ``(g(z) - g(b)) / (z - b)``; ``path(u, v, u0, v0)``: ``(C_u, C_v)`` of a gated block whose path
    starts at ``(u0, v0)``. ``rise`` and ``path`` are accurate for ``|z - b| >= 1``, everywhere if ``polynomial``.
    """

    name: str
    value: Function
    derivative: Function
    slope: Function | None = None  # (g(z) - g(0)) / z, g'(0) at z = 0
    gated: Callable[[Tensor], Pair] | None = None
    rise: Callable[[Tensor, Tensor], Tensor] | None = None
    path: Callable[[Tensor, Tensor, Tensor, Tensor], Pair] | None = None
    polynomial: bool = False  # piecewise polynomial: closed forms hold at any distance, kinks forbid quadrature

    @cached_property
    def at_zero(self) -> float:
        """``g(0)``, where most paths of Integrated Gradients start."""
        return float(self.value(torch.zeros((), dtype=torch.float64)))


def _self_gated(name: str, slope: Function, slope_derivative: Function, moment: Function) -> Activation:
    """``g(z) = z s(z)`` from ``s``, ``s'`` and the moment of ``s`` (see `ffattr.decomposition.closed_forms`)."""

    # Far from zero g is ReLU plus this bounded tail, so that differences between large arguments lose no digits.
    def tail(z: Tensor) -> Tensor:
        return -z.abs() * slope(-z.abs())

    def tail_integral(z: Tensor) -> Tensor:
        return -z * z.abs() * moment(-z.abs())

    def gated(u: Tensor) -> Pair:
        r = moment(u)
        return u * r, slope(u) - r

    def rise(z: Tensor, b: Tensor) -> Tensor:
        return forms.relu_rise(z, b) + (tail(z) - tail(b)) / (z - b)

    def path(u: Tensor, v: Tensor, u0: Tensor, v0: Tensor) -> Pair:
        c_u, c_v = forms.relu_path(u, v, u0, v0)
        mean = (tail_integral(u) - tail_integral(u0)) / (u - u0)
        by_parts = (tail(u) * v - tail(u0) * v0 - (v - v0) * mean) / (u - u0)
        return c_u + by_parts, c_v + mean

    return Activation(
        name,
        value=lambda z: z * slope(z),
        derivative=lambda z: slope(z) + z * slope_derivative(z),
        slope=slope,
        gated=gated,
        rise=rise,
        path=path,
    )


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        _self_gated("gelu", forms.normal, forms.density, forms.gelu_moment),
        _self_gated("gelu_tanh", forms.gelu_tanh_slope, forms.gelu_tanh_slope_derivative, forms.gelu_tanh_moment),
        _self_gated(
            "quick_gelu",
            forms.quick_slope,
            lambda z: forms.sigmoid_derivative(z * forms.QUICK) * forms.QUICK,
            lambda u: forms.silu_moment(u * forms.QUICK),
        ),
        _self_gated("silu", torch.sigmoid, forms.sigmoid_derivative, forms.silu_moment),
        Activation(
            "relu",
            value=forms.relu,
            derivative=forms.step,
            slope=forms.step,
            gated=lambda u: (forms.relu(u) / 2, forms.step(u) / 2),
            rise=forms.relu_rise,
            path=forms.relu_path,
            polynomial=True,
        ),
        Activation(
            "relu2",
            value=lambda z: forms.relu(z).square(),
            derivative=lambda z: forms.relu(z) * 2,
            slope=forms.relu,
            gated=lambda u: (forms.relu(u).square() / 3, forms.relu(u) * (2 / 3)),
            rise=lambda z, b: forms.relu_rise(z, b) * (forms.relu(z) + forms.relu(b)),
            path=forms.relu2_path,
            polynomial=True,
        ),
        Activation(
            "tanh",
            value=torch.tanh,
            derivative=forms.tanh_derivative,
            slope=forms.tanh_slope,
            gated=forms.tanh_gated,
            rise=forms.tanh_rise,
            path=forms.tanh_path,
        ),
        Activation(
            "sigmoid",
            value=torch.sigmoid,
            derivative=forms.sigmoid_derivative,
            slope=lambda z: forms.tanh_slope(z / 2) / 4,
            gated=forms.sigmoid_gated,
            rise=lambda z, b: forms.tanh_rise(z / 2, b / 2) / 4,
            path=forms.sigmoid_path,
        ),
    )
}


"""Every activation with closed forms, by name."""


def make_swish(alpha: float) -> Activation:
    """Returns the activation ``z sigmoid(alpha z)``, which has closed forms for two values of ``alpha``."""
    known = {1.0: "silu", forms.QUICK: "quick_gelu"}
    if alpha in known:
        return ACTIVATIONS[known[alpha]]

    def apply_swish(z: Tensor) -> Tensor:
        return z * torch.sigmoid(alpha * z)

    def differentiate_swish(z: Tensor) -> Tensor:
        s = torch.sigmoid(alpha * z)
        return s + alpha * z * s * (1 - s)

    return Activation(f"swish({alpha})", apply_swish, differentiate_swish)
