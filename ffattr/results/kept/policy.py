"""What every ``keep=`` policy has: a `Policy` is asked for, its `Sink` takes the rows, a `Kept` stays.

    sink = keep.parse_keep(asked).open(shapes, dtype, device, layers, queries)
    try:
        sink.add_rows(place, batch, rows, keys, tiles)  # for each block of query tokens, in any cuts and order
        result = Attribution(kept=sink.finish(), ...)
        sink.seal_file(*serialise.to_parts(result))  # names the file of Dense(path=...)
    except BaseException:
        sink.discard_file()
        raise

Shapes: ``L`` computed layers, ``B`` sequences, ``N`` selected query tokens, ``T`` tokens, ``n`` and ``t`` of them in a
block; scopes with an axis of heads or experts have it before ``N``, in everything that is kept of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import psutil
import torch
from torch import Tensor

__all__ = [
    "Kept",
    "Policy",
    "SavedPart",
    "Shapes",
    "Sink",
    "check_count",
    "require_room",
    "require_room_for",
    "write_tile",
]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the maps of every scope, ``[L, B, N, T]`` or with one more axis before ``N``. All have the same keys."""


class SavedPart(NamedTuple):
    """A tensor of a scope in a file: ``what`` messages call it and what its last axes, those of queries and columns,
    should be. Numbers of columns are from -1 to ``below`` - 1; None: it holds no such numbers."""

    what: str
    tensor: Tensor
    inner: tuple[int, ...]
    below: int | None = None


@dataclass(eq=False)
class Kept:
    """What is kept of the maps of one stack of layers, read by its methods whatever the policy.

    ``maps``, ``largest``, ``reduced`` and ``block`` are those of `ffattr.Attribution`. The methods are right for a
    policy with ``maps``; another one says otherwise in its own file.
    """

    maps: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Any] = field(default_factory=dict)
    reduced: list[Any] = field(default_factory=list)
    block: int | None = None

    # In and out of a file.

    def can_save(self, scope: str) -> bool:
        """Whether there is something of ``scope`` for a file."""
        return self.can_show(scope)

    def list_tensors(self, scopes: Collection[str]) -> dict[str, Tensor]:
        """Returns what a file holds of ``scopes``, by its name there."""
        return {f"maps.{scope}": self.maps[scope] for scope in scopes if scope in self.maps}

    def file_description(self) -> dict[str, Any]:
        """Returns what a file says of it besides tensors, as JSON takes it."""
        return {"block": self.block}

    @classmethod
    def from_tensors(
        cls, scopes: Sequence[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]
    ) -> Kept | None:
        """Undoes `list_tensors` and `file_description`; None where the file is of another policy.

        Raises KeyError where it lacks a tensor.
        """
        return None

    def list_sizes(self, scope: str, queries: int, columns: int) -> Iterator[SavedPart]:
        """Yields what is saved of ``scope``.

        ``queries`` and ``columns`` are their numbers in whole maps.
        """
        block = self.block or 1
        yield SavedPart("the map", self.maps[scope], (math.ceil(queries / block), math.ceil(columns / block)))

    # What views read.

    def can_show(self, scope: str) -> bool:
        """Whether `read_map` has something of ``scope`` to show."""
        return scope in self.maps

    def read_map(self, scope: str, place: int, batch: int, columns: int) -> Tensor:
        """Returns the map ``[..., N, columns]`` of one layer and sequence; of the kept entries where these are all."""
        return self.whole_map(scope)[place, batch]

    def read_entries(
        self, scope: str, batch: int, rows: Tensor, columns: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns entries ``[L, ..., n, m]`` of one sequence, and key positions that broadcast to them (-1: none).

        ``rows`` ``[n]`` and ``columns`` ``[m]`` are the real ones of the maps, ``positions`` those of the columns.
        """
        return self.whole_map(scope)[:, batch].cpu()[..., rows, :][..., columns], positions

    def read_totals(self, scope: str, place: int, batch: int) -> Tensor:
        """Returns the sum ``[..., N]`` of every row of a map, whatever is kept of it, in float64."""
        return self.whole_map(scope)[place, batch].cpu().double().sum(-1)

    def whole_map(self, scope: str) -> Tensor:
        """Returns the maps ``[L, B, ..., N, T]`` of ``scope``. Raises ValueError where they were not kept."""
        if scope not in self.maps:
            raise ValueError(self.explain_no_map(scope))
        return self.maps[scope]

    # What is said of it.

    def describe(self) -> str:
        """Returns what a line about the result adds, beginning with "; "; nothing of whole maps."""
        return ""

    def explain_no_map(self, scope: str) -> str:
        """Returns why there is no map of ``scope``, and what to do."""
        return f"no map of {scope} was kept. For maps compute it with keep='dense'"

    def explain_unsaved(self, scope: str) -> str:
        """Returns why nothing of ``scope`` can be saved, and what to do."""
        return f"nothing to save of {scope}: {self.explain_no_map(scope)}"

    def check_tokens(self) -> None:
        """Raises ValueError where rows and columns are no tokens, which could be merged to words."""


class Sink:
    """Takes the rows of one stack of layers."""

    def add_rows(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        """Takes whole rows ``rows`` ``[n]`` of the maps at ``place`` on the layer axis, ``batch`` on that of sequences.

        ``tiles[scope]`` ``[..., n, t]`` has the columns ``keys`` ``[t]``: all real keys, ascending. Every row of a
        layer and sequence comes once, with all scopes that the layer has; rows of padding never do.
        """
        raise NotImplementedError

    def finish(self) -> Kept:
        """Returns what is kept, after the last row."""
        raise NotImplementedError

    def seal_file(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Makes the file of what `finish` gave and of what else there is, where the policy has one.

        ``tensors`` and ``content`` are those of `ffattr.results.serialise.to_parts`.
        """

    def discard_file(self) -> None:
        """Leaves nothing on the disk; instead of `finish` or `seal_file`, when something failed."""


class Policy:
    """What a user asks for with ``keep=``."""

    kept: ClassVar[type[Kept]]
    """What it leaves."""

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Sink:
        """Returns the sink of maps of these ``shapes``, computed in ``dtype``; their numbers are kept on ``device``.

        ``layers`` and ``queries`` are the model's numbers of the first axis and the positions of the rows.
        """
        raise NotImplementedError

    def check_stacks(self) -> None:
        """Raises ValueError where it holds one stack of layers only, not an encoder and a decoder."""


def check_count(what: str, name: str, value: object) -> None:
    """Raises TypeError or ValueError where ``value``, the argument ``name`` of ``what``, is no integer from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what}({name}={value!r}), expected an integer of at least 1")
    if not 1 <= value < 2**63:
        raise ValueError(f"{what}({name}={value}), expected at least 1{' and less than 2**63' * (value > 0)}")


def require_room(what: str, numbers: int, itemsize: int, remedy: str) -> None:
    """Raises ValueError where so many ``numbers`` are more than the free memory takes, before anything is computed."""
    needed, free = numbers * itemsize, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{what} would take {needed / 2**30:,.1f} GiB, more than the {free / 2**30:,.1f} GiB that are free; "
            f"{remedy}"
        )


def require_room_for(policy: Policy, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError where what ``policy`` keeps, ``numbers`` of ``dtype``, is beyond the free memory of a CPU."""
    if device.type == "cpu":
        remedy = (
            "ask for fewer layers, queries or scopes, or for less with keep=TopK(k), Pool(block) or Dense(path=...)"
        )
        require_room(f"what keep={policy} holds", numbers, dtype.itemsize, remedy)


def write_tile(maps: Tensor, rows: Tensor, keys: Tensor, tile: Tensor) -> None:
    """Writes ``tile`` into rows and columns of ``maps`` ``[..., N, T]``, in its dtype and on its device."""
    at, columns = _as_slice(rows), _as_slice(keys)
    if isinstance(at, slice) and isinstance(columns, slice):
        maps[..., at, columns].copy_(tile)  # many times as fast, and with no copy before
        return
    if not isinstance(at, slice):
        at = at.to(maps.device) if isinstance(columns, slice) else at.to(maps.device)[:, None]
    if not isinstance(columns, slice):
        columns = columns.to(maps.device)
    maps[..., at, columns] = tile.to(maps)


def _as_slice(index: Tensor) -> slice | Tensor:
    """Returns a slice where ``index`` counts up by ones."""
    places = index.tolist()
    first = places[0] if places else 0
    return slice(first, first + len(places)) if places == list(range(first, first + len(places))) else index
