"""Mixtures of experts: feed-forward blocks of which a router picks a few for every token.

Shapes: ``E`` experts, of which each token goes to ``k``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...decomposition.affine import Linear
from . import wrapped

__all__ = ["Stacked", "read_stacked"]


@dataclass(frozen=True)
class Stacked:
    """One projection of all experts, in one parameter of their module: ``weight`` ``[E, out, in]`` and maybe ``bias``.

    Its output features are ``start:stop:step`` of the parameter's, times ``factor``. ``out_last``: the weight is
    ``[E, in, out]``.
    """

    module: nn.Module
    weight: str
    bias: str | None = None
    start: int = 0
    stop: int | None = None
    step: int = 1
    out_last: bool = False
    factor: float = 1.0


def read_stacked(part: Stacked) -> Linear:
    """Reads the parameters of all experts, ``[E, in, out]`` and ``[E, out]``, in the model's dtype."""
    weight = wrapped.read_parameter(part.module, part.weight)
    bias = None if part.bias is None else wrapped.read_parameter(part.module, part.bias)
    weight = weight if part.out_last else weight.mT
    features = slice(part.start, part.stop, part.step)
    weight, bias = weight[..., features], None if bias is None else bias[:, features]
    if part.factor == 1:
        return Linear(weight, bias)
    return Linear(weight * part.factor, None if bias is None else bias * part.factor)
