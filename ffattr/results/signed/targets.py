"""Some of the numbers that contributions are for, and their sum: what is given to a sum is the sum of what is given.

Shapes: ``K`` numbers of ``B`` sequences, ``n`` of them chosen; ``M`` boundaries, ``L`` layers, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...selection import integer
from ..kept.dense import DenseMaps
from ..kept.policy import Kept
from .contents import FLOW, SignedContents, measure_error, split_targets

__all__ = ["add_targets", "check_numbers", "select_target"]

_OF_NUMBERS = ("value", "scores", "bias", "residual", "cross_scores")
"""The fields whose first axis is that of numbers."""

_OF_SUMS = ("value", "bias", "scores", "cross_scores")
"""Those of a sum and what it is made of."""


def check_numbers(contents: SignedContents, numbers: Sequence[int] | None) -> list[int]:
    """Returns which of the ``K`` numbers are meant, None: all. Raises IndexError or ValueError."""
    count = len(contents.value)
    if numbers is not None and not isinstance(numbers, Sequence):
        raise TypeError(f"targets is {numbers!r}, expected a sequence of numbers of targets, or None")
    asked = list(range(count)) if numbers is None else [integer("a target", one) for one in numbers]
    if not asked or len(set(asked)) < len(asked):
        raise ValueError(f"targets are {asked}, expected each of some numbers once")
    for one in asked:
        if not 0 <= one < count:
            raise IndexError(f"target {one} does not exist; there are {count}, from 0 to {count - 1}")
    return asked


def select_target(contents: SignedContents, number: int) -> dict[str, Any]:
    """Returns the fields that `Contributions.select` changes, but for ``encoder``."""
    fields = {name: None if part is None else part[number : number + 1] for name, part in _list_parts(contents)}
    return {
        **fields,
        "residual": None,
        "error": contents.error[number : number + 1],
        "targets": contents.targets[number : number + 1],
        "positions": contents.positions[number : number + 1],
        "kept": None,
        "cross_kept": None,
    }


def add_targets(contents: SignedContents, numbers: Sequence[int], name: str | None) -> dict[str, Any]:
    """Returns the fields that `Contributions.add_targets` changes, but for ``encoder``."""
    fields = {
        part: None if of is None else of[list(numbers)].sum(0, keepdim=True) for part, of in _list_parts(contents)
    }
    value, bias, *parts = (one for name in _OF_SUMS if (one := fields[name]) is not None)
    names = [[contents.targets[number][row] for number in numbers] for row in range(len(contents.mask))]
    places = contents.positions[list(numbers)]
    same = (places == places[:1]).all(0, keepdim=True)
    return {
        **fields,
        "error": measure_error(value[:, None], bias, parts).amax(1),
        "targets": [[" + ".join(of_row) if name is None else name for of_row in names]],
        "positions": torch.where(same, places[:1], torch.full_like(places[:1], -1)),
        "kept": _add_maps(contents.kept, len(contents.value), numbers),
        "cross_kept": _add_maps(contents.cross_kept, len(contents.value), numbers),
    }


def _list_parts(contents: SignedContents) -> list[tuple[str, Tensor | None]]:
    return [(name, getattr(contents, name)) for name in _OF_NUMBERS]


def _add_maps(kept: Kept | None, count: int, numbers: Sequence[int]) -> Kept | None:
    """Adds up whole maps ``[K L, B, ...]``; what was kept otherwise is left out."""
    if not isinstance(kept, DenseMaps):
        return None
    return replace(kept, maps={FLOW: split_targets(kept, count)[list(numbers)].sum(0)})
