"""`TopK`: the largest entries of every row of the maps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import NonFiniteError
from .policy import Kept, Policy, SavedPart, Shapes, Sink, check_count, require_room_for, write_tile

__all__ = ["Top", "TopEntries", "TopK"]


@dataclass(frozen=True, eq=False)
class Top:
    """The largest entries of every row of a map: by their size, where they have signs.

    ``values`` ``[L, B, N, k]`` fall along a row in size, of equal sizes the lower position first; ``keys``
    ``[L, B, N, k]`` int32 are their positions. Where a row has fewer entries other than zero (padding, keys that it may
    not see), the value is 0 and the key -1. ``rest`` ``[L, B, N]`` is the Euclidean norm of the entries not kept,
    ``total`` ``[L, B, N]`` the sum of all.

    >>> whole = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer)["layer"]
    >>> keep = ffattr.TopK(2)
    >>> top = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, keep=keep).largest["atb_ff_res_ln"]
    >>> torch.equal(top.keys[0, 0, :, 0], whole[0, 0].argmax(-1).int())  # what each token reads most of
    True
    >>> torch.allclose(top.total, whole.sum(-1)), bool((top.values.sum(-1) < top.total).all())
    (True, True)
    """

    values: Tensor
    keys: Tensor
    rest: Tensor
    total: Tensor

    def dense(self, keys: int) -> Tensor:
        """Fills the kept entries into maps ``[L, B, N, keys]``, zero elsewhere. ``keys`` is the number of tokens.

        >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, keep=ffattr.TopK(2))
        >>> maps = attr.largest["atb_ff_res_ln"].dense(keys=6)
        >>> maps.shape, (maps[0, 0] > 0).sum(-1).tolist()
        (torch.Size([3, 1, 6, 6]), [2, 2, 2, 2, 2, 2])
        """
        if self.keys.numel() and keys <= int(self.keys.max()):
            raise ValueError(f"keys={keys}, but there are entries up to position {int(self.keys.max())}")
        maps = self.values.new_zeros(*self.values.shape[:-1], keys)
        if keys == 0:
            return maps
        return maps.scatter_add_(-1, self.keys.clamp_min(0).long(), self.values)  # the value at a key of -1 is 0


_PARTS = tuple(part.name for part in fields(Top))


class TopEntries(Kept):
    """The largest entries of every row: ``largest[scope]`` is a `Top`."""

    largest: dict[str, Top]

    def can_show(self, scope: str) -> bool:
        return scope in self.largest

    def list_tensors(self, scopes: Collection[str]) -> dict[str, Tensor]:
        cut = [scope for scope in scopes if scope in self.largest]
        return {f"top.{scope}.{part}": getattr(self.largest[scope], part) for scope in cut for part in _PARTS}

    @classmethod
    def from_tensors(
        cls, scopes: Sequence[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]
    ) -> TopEntries | None:
        if not any(f"top.{scope}.{_PARTS[0]}" in tensors for scope in scopes):
            return None
        return cls(largest={scope: Top(*(tensors[f"top.{scope}.{part}"] for part in _PARTS)) for scope in scopes})

    def list_sizes(self, scope: str, queries: int, columns: int) -> Iterator[SavedPart]:
        top = self.largest[scope]
        kept = top.values.shape[-1:].numel()
        yield SavedPart("the top of", top.values, (queries, kept))
        yield SavedPart("the keys of", top.keys, (queries, kept), below=columns)
        yield SavedPart("the rest of", top.rest, (queries,))
        yield SavedPart("the total of", top.total, (queries,))

    def read_map(self, scope: str, place: int, batch: int, columns: int) -> Tensor:
        top = self.largest[scope]
        cut = Top(*(getattr(top, part)[place : place + 1, batch : batch + 1] for part in _PARTS))
        return cut.dense(columns)[0, 0]

    def read_entries(
        self, scope: str, batch: int, rows: Tensor, columns: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        top = self.largest[scope]
        values, keys = (part[:, batch].cpu()[..., rows, :] for part in (top.values, top.keys))
        return values, keys

    def read_totals(self, scope: str, place: int, batch: int) -> Tensor:
        return self.largest[scope].total[place, batch].cpu().double()

    def describe(self) -> str:
        kept = next((top.values.shape[-1] for top in self.largest.values()), 0)
        return f"; the {kept} largest entries of each row"

    def explain_no_map(self, scope: str) -> str:
        return (
            f"of {scope} only the largest entries of each row were kept (keep=TopK): they are in "
            f"attr.largest[{scope!r}], whose dense(tokens) fills them into a map. For all entries compute it with "
            "keep='dense'"
        )


@dataclass(frozen=True)
class TopK(Policy):
    """The ``k`` largest entries of every row, the norm of the others and the sum of all: ``attr.largest[scope]``.

    Of `ffattr.contributions`' flow, which has signs, they are the largest by size, with their signs.

    >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, keep=ffattr.TopK(2))
    >>> attr.largest["atb_ff_res_ln"].values.shape  # [layers, batch, query, k]
    torch.Size([3, 1, 6, 2])
    """

    k: int

    kept: ClassVar = TopEntries

    def __post_init__(self) -> None:
        check_count("TopK", "k", self.k)

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Sink:
        rows = sum(math.prod(shape[:-1]) for shape in shapes.values())
        require_room_for(self, rows * self.k * 2, dtype, device)  # a value and its key
        return TopSink(self.k, {scope: _empty_top(shape, self.k, dtype, device) for scope, shape in shapes.items()})


class TopSink(Sink):
    """Cuts every row to its ``k`` largest entries."""

    def __init__(self, k: int, largest: dict[str, Top]) -> None:
        self.k, self.kept = k, TopEntries(largest=largest)

    def add_rows(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        for scope, tile in tiles.items():
            top, k = self.kept.largest[scope], min(self.k, tile.shape[-1])
            where = _find_largest(tile.abs(), k, scope)
            values = tile.gather(-1, where)
            positions = keys.to(where.device)[where].masked_fill_(values == 0, -1)
            first = torch.arange(k)
            write_tile(top.values[place, batch], rows, first, values)
            write_tile(top.keys[place, batch], rows, first, positions)
            rest = torch.linalg.vector_norm(tile.scatter(-1, where, 0), dim=-1)
            for to, part in ((top.rest, rest), (top.total, tile.sum(-1))):
                to[place, batch][..., rows.to(to.device)] = part.to(to)

    def finish(self) -> Kept:
        return self.kept


def _empty_top(shape: tuple[int, ...], k: int, dtype: torch.dtype, device: torch.device) -> Top:
    """Returns the `Top` of maps of this shape in which no row has an entry."""
    cut = (*shape[:-1], k)
    keys = torch.full(cut, -1, dtype=torch.int32, device=device)
    values, rest, total = (torch.zeros(s, dtype=dtype, device=device) for s in (cut, shape[:-1], shape[:-1]))
    return Top(values, keys, rest, total)


def _find_largest(tile: Tensor, k: int, scope: str) -> Tensor:
    """Returns the places ``[..., n, k]`` of every row's largest entries, falling; of equal ones the lower, in order.

    ``tile`` holds sizes: no entry is below zero. Zeros are in no order.
    """
    if tile.numel() == 0 or k == 0:
        return torch.zeros((*tile.shape[:-1], k), dtype=torch.int64, device=tile.device)
    values, where = tile.topk(min(k + 1, tile.shape[-1]), dim=-1)
    if values.isnan().any():
        raise NonFiniteError(f"scope {scope} has entries that are NaN")
    where = where[..., :k].contiguous()
    if values.shape[-1] > k:  # where the last has equals left out, it is chance which of them topk took
        open_rows = (values[..., k] == values[..., k - 1]) & (values[..., k] > 0)
        where[open_rows] = _find_lowest(tile[open_rows], values[open_rows][:, k - 1 : k], k)
    where = where.sort(-1).values
    order = tile.gather(-1, where).sort(dim=-1, descending=True, stable=True).indices
    return where.gather(-1, order)


def _find_lowest(rows: Tensor, least: Tensor, k: int) -> Tensor:
    """Returns the places ``[n, k]`` in ``rows`` ``[n, t]`` of what is above ``least`` ``[n, 1]`` and first equal."""
    above, equal = rows > least, rows == least
    missing = k - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))
    return taken.nonzero()[:, 1].view(len(rows), k)
