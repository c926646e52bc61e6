"""Mixtures of experts: feed-forward blocks of which a router picks a few for every token.

Shapes: ``E`` experts, of which each token goes to ``k``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Routing"]


@dataclass(frozen=True)
class Routing:
    """Which experts each of ``T`` tokens goes to, ``index`` ``[T, k]``, and what their outputs are multiplied by,
    ``weight`` ``[T, k]``; ``gain`` ``[T]`` is the same of the branch that all tokens go through, None where nothing
    multiplies that one. All are held fixed by the decomposition."""

    index: Tensor
    weight: Tensor
    gain: Tensor | None = None

    def of(self, tokens: Tensor) -> Routing:
        """The routing of the tokens ``tokens`` ``[N]`` alone."""
        gain = None if self.gain is None else self.gain.index_select(0, tokens)
        return Routing(self.index.index_select(0, tokens), self.weight.index_select(0, tokens), gain)

    def to(self, device: torch.device, dtype: torch.dtype) -> Routing:
        """The same on a device, its numbers in ``dtype``."""
        gain = None if self.gain is None else self.gain.to(device, dtype)
        return Routing(self.index.to(device), self.weight.to(device, dtype), gain)

    @classmethod
    def join(cls, parts: Sequence[Routing]) -> Routing:
        """The routing of the tokens of all ``parts``, one part after the other."""
        gains = [part.gain for part in parts if part.gain is not None]
        index, weight = torch.cat([part.index for part in parts]), torch.cat([part.weight for part in parts])
        return cls(index, weight, torch.cat(gains) if gains else None)

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
