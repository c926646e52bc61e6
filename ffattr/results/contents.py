"""What an `Attribution` holds, and how its maps are read: of a layer, of a sequence, without padding.

Shapes: ``L`` computed layers, ``B`` sequences, ``N`` selected query tokens, ``T`` tokens, ``C`` columns of maps:
tokens, or selected ones, or groups of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..analysis.rows import key_mask
from ..selection import Skipped, scope_named, sequence
from .kept.policy import Kept
from .kept.top import Top

__all__ = [
    "SHARED",
    "Contents",
    "Labelled",
    "Ticks",
    "describe_check",
    "describe_model",
    "describe_skipped",
    "drop_padding",
    "key_tokens",
    "label_axes",
    "mark_own_tokens",
    "name_columns",
    "number_expert",
    "read_map",
]

SKIPPED = "skipped"
"""The entry of the arguments of a result that lists what was left out."""

SHARED = -2
"""What stands for the shared expert among the numbers of experts, in `Attribution.experts`."""


def number_expert(expert: int | str) -> int:
    """Returns the number by which `Attribution.experts` has an expert. Raises ValueError or TypeError for none."""
    if expert == "shared":
        return SHARED
    if not isinstance(expert, int) or isinstance(expert, bool):
        raise TypeError(f"expert is {expert!r}, expected the number of one or 'shared'")
    if expert < 0:
        raise ValueError(f"expert is {expert}, expected a number from 0 on, or 'shared'")
    return expert


class Labelled:
    """What has tokens, and ``labels``: the same in the case of the text, None where nothing differs or is known."""

    tokens: list[list[str]]
    labels: list[list[str]] | None

    @property
    def names(self) -> list[list[str]]:
        """What tokens are called where they are shown: in the case of the text, where that is known."""
        return self.tokens if self.labels is None else self.labels


@dataclass(eq=False, repr=False)
class Contents(Labelled):
    """The fields of an `Attribution`, which says what they are, and its maps by name."""

    kept: Kept
    bias: dict[str, Tensor]
    tokens: list[list[str]]
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scopes: tuple[str, ...]
    mask: Tensor
    error: Tensor
    plan: object = None
    arguments: dict[str, Any] = field(default_factory=dict)
    key_tokens: list[list[str]] | None = None
    key_mask: Tensor | None = None
    groups: Tensor | None = None
    experts: Tensor | None = None
    shares: Tensor | None = None
    sketch_error: dict[str, Tensor] = field(default_factory=dict)
    labels: list[list[str]] | None = None

    @property
    def maps(self) -> dict[str, Tensor]:
        return self.kept.maps

    @maps.setter
    def maps(self, maps: dict[str, Tensor]) -> None:
        self.kept = replace(self.kept, maps=maps)  # anew: another result may hold the same one

    @property
    def largest(self) -> dict[str, Top]:
        return self.kept.largest

    @property
    def reduced(self) -> list[Any]:
        return self.kept.reduced

    @property
    def block(self) -> int | None:
        return self.kept.block

    @property
    def reduce(self) -> str:
        return str(self.arguments.get("reduce", "l2"))  # files of older versions hold norms

    @property
    def measure(self) -> str:
        """What an entry of the maps is called."""
        return {"l2": "norm", "l1": "L1 norm", "alti": "ALTI", "toward": "projection"}.get(self.reduce, self.reduce)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The inputs that were left out (``on_error="skip"``), and why."""
        return tuple(Skipped(*one) for one in self.arguments.get(SKIPPED, ()))

    @property
    def taken(self) -> tuple[int, ...]:
        """The place among the inputs of each sequence."""
        gone = {one.index for one in self.skipped}
        return tuple(index for index in range(len(self.mask) + len(gone)) if index not in gone)

    def scope(self, name: str) -> str:
        """Returns the name of a computed scope: ``"layer"`` is the last one. Raises `KeyError` listing the others."""
        return scope_named(name, self.scopes)

    def __getitem__(self, scope: str) -> Tensor:
        """Returns the maps of a scope: ``attr["atb_ff"]``, or ``attr["layer"]`` for the last one.

        Raises KeyError for a scope that was not computed, ValueError for one whose maps were not kept.
        """
        return self.kept.whole_map(self.scope(scope))


@dataclass(frozen=True)
class Ticks:
    """The rows or the columns of a map that are not padding: their ``indices`` ``[n]`` on its axis, the ``positions``
    ``[n]`` of their tokens (of a block of tokens, of its first), and how they are called."""

    indices: Tensor
    positions: Tensor
    labels: list[str]

    @classmethod
    def from_positions(cls, positions: Tensor, real: Tensor, tokens: Sequence[str], block: int | None) -> Ticks:
        """Names the rows or columns of an axis.

        ``positions`` ``[N]`` are those of the axis, ``real`` ``[N]`` False where they are padding, ``tokens`` the texts
        of all positions (none: their numbers). ``block`` tokens side by side are one row or column.
        """
        places = real.nonzero().flatten()
        names = [tokens[position] if tokens else str(position) for position in positions[places].tolist()]
        if block is None:
            return cls(places, positions[places], names)
        blocks, counts = (places // block).unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        spans = zip((ends - counts).tolist(), (ends - 1).tolist(), strict=True)
        labels = [names[first] if first == last else f"{names[first]} … {names[last]}" for first, last in spans]
        return cls(blocks, positions[places][ends - counts], labels)


def label_axes(contents: Contents, batch: int) -> tuple[Ticks, Ticks]:
    """Names the rows and the columns of the maps of sequence ``batch`` that are not padding."""
    batch = sequence(batch, len(contents.mask))
    real, keys = contents.mask[batch].cpu(), key_mask(contents)[batch].cpu()
    queries = torch.tensor(contents.queries, dtype=torch.int64)
    names = name_columns(contents)
    return (
        Ticks.from_positions(queries, real[queries], contents.names[batch] if contents.names else [], contents.block),
        Ticks.from_positions(torch.arange(len(keys)), keys, names[batch] if names else [], contents.block),
    )


def describe_model(arguments: Mapping[str, Any]) -> str:
    """Returns what the model of a result is called, and of which family it is; files of older versions tell the latter
    alone."""
    name, family = str(arguments.get("name", "")), str(arguments.get("model", ""))
    return f"{name} ({family})" if name and family else name or family


def describe_skipped(skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Returns what the arguments of a result have of inputs that were left out: nothing where none was."""
    return {SKIPPED: [list(astuple(one)) for one in skipped]} if skipped else {}


def describe_check(arguments: Mapping[str, Any]) -> str:
    """Returns what a line about a result adds where nobody compared it with its model."""
    return "; unchecked" if arguments.get("check") == "False" else ""


def key_tokens(contents: Contents) -> list[list[str]]:
    """Returns the texts of the columns: those of the queries' own tokens where there are no others."""
    return contents.tokens if contents.key_tokens is None else contents.key_tokens


def name_columns(contents: Contents) -> list[list[str]]:
    """Returns what the columns are called where they are shown."""
    return contents.names if contents.key_tokens is None else contents.key_tokens


def read_map(contents: Contents, scope: str, place: int, batch: int) -> Tensor:
    """Returns the map ``[..., N, C]`` of one layer and sequence; of the kept entries where these are all.

    Raises IndexError for a sequence that is not there.
    """
    columns = key_mask(contents).shape[1]
    return contents.kept.read_map(scope, place, sequence(batch, len(contents.mask)), columns)


def mark_own_tokens(contents: Contents, batch: int, rows: Ticks, keys: Ticks) -> Tensor:
    """Returns ``[n, m]``: True where a column is a query's own token (of a block, its own block), or has it."""
    columns = torch.tensor(contents.queries, dtype=torch.int64)
    if contents.groups is not None:
        columns = contents.groups[batch].cpu()[columns]
    elif contents.key_tokens is not None:  # an encoder's
        columns = torch.full_like(columns, -1)
    if contents.block is not None:
        columns = torch.div(columns[:: contents.block], contents.block, rounding_mode="floor")
    return columns[rows.indices, None] == keys.indices


def drop_padding(values: Tensor, rows: Ticks, keys: Ticks) -> Tensor:
    """Returns maps ``[..., N, C]`` without padding: ``[..., n, m]``."""
    return values[..., rows.indices, :][..., keys.indices]
