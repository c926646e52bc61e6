"""PyTorch's own activations, and their path integrals by composite quadrature."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ffattr.decomposition import integrated_gradients as ig

OFFICIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu2": lambda x: F.relu(x).square(),
}
NAMES = list(OFFICIAL)
VALUES = [0, 1e-12, 1e-3, 0.5, 0.999, 1.001, 1.7, 3, 5.5, 6.99, 7.01, 30, 100, 1e4]
VALUES += [-x for x in VALUES[1:]]


def derivative(g: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(g(x).sum(), x)[0]


def path_integrals(g: Callable[[Tensor], Tensor], u0: float, u: float, v0: float, v: float) -> tuple[float, ...]:
    """``(integral g'(u(a)) da, integral g'(u(a)) v(a) da, integral g(u(a)) da)`` on panels that are short near zero."""
    cuts = {0.25 * k for k in range(-240, 241)} | {s * 60 * 2.0**k for s in (-1, 1) for k in range(1, 12)}
    inner = sorted(c for c in cuts if min(u0, u) < c < max(u0, u))
    edges = torch.tensor([u0, *(inner if u > u0 else inner[::-1]), u], dtype=torch.float64)
    a = (edges - u0) / (u - u0) if u != u0 else torch.tensor([0.0, 1.0], dtype=torch.float64)
    points, weights = ig.nodes("gauss-legendre", 20)
    width = a.diff()[:, None]
    at = a[:-1, None] + width * points
    at_u, at_v = u0 + at * (u - u0), v0 + at * (v - v0)
    slope = derivative(g, at_u)
    return tuple((y * width * weights).sum().item() for y in (slope, slope * at_v, g(at_u)))


def check(actual: Tensor, expected: list[float], tolerance: float) -> None:
    reference = torch.tensor(expected, dtype=torch.float64)
    error = (actual.double() - reference).abs() / reference.abs().clamp_min(1)
    assert error.max() <= tolerance, (error.argmax().item(), error.max().item())  # a NaN fails too
