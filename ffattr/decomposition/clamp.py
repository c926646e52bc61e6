"""Gated feed-forward blocks that cut gate and up off before they meet (gpt-oss).

With gate ``u`` and up ``v``: ``phi(min(u, limit)) * (clip(v, -limit, limit) + offset)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import integrated_gradients as ig
from .activations import Activation

__all__ = ["Clamp"]


@dataclass(frozen=True)
class Clamp:
    """Cuts the gate off above ``limit`` and up on both sides of it, and adds ``offset`` to up afterwards."""

    limit: float
    offset: float

    def value(self, z: Tensor, activation: Activation) -> Tensor:
        """The block's hidden activation ``[..., F]`` of gate and up ``z`` ``[2, ..., F]``."""
        return activation.value(self._clamp_gate(z[0])) * self._clamp_up(z[1])

    def slopes(self, z: Tensor, activation: Activation, rule: str, steps: int, base: Tensor | None) -> Tensor:
        """Integrated-Gradients factors like `ffattr.decomposition.integrated_gradients.slopes`, ``[2, N, F]`` as ``z``.

        The path from ``base`` to ``z`` is straight before the cut, and so after it between the at most three points
        where gate or up reach a limit; what is cut off has no derivative.
        """
        start = torch.zeros_like(z) if base is None else base.expand_as(z)
        if rule != "exact":
            return self._average_factors(z, start, activation, rule, steps)
        # Where on the path, from 0 to 1, a limit is crossed; of a limit that is not, nan and infinity become an end.
        step = z - start
        limits = torch.stack([self.limit - start[0], self.limit - start[1], -self.limit - start[1]])
        crossings = (limits / step[[0, 1, 1]]).nan_to_num(0.0, 1.0, 0.0).clamp(0, 1).sort(0).values
        out = torch.zeros_like(z)
        for a, b in zip((0, *crossings), (*crossings, 1), strict=True):
            first, last, middle = (start + step * place for place in (a, b, (a + b) / 2))
            ends = [(self._clamp_gate(point[0]), self._clamp_up(point[1])) for point in (last, first)]
            factors = ig.gated_slopes(*ends[0], activation, base=ends[1])
            for to, factor, inside in zip(out, factors, self._inside_limits(middle), strict=True):
                to += factor * inside * (b - a)
        return out

    def _average_factors(self, z: Tensor, start: Tensor, activation: Activation, rule: str, steps: int) -> Tensor:
        out = torch.zeros_like(z)
        points, weights = ig.nodes(rule, steps)
        for a, weight in zip(points.tolist(), weights.tolist(), strict=True):
            at = torch.lerp(start, z, a)
            u, v = self._clamp_gate(at[0]), self._clamp_up(at[1])
            gate_inside, up_inside = self._inside_limits(at)
            out[0].add_(activation.derivative(u) * v * gate_inside, alpha=weight)
            out[1].add_(activation.value(u) * up_inside, alpha=weight)
        return out

    def _clamp_gate(self, u: Tensor) -> Tensor:
        return u.clamp(max=self.limit)

    def _clamp_up(self, v: Tensor) -> Tensor:
        return v.clamp(-self.limit, self.limit) + self.offset

    def _inside_limits(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[0] <= self.limit, z[1].abs() <= self.limit
