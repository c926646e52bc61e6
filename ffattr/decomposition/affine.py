"""The two linear pieces of a layer: projections, and norms whose statistics are held fixed.

Conventions: row vectors, ``y = x @ weight + bias``; ``d`` model width, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Linear", "Norm"]


@dataclass(frozen=True)
class Linear:
    """``y = x @ weight + bias`` with ``weight`` ``[in, out]`` and ``bias`` ``[out]`` or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def of_expert(self, number: int, dtype: torch.dtype) -> Linear:
        """The projection of one expert, in ``dtype``, where ``weight`` ``[E, in, out]`` holds those of all."""
        return Linear(self.weight[number].to(dtype), None if self.bias is None else self.bias[number].to(dtype))


@dataclass(frozen=True)
class Norm:
    """LayerNorm (``kind="layer"``) or RMSNorm (``kind="rms"``), split into its linear part and its statistics.

    With the statistics of the whole input frozen, a norm is ``scale_i * linear(p) + bias``
    (Kobayashi et al. 2021, section 3.3): ``linear`` is the same for every token, ``scale`` is one number per token.
    What keeps it from dividing by zero is added to the mean square (``eps``) or to its root (``offset``).

    ``kind="gain"`` has no statistics: every dimension is multiplied by its gamma (Gemma 4's last step).
    """

    kind: Literal["layer", "rms", "gain"]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float = 0.0

    def scale(self, p: Tensor) -> Tensor:
        """``1 / s_i`` of the whole input ``p`` ``[..., d]``: shape ``[...]``."""
        return self.scale_centred(self.centre(p))

    def scale_centred(self, centred: Tensor) -> Tensor:
        """``1 / s_i`` of a whole input that has been centred."""
        if self.kind == "gain":
            return centred.new_ones(centred.shape[:-1])
        square = centred.square().mean(-1) + self.eps
        return torch.rsqrt(square) if self.offset == 0.0 else 1 / (square.sqrt() + self.offset)

    def centre(self, p: Tensor) -> Tensor:
        """What is done to ``p`` ``[..., d]`` first: a LayerNorm takes its mean off, an RMSNorm nothing."""
        return p - p.mean(-1, keepdim=True) if self.kind == "layer" else p

    def stretch(self, p: Tensor) -> Tensor:
        """What is done to ``p`` ``[..., d]`` last: every dimension is multiplied by its gamma."""
        return p if self.weight is None else p * self.weight

    def linear(self, p: Tensor) -> Tensor:
        """The part linear in ``p`` ``[..., d]`` without ``1 / s_i``: centring (LayerNorm only), then gamma."""
        return self.stretch(self.centre(p))

    def affine(self, p: Tensor, scale: Tensor) -> Tensor:
        """``scale * linear(p) + bias``: what becomes of the bias stream ``p`` ``[..., d]``."""
        y = self.linear(p) * scale[..., None]
        return y if self.bias is None else y + self.bias

    def __call__(self, p: Tensor) -> Tensor:
        return self.affine(p, self.scale(p))
