"""`Reduce`: no maps, but what a function makes of every block of their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .policy import Kept, Policy, Shapes, Sink

__all__ = ["Reduce", "ReducedRows", "Rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """A block of complete rows, as `Reduce` hands it on: of the model's layer ``layer`` and the sequence ``batch``.

    ``queries`` ``[n]`` and ``keys`` ``[t]`` are positions, of real tokens only; ``maps[scope]`` is ``[..., n, t]``, on
    the layer's device. Copy what is to be kept of them: they belong to the computation. ``place`` is that of the layer
    among those asked for; of `ffattr.contributions`' flow, whose scope is ``"flow"`` (from an encoder's tokens to a
    decoder's ``"cross.flow"``), all layers of the first target come first: ``place // len(layers)`` is the target.
    A decoder's layers are numbered on from its encoder's.

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
    place: int = 0


class ReducedRows(Kept):
    """What the function returned, in the order of the calls: ``reduced``."""

    def describe(self) -> str:
        return f"; no maps kept, {len(self.reduced)} values reduced"

    def explain_no_map(self, scope: str) -> str:
        return (
            f"no map of {scope} was kept (keep=Reduce): attr.reduced lists what the function returned. For maps "
            "compute it with keep='dense'"
        )

    def explain_unsaved(self, scope: str) -> str:
        return (
            f"nothing to save of {scope}: keep=Reduce keeps no maps. Save what the function returned, "
            "attr.reduced, yourself, or compute with keep='dense', TopK or Pool"
        )


@dataclass(frozen=True)
class Reduce(Policy):
    """Keeps no maps: ``fn`` is called with every block of rows, a `Rows`; what it returns is listed in ``attr.reduced``
    in the order of the calls, but for None. How rows are cut into blocks is not promised.

    >>> own = ffattr.Reduce(lambda rows: float(rows.maps["atb"].diagonal().sum() / rows.maps["atb"].sum()))
    >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, scopes="atb", keep=own)
    >>> len(attr.reduced), all(0 < share < 1 for share in attr.reduced)  # what tokens keep of themselves, by layer
    (3, True)
    """

    fn: Callable[[Rows], Any]

    kept: ClassVar = ReducedRows

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"Reduce({self.fn!r}), expected a function that takes an ffattr.Rows")

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Sink:
        return ReduceSink(self.fn, layers, queries)


class ReduceSink(Sink):
    """Hands rows on to a function."""

    def __init__(self, fn: Callable[[Rows], Any], layers: Sequence[int], queries: Sequence[int]) -> None:
        self.kept = ReducedRows()
        self.fn, self.layers = fn, tuple(layers)
        self.queries = torch.tensor(list(queries), dtype=torch.int64)

    def add_rows(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        if len(rows) == 0:
            return
        queries = self.queries.to(rows.device)[rows]
        found = self.fn(Rows(self.layers[place], batch, queries, keys, dict(tiles), place))
        if found is not None:
            self.kept.reduced.append(found)

    def finish(self) -> Kept:
        return self.kept
