"""What analyses read: maps that were kept, or blocks of rows as they are computed, and what names of scopes say.

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
    "find_bypass",
    "find_components",
    "find_ff_output",
    "find_scopes_around_ff",
    "has_ff_component",
    "iterate_rows",
    "join_residual",
    "key_mask",
    "mark_counted_pairs",
    "mark_real_pairs",
    "read_names",
    "read_summed_values",
    "row_shares",
    "split_rows",
]

AT_ONCE = 2**20  # pairs that are worked on together, in 64 bits
_COMPONENTS = {"ff": "FF", "res": "RES", "ln": "LN"}
_BLOCK = "FF block"


class Maps(Protocol):
    """Names what analyses read of an `ffattr.Attribution`."""

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
    """Adds what the tokens of the maps are called."""

    @property
    def tokens(self) -> Sequence[Sequence[str]]: ...
    @property
    def key_tokens(self) -> Sequence[Sequence[str]] | None: ...


class Block(Protocol):
    """Names what analyses of a stream read of an `ffattr.Rows`."""

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
    """Names what analyses read of `ffattr.Vectors`."""

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


def read_names(maps: NamedMaps | Decomposed) -> Sequence[Sequence[str]]:
    """Returns what tokens are called where they are shown: in the case of the text, where the maps know it."""
    names: Sequence[Sequence[str]] = getattr(maps, "names", maps.tokens)
    return names


def key_mask(attribution: Maps) -> Tensor:
    """Returns which columns of the maps are real, ``[B, T]``: those of the queries' own tokens or of others."""
    return attribution.mask if attribution.key_mask is None else attribution.key_mask


def mark_counted_pairs(attribution: Maps) -> list[Tensor]:
    """Returns ``[N, T]`` per sequence, True at the pairs that count."""
    causal = bool(attribution.arguments.get("causal"))
    return mark_real_pairs(attribution.mask, key_mask(attribution), attribution.queries, causal)


def mark_real_pairs(mask: Tensor, keys: Tensor, queries: Sequence[int], causal: bool) -> list[Tensor]:
    """Returns ``[N, T]`` per sequence, True at pairs of real tokens, with ``causal`` those with no key after the query.

    ``mask`` and ``keys`` ``[B, T]`` are True at the real ones of rows and of columns.
    """
    rows = torch.tensor(list(queries), dtype=torch.long, device=mask.device)
    allowed = torch.ones(len(rows), keys.shape[1], dtype=torch.bool, device=mask.device)
    if causal:
        allowed = torch.arange(keys.shape[1], device=mask.device) <= rows[:, None]
    return [row[rows][:, None] & key[None, :] & allowed for row, key in zip(mask, keys, strict=True)]


def _name_value(value: object) -> str:
    """Returns what a message calls a value that may be large."""
    return f"a {type(value).__name__} ({str(value)[:40]!r})"


def read_summed_values(vectors: Decomposed) -> Tensor:
    """Returns ``values`` ``[L, B, N, T, d]``. Raises ValueError where they are told apart by head or by expert, and
    TypeError for what is no `ffattr.Vectors`."""
    if not isinstance(getattr(vectors, "values", None), Tensor) or not hasattr(vectors, "scope"):
        raise TypeError(f"{_name_value(vectors)} is no vectors of a scope: expected what ffattr.vectors returned")
    if vectors.values.dim() != 5:
        raise ValueError(
            f"the vectors of {vectors.scope} are told apart by head or by expert, expected those of a scope that sums "
            "over them, such as 'atb'"
        )
    return vectors.values


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Holds rows of kept maps in the form in which a stream brings them, a `Block`.

    ``place`` is that of the layer, ``rows`` ``[n]`` those of the queries on the axes of the kept maps.
    """

    layer: int
    batch: int
    queries: Tensor
    keys: Tensor
    maps: Mapping[str, Tensor]
    place: int
    rows: Tensor


def iterate_rows(
    attribution: Maps,
    scopes: Sequence[str],
    collector: str,
    layers: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
) -> Iterator[KeptRows]:
    """Yields all rows of one layer and sequence at a time, real tokens only; `ffattr.Reduce` hands on such in pieces.

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


_READ = ("maps", "layers", "queries", "scopes", "mask", "arguments")


def check_one_stack(attribution: object) -> None:
    """Raises TypeError for what is no `ffattr.Attribution`, and for an `ffattr.StackedAttribution`."""
    if not all(hasattr(attribution, name) for name in _READ):
        raise TypeError(f"{_name_value(attribution)} is no attribution: expected what ffattr.attribute returned")
    stacks = getattr(attribution, "stacks", None)
    if stacks is not None:
        names = " or ".join(f"attr.stacks[{name!r}]" for name in stacks)
        raise TypeError(f"these are the maps of several stacks of layers: analyse one of them, {names}")


def check_same_run(attribution: Maps, layers: Collection[int], sequences: int, tokens: int) -> None:
    """Checks that what was collected of ``layers`` and of at least so many sequences and tokens is of this attribution.

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


def split_rows(rows: Block, scopes: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Yields ``(queries [n], keys [t], [tile [n, t] of each scope])`` for a few rows at a time, on one device."""
    tiles = [rows.maps[scope] for scope in scopes]
    device = tiles[0].device
    queries, keys = rows.queries.to(device), rows.keys.to(device)
    step = max(1, AT_ONCE // max(1, len(keys)))
    for start in range(0, len(queries), step):
        some = slice(start, start + step)
        yield queries[some], keys, [tile[some] for tile in tiles]


def row_shares(tile: Tensor) -> Tensor:
    """Returns every row of ``tile`` ``[n, t]`` over its sum, in float64; a row of zeros stays one."""
    wide = tile.double()
    total = wide.sum(-1, keepdim=True)
    return wide / total.masked_fill(total == 0, 1)


# What names of scopes say. Nothing else in `ffattr.analysis` takes them apart.


def find_components(scopes: Sequence[str]) -> list[tuple[str, str, str]]:
    """Returns ``(component, scope before, scope after)``. A scope's name is its predecessor's plus the component added.

    A layer without norms between its scopes is told by ``attn`` next to ``atb``: without it there is no ``FF block``.
    Raises ValueError where there is none.
    """
    found = []
    for scope in scopes:
        before, _, part = scope.rpartition("_")
        if part in _COMPONENTS and before.startswith("atb") and before in scopes:
            found.append((_COMPONENTS[part], before, scope))
    ends = ["_ln_ff_res", "_ff_res_ln"]  # of a pre-LN and of a post-LN layer
    if "attn" in scopes and "attn_res" not in scopes:  # of one whose norms are within its blocks, as in OLMo 2
        ends.append("atb_ff_res")
    whole = [scope for scope in scopes if scope.startswith("atb") and scope.endswith(tuple(ends))]
    last = max(whole, key=len, default="")
    if "atb" in scopes and last:
        found.append((_BLOCK, "atb", last))
    if not found:
        raise ValueError(
            f"no two neighbouring scopes of the feed-forward block among {', '.join(scopes)}: compute the "
            "maps with scopes='all' (or name the scopes around the component)"
        )
    return found


def has_ff_component(scopes: Sequence[str]) -> bool:
    """Tells whether the scopes right before and right after the feed-forward network are among ``scopes``.

    Raises ValueError as `find_components` does.
    """
    return any(component == "FF" for component, *_ in find_components(scopes))


def find_scopes_around_ff(scopes: Sequence[str]) -> list[str]:
    """Returns the scopes right before and right after the feed-forward network. Raises ValueError without them."""
    for component, before, after in find_components(scopes):
        if component == "FF":
            return [before, after]
    raise ValueError(
        f"no scopes right before and right after the feed-forward network among {', '.join(scopes)}: compute the maps "
        "with scopes='all', or name both: atb and atb_ff, in a pre-LN model atb_ln and atb_ln_ff"
    )


def find_bypass(scopes: Sequence[str]) -> list[str]:
    """Returns the scopes of what bypasses the feed-forward network, of its output, and of both together.

    Raises ValueError without them.
    """
    output = next((scope for scope in scopes if scope.startswith("atb") and scope.endswith("_ff")), "")
    found = ["atb", output, join_residual(output)]
    if not output or not set(found) <= set(scopes):
        raise ValueError(
            f"no scopes of the feed-forward network, of what bypasses it and of their sum among {', '.join(scopes)}: "
            "compute the maps with scopes='all', or name atb, atb_ff and atb_ff_res, in a pre-LN model atb, atb_ln_ff "
            "and atb_ln_ff_res"
        )
    return found


def find_ff_output(scopes: Sequence[str]) -> str:
    """Returns the scope whose vectors are the feed-forward network's output. Raises ValueError without one."""
    for scope in scopes:
        if scope.endswith("_ff"):
            return scope
    raise ValueError(f"no vectors of the feed-forward network (atb_ff or atb_ln_ff) among {', '.join(scopes)}")


def join_residual(scope: str) -> str:
    """Returns the name of the scope behind the residual connection that follows ``scope``."""
    return f"{scope}_res"
