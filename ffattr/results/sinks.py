"""Those who take the rows of the maps as they are computed, and what they leave.

Shapes: ``L`` computed layers, ``B`` sequences, ``N`` selected query tokens, ``T`` tokens, ``n`` and ``t`` of them in a
block; scopes told apart by head or expert have that axis before ``N``, in everything that is kept of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .files import Reserved, read

__all__ = ["DenseStore", "FileStore", "Kept", "PoolStore", "ReduceStore", "Rows", "Shapes", "Store", "Top", "TopStore"]

Shapes = Mapping[str, tuple[int, ...]]
"""Of the maps of every scope, ``[L, B, N, T]`` or with one more axis before ``N``. All have the same keys."""


@dataclass(frozen=True, eq=False)
class Top:
    """The largest entries of every row of a map.

    ``values`` ``[L, B, N, k]`` fall along a row, of equal ones the lower position first; ``keys`` ``[L, B, N, k]``
    int32 are their positions. Where a row has fewer entries above zero (padding, keys that it may not see), the value
    is 0 and the key -1. ``rest`` ``[L, B, N]`` is the Euclidean norm of the entries not kept, ``total`` ``[L, B, N]``
    the sum of all.

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
        """The maps ``[L, B, N, keys]`` of the kept entries, zero elsewhere. ``keys`` is the number of tokens.

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


@dataclass(frozen=True, eq=False)
class Rows:
    """A block of complete rows, as `Reduce` hands it on: of the model's layer ``layer`` and the sequence ``batch``.

    ``queries`` ``[n]`` and ``keys`` ``[t]`` are positions, of real tokens only; ``maps[scope]`` is ``[..., n, t]``, on
    the layer's device. Copy what is to be kept of them: they belong to the computation.

    >>> def strongest(rows):
    ...     return rows.layer, rows.keys[rows.maps["atb"].argmax(-1)].tolist()
    >>> keep = ffattr.Reduce(strongest)
    >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, scopes="atb", layers=[0, 2], keep=keep)
    >>> [layer for layer, keys in attr.reduced]
    [0, 2]
    """

    layer: int
    batch: int
    queries: Tensor
    keys: Tensor
    maps: Mapping[str, Tensor]


@dataclass
class Kept:
    """What a `Store` leaves; ``block`` is that of `Pool`."""

    maps: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Top] = field(default_factory=dict)
    reduced: list[Any] = field(default_factory=list)
    block: int | None = None


class Store:
    """Takes the rows of one stack of layers."""

    def __init__(self) -> None:
        self.kept = Kept()

    def add(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        """Whole rows ``rows`` ``[n]`` of the maps at ``place`` on the layer axis and ``batch`` on that of sequences.

        ``tiles[scope]`` ``[..., n, t]`` has the columns ``keys`` ``[t]``: all real keys, ascending. Every row of a
        layer and sequence comes once, with all scopes that the layer has; rows of padding never do.
        """
        raise NotImplementedError

    def finish(self) -> Kept:
        """After the last row."""
        return self.kept

    def seal(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> dict[str, Tensor]:
        """After `finish`: the maps from now on. `Dense` with a path makes its file of them and of what else there is,
        `ffattr.results.serialise.parts`."""
        return self.kept.maps

    def discard(self) -> None:
        """Instead of `finish` or `seal`, when something failed: nothing stays on the disk."""


class DenseStore(Store):
    def __init__(self, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.kept.maps = maps

    def add(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        for scope, tile in tiles.items():
            maps = self.kept.maps[scope]
            if tile.numel() and torch.finfo(maps.dtype).max < torch.finfo(tile.dtype).max:
                largest = tile.amax()
                if largest.isfinite() and largest.to(maps.dtype).isinf():
                    wider = "bfloat16" if maps.dtype == torch.float16 else "float64"
                    raise NonFiniteError(
                        f"a norm of {scope} is {float(largest):.3g}, beyond the range of {maps.dtype} "
                        f"({torch.finfo(maps.dtype).max:.3g}): keep the maps in torch.{wider}"
                    )
            _put(maps[place, batch], rows, keys, tile)


class FileStore(DenseStore):
    def __init__(self, shapes: Shapes, dtype: torch.dtype, path: str | os.PathLike[str]) -> None:
        # For a bias in float64, the text of tokens and the description.
        spare = sum(8 * math.prod(shape[:2] + shape[-2:-1]) + 64 * shape[1] * shape[-1] for shape in shapes.values())
        self.path = Path(path).resolve()  # should the program change its folder meanwhile
        named = {f"maps.{scope}": shape for scope, shape in shapes.items()}
        self.file = Reserved(self.path, dtype, named, spare + 2**20)
        super().__init__({scope: self.file.tensors[f"maps.{scope}"] for scope in shapes})

    def seal(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> dict[str, Tensor]:
        self.file.seal(tensors, content)
        found, _ = read(self.path)  # mapped anew, so that changing the result does not change the file
        self.kept.maps = {scope: found[f"maps.{scope}"] for scope in self.kept.maps}
        return self.kept.maps

    def discard(self) -> None:
        self.file.discard()


class TopStore(Store):
    def __init__(self, k: int, top: dict[str, Top]) -> None:
        super().__init__()
        self.k = k
        self.kept.largest = top

    def add(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        for scope, tile in tiles.items():
            top, k = self.kept.largest[scope], min(self.k, tile.shape[-1])
            where = _largest(tile, k, scope)
            values = tile.gather(-1, where)
            positions = keys.to(where.device)[where].masked_fill_(values <= 0, -1)
            first = torch.arange(k)
            _put(top.values[place, batch], rows, first, values.clamp_min(0))
            _put(top.keys[place, batch], rows, first, positions)
            rest = torch.linalg.vector_norm(tile.scatter(-1, where, 0), dim=-1)
            for to, part in ((top.rest, rest), (top.total, tile.sum(-1))):
                to[place, batch][..., rows.to(to.device)] = part.to(to)


class PoolStore(Store):
    def __init__(self, block: int, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.kept.block = block
        self.block, self.dtype = block, dtype
        self.sums = {
            scope: torch.zeros(
                (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block)), dtype=_wide(device), device=device
            )
            for scope, shape in shapes.items()
        }
        any_shape = next(iter(self.sums.values())).shape
        self.rows, self.keys = (
            torch.zeros((*any_shape[:2], n), dtype=_wide(device), device=device) for n in any_shape[-2:]
        )

    def add(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        if len(rows) == 0:
            return
        device = self.rows.device
        row_blocks, key_blocks = rows.to(device) // self.block, keys.to(device) // self.block
        self.rows[place, batch].index_add_(0, row_blocks, self.rows.new_ones(len(rows)))
        self.keys[place, batch] = torch.bincount(key_blocks, minlength=self.keys.shape[-1])
        for scope, tile in tiles.items():
            sums = self.sums[scope][place, batch]
            where = key_blocks.to(tile.device)
            narrow = torch.zeros((*tile.shape[:-1], sums.shape[-1]), dtype=_wide(tile.device), device=tile.device)
            narrow.index_add_(-1, where, tile.to(narrow.dtype))
            sums.index_add_(-2, row_blocks, narrow.to(sums))

    def finish(self) -> Kept:
        pairs = (self.rows[..., None] * self.keys[..., None, :]).clamp_min_(1)  # [L, B, N / block, T / block]
        for scope, sums in self.sums.items():
            self.kept.maps[scope] = (sums / (pairs if sums.dim() == 4 else pairs[:, :, None])).to(self.dtype)
        return self.kept


class ReduceStore(Store):
    def __init__(self, fn: Callable[[Rows], Any], layers: Sequence[int], queries: Sequence[int]) -> None:
        super().__init__()
        self.fn, self.layers = fn, tuple(layers)
        self.queries = torch.tensor(list(queries), dtype=torch.int64)

    def add(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        if len(rows) == 0:
            return
        queries = self.queries.to(rows.device)[rows]
        found = self.fn(Rows(self.layers[place], batch, queries, keys, dict(tiles)))
        if found is not None:
            self.kept.reduced.append(found)


def _largest(tile: Tensor, k: int, scope: str) -> Tensor:
    """The places ``[..., n, k]`` of every row's largest entries, falling; of equal ones the lower places, in order.

    Zeros are in no order.
    """
    if tile.numel() == 0 or k == 0:
        return torch.zeros((*tile.shape[:-1], k), dtype=torch.int64, device=tile.device)
    values, where = tile.topk(min(k + 1, tile.shape[-1]), dim=-1)
    if values.isnan().any():
        raise NonFiniteError(f"scope {scope} has norms that are NaN")
    where = where[..., :k].contiguous()
    if values.shape[-1] > k:  # where the last has equals left out, it is chance which of them topk took
        open_rows = (values[..., k] == values[..., k - 1]) & (values[..., k] > 0)
        where[open_rows] = _lowest(tile[open_rows], values[open_rows][:, k - 1 : k], k)
    where = where.sort(-1).values
    order = tile.gather(-1, where).sort(dim=-1, descending=True, stable=True).indices
    return where.gather(-1, order)


def _lowest(rows: Tensor, least: Tensor, k: int) -> Tensor:
    """The places ``[n, k]`` in ``rows`` ``[n, t]`` of what is above ``least`` ``[n, 1]`` and the first equal to it."""
    above, equal = rows > least, rows == least
    missing = k - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))
    return taken.nonzero()[:, 1].view(len(rows), k)


def _put(maps: Tensor, rows: Tensor, keys: Tensor, tile: Tensor) -> None:
    """Into rows and columns of ``maps`` ``[..., N, T]``, in its dtype and on its device."""
    at, columns = _span(rows), _span(keys)
    if isinstance(at, slice) and isinstance(columns, slice):
        maps[..., at, columns].copy_(tile)  # many times as fast, and with no copy before
        return
    if not isinstance(at, slice):
        at = at.to(maps.device) if isinstance(columns, slice) else at.to(maps.device)[:, None]
    if not isinstance(columns, slice):
        columns = columns.to(maps.device)
    maps[..., at, columns] = tile.to(maps)


def _span(index: Tensor) -> slice | Tensor:
    """A slice where ``index`` counts up by ones."""
    if len(index) == 0:
        return slice(0, 0)
    first = int(index[0])
    if bool((index == torch.arange(first, first + len(index), device=index.device)).all()):
        return slice(first, first + len(index))
    return index


def _wide(device: torch.device) -> torch.dtype:
    """What sums are made in: rows then add up to the same however they are cut."""
    return torch.float32 if device.type == "mps" else torch.float64
