"""What a user may keep of maps: the policies, each in its own file of `ffattr.results.kept`, and the argument ``keep``.

A new one has its line in `_POLICIES`, in `Keep` and in the message of `parse_keep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .kept.dense import Dense
from .kept.policy import Kept, Policy
from .kept.pool import Pool
from .kept.reduce import Reduce, Rows
from .kept.top import Top, TopK

__all__ = ["Dense", "Keep", "Pool", "Reduce", "Rows", "Top", "TopK", "parse_keep", "restore_kept"]

Keep = Dense | TopK | Pool | Reduce

_POLICIES: tuple[type[Policy], ...] = (TopK, Pool, Reduce, Dense)  # Dense restores what no other one knows


def parse_keep(asked: object) -> Keep:
    """Returns what the argument ``keep`` of `ffattr.attribute` stands for. Raises TypeError or ValueError naming it."""
    if isinstance(asked, Keep):
        return asked
    expected = "expected 'dense', or ffattr.Dense(...), TopK(k), Pool(block) or Reduce(fn)"
    if isinstance(asked, str):
        if asked == "dense":
            return Dense()
        raise ValueError(f"unknown keep {asked!r}, {expected}")
    raise TypeError(f"keep is {asked!r}, {expected}")


def restore_kept(scopes: Sequence[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Kept:
    """Returns what a file holds of the maps of ``scopes``. Raises KeyError where it lacks a tensor."""
    found = (policy.kept.from_tensors(scopes, tensors, content) for policy in _POLICIES)
    return next(kept for kept in found if kept is not None)
