"""Mixtures of experts: feed-forward blocks of which a router picks a few for every token.

Shapes: ``E`` experts, of which each token goes to ``k``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import loaded
from .parameters import Linear

__all__ = ["Routing", "Stacked", "expert", "stacked"]


@dataclass(frozen=True)
class Stacked:
    """One projection of all experts, in one parameter of their module: ``weight`` ``[E, out, in]`` and maybe ``bias``.

    Its output features are ``start:stop:step`` of the parameter's. ``out_last``: the weight is ``[E, in, out]``.
    """

    module: nn.Module
    weight: str
    bias: str | None = None
    start: int = 0
    stop: int | None = None
    step: int = 1
    out_last: bool = False


@dataclass(frozen=True)
class Routing:
    """Which experts each of ``T`` tokens goes to, ``index`` ``[T, k]``, and what their outputs are multiplied by,
    ``weight`` ``[T, k]``. Both are held fixed by the decomposition."""

    index: Tensor
    weight: Tensor

    def of(self, tokens: Tensor) -> Routing:
        """Of the tokens ``tokens`` ``[N]`` alone."""
        return Routing(self.index.index_select(0, tokens), self.weight.index_select(0, tokens))

    def by_expert(self) -> list[tuple[int, Tensor, Tensor]]:
        """``(expert, tokens [n], slots [n])`` of every expert that any token goes to: its place in their row of
        ``index``."""
        found = []
        for number in self.index.unique().tolist():
            tokens, slots = (self.index == number).nonzero(as_tuple=True)
            found.append((number, tokens, slots))
        return found

    def by_set(self) -> list[tuple[tuple[int, ...], Tensor, Tensor]]:
        """``(experts, tokens [n], slots [n, k])`` of every set of experts that any token goes to.

        ``slots[i, j]`` is the place of ``experts[j]`` in token ``tokens[i]``'s row of ``index``.
        """
        ordered, slots = self.index.sort(-1)
        sets, members = ordered.unique(dim=0, return_inverse=True)
        found = []
        for number, experts in enumerate(sets.tolist()):
            tokens = (members == number).nonzero()[:, 0]
            found.append((tuple(experts), tokens, slots[tokens]))
        return found


def stacked(part: Stacked) -> Linear:
    """The parameters of all experts, ``[E, in, out]`` and ``[E, out]``, in the model's dtype."""
    with loaded.fetched(part.module):
        weight = loaded.dense(getattr(part.module, part.weight))
        bias = None if part.bias is None else loaded.dense(getattr(part.module, part.bias))
    weight = weight if part.out_last else weight.mT
    features = slice(part.start, part.stop, part.step)
    return Linear(weight[..., features], None if bias is None else bias[:, features])


def expert(projection: Linear, number: int, dtype: torch.dtype) -> Linear:
    """The projection of one expert, in ``dtype``."""
    weight, bias = projection.weight[number], projection.bias
    return Linear(weight.to(dtype), None if bias is None else bias[number].to(dtype))
