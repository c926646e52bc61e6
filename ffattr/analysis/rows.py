"""What analyses read: maps that were kept, or blocks of rows as they are computed.

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens, ``d`` model width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "AT_ONCE",
    "Block",
    "Decomposed",
    "KeptRows",
    "Maps",
    "NamedMaps",
    "check_one_stack",
    "check_same_run",
    "counted",
    "key_mask",
    "pairs",
    "pieces",
    "row_shares",
    "rows_of",
    "summed",
]

AT_ONCE = 2**20  # pairs that are worked on together, in 64 bits


class Maps(Protocol):
    """What analyses read of an `ffattr.Attribution`."""

    @property
    def maps(self) -> Mapping[str, Tensor]: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def queries(self) -> Sequence[int]: ...
    @property
    def scopes(self) -> Sequence[str]: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def key_mask(self) -> Tensor | None: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


class NamedMaps(Maps, Protocol):
    """Maps and what their tokens are called."""

    @property
    def tokens(self) -> Sequence[Sequence[str]]: ...
    @property
    def key_tokens(self) -> Sequence[Sequence[str]] | None: ...


class Block(Protocol):
    """What analyses of a stream read of an `ffattr.Rows`."""

    @property
    def layer(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def queries(self) -> Tensor: ...
    @property
    def keys(self) -> Tensor: ...
    @property
    def maps(self) -> Mapping[str, Tensor]: ...


class Decomposed(Protocol):
    """What analyses read of `ffattr.Vectors`."""

    @property
    def values(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor: ...
    @property
    def total(self) -> Tensor: ...
    @property
    def tokens(self) -> Sequence[Sequence[str]]: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def queries(self) -> Sequence[int]: ...
    @property
    def scope(self) -> str: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def key_mask(self) -> Tensor | None: ...


def key_mask(attribution: Maps) -> Tensor:
    """Which columns of the maps are real, ``[B, T]``: those of the queries' own tokens where there are no others."""
    return attribution.mask if attribution.key_mask is None else attribution.key_mask


def counted(attribution: Maps) -> list[Tensor]:
    """Per sequence ``[N, T]``: True at the pairs that count."""
    causal = bool(attribution.arguments.get("causal"))
    return pairs(attribution.mask, key_mask(attribution), attribution.queries, causal)


def pairs(mask: Tensor, keys: Tensor, queries: Sequence[int], causal: bool) -> list[Tensor]:
    """Per sequence ``[N, T]``: True at pairs of real tokens, with ``causal`` those with no key after the query.

    ``mask`` and ``keys`` ``[B, T]`` are True at the real ones of rows and of columns.
    """
    rows = torch.tensor(list(queries), dtype=torch.long, device=mask.device)
    allowed = torch.ones(len(rows), keys.shape[1], dtype=torch.bool, device=mask.device)
    if causal:
        allowed = torch.arange(keys.shape[1], device=mask.device) <= rows[:, None]
    return [row[rows][:, None] & key[None, :] & allowed for row, key in zip(mask, keys, strict=True)]


def summed(vectors: Decomposed) -> Tensor:
    """``values`` ``[L, B, N, T, d]``. Raises ValueError where they are told apart by head or by expert."""
    if vectors.values.dim() != 5:
        raise ValueError(
            f"the vectors of {vectors.scope} are told apart by head or by expert, expected those of a scope that sums "
            "over them, such as 'atb'"
        )
    return vectors.values


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows of kept maps in the form in which a stream brings them, a `Block`.

    ``place`` is that of the layer, ``rows`` ``[n]`` those of the queries on the axes of the kept maps.
    """

    layer: int
    batch: int
    queries: Tensor
    keys: Tensor
    maps: Mapping[str, Tensor]
    place: int
    rows: Tensor


def rows_of(
    attribution: Maps,
    scopes: Sequence[str],
    collector: str,
    layers: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
) -> Iterator[KeptRows]:
    """All rows of one layer and sequence at a time, real tokens only, as `ffattr.Reduce` hands them on in pieces.

    ``layers`` and ``batches`` are places on the axes of the maps (None: all). Raises ValueError where whole maps of
    ``scopes`` were not kept, naming the ``collector`` that needs none, and TypeError for several stacks of layers.
    """
    check_one_stack(attribution)
    keys_of = key_mask(attribution)
    queries = torch.tensor(list(attribution.queries), dtype=torch.long, device=attribution.mask.device)
    sizes = (len(attribution.layers), len(attribution.mask), len(queries), keys_of.shape[1])
    for scope in scopes:
        if scope not in attribution.maps or attribution.maps[scope].shape != sizes:
            raise ValueError(
                f"no whole maps of {scope} were kept: compute it with keep='dense', or with "
                f"keep=ffattr.Reduce(collector) of an ffattr.analysis.{collector}, which needs no maps"
            )
    for place in range(sizes[0]) if layers is None else layers:
        for batch in range(sizes[1]) if batches is None else batches:
            rows, keys = attribution.mask[batch][queries].nonzero()[:, 0], keys_of[batch].nonzero()[:, 0]
            tiles = {}
            for scope in scopes:
                tile = attribution.maps[scope][place, batch]
                tiles[scope] = tile[rows.to(tile.device)][:, keys.to(tile.device)]
            yield KeptRows(attribution.layers[place], batch, queries[rows], keys, tiles, place, rows)


def check_one_stack(attribution: object) -> None:
    """Raises TypeError for an `ffattr.StackedAttribution`."""
    stacks = getattr(attribution, "stacks", None)
    if stacks is not None:
        names = " or ".join(f"attr.stacks[{name!r}]" for name in stacks)
        raise TypeError(f"these are the maps of several stacks of layers: analyse one of them, {names}")


def check_same_run(attribution: Maps, layers: Collection[int], sequences: int, tokens: int) -> None:
    """What was collected of ``layers`` and of so many sequences and tokens, or more, is of this attribution.

    Raises ValueError where it is not, TypeError for an `ffattr.StackedAttribution`.
    """
    check_one_stack(attribution)
    most = attribution.mask.shape
    if not set(layers) <= set(attribution.layers) or sequences > most[0] or tokens > most[1]:
        raise ValueError(
            f"collected of the layers {sorted(layers)} and of at least {sequences} sequences of {tokens} tokens, but "
            f"this attribution is of the layers {sorted(attribution.layers)} and of {most[0]} sequences of {most[1]}: "
            "give the one that the same call of attribute returned"
        )


def pieces(rows: Block, scopes: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """``(queries [n], keys [t], [tile [n, t] of each scope])`` of a few rows at a time, all on the tiles' device."""
    tiles = [rows.maps[scope] for scope in scopes]
    device = tiles[0].device
    queries, keys = rows.queries.to(device), rows.keys.to(device)
    step = max(1, AT_ONCE // max(1, len(keys)))
    for start in range(0, len(queries), step):
        some = slice(start, start + step)
        yield queries[some], keys, [tile[some] for tile in tiles]


def row_shares(tile: Tensor) -> Tensor:
    """Every row of ``tile`` ``[n, t]`` over its sum, in float64; a row of zeros stays one."""
    wide = tile.double()
    total = wide.sum(-1, keepdim=True)
    return wide / total.masked_fill(total == 0, 1)
