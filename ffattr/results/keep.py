"""What becomes of the rows of the maps as they are computed: kept whole, cut to the largest, pooled or handed on.

`Dense`, `TopK`, `Pool` and `Reduce` say what is wanted; ``open`` makes of one a `Store`, which takes blocks of query
tokens in any cuts and order:

    store = keep.of(asked).open(shapes, dtype, device, layers, queries)
    try:
        store.add(place, batch, rows, keys, tiles)  # for each block
        kept = store.finish()
        result = Attribution(maps=kept.maps, largest=kept.largest, reduced=kept.reduced, block=kept.block, ...)
        result.maps = store.seal(*parts(result))  # names the file of Dense(path=...); else gives kept.maps back
    except BaseException:
        store.discard()
        raise

Shapes as in `stores`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .sinks import DenseStore, FileStore, Kept, PoolStore, ReduceStore, Rows, Shapes, Store, Top, TopStore

__all__ = ["Dense", "Keep", "Kept", "Pool", "Reduce", "Rows", "Store", "Top", "TopK", "of"]


@dataclass(frozen=True)
class Dense:
    """Whole maps ``[L, B, N, T]``.

    dtype: ``torch.float16``, ``bfloat16``, ``float32`` or ``float64`` to keep them in; None: what they are computed in.
    path: a file that they are written to while they are computed, for maps beyond the memory. It appears complete, as
        ``save`` would write it, or not at all; ``attr.maps`` are then read from it as they are looked at.

    Raises `OSError` at the start where the disk has no room, `NonFiniteError` where a norm is beyond the dtype's range.

    >>> on_disk = ffattr.Dense(torch.float16, path="maps.safetensors")
    >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, keep=on_disk)
    >>> attr["layer"].dtype, ffattr.load("maps.safetensors")["layer"].shape
    (torch.float16, torch.Size([3, 1, 6, 6]))
    """

    dtype: torch.dtype | None = None
    path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"Dense(dtype={self.dtype!r}), expected torch.float16, bfloat16, float32, float64 or None")
        if not isinstance(self.path, (str, os.PathLike, type(None))):
            raise TypeError(f"Dense(path={self.path!r}), expected the name of a file to write, or None")

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Store:
        kept = dtype if self.dtype is None else self.dtype
        if self.path is not None:
            return FileStore(shapes, kept, self.path)
        return DenseStore({scope: torch.zeros(shape, dtype=kept, device=device) for scope, shape in shapes.items()})


@dataclass(frozen=True)
class TopK:
    """The ``k`` largest entries of every row, the norm of the others and the sum of all: ``attr.largest[scope]``.

    >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, keep=ffattr.TopK(2))
    >>> attr.largest["atb_ff_res_ln"].values.shape  # [layers, batch, query, k]
    torch.Size([3, 1, 6, 2])
    """

    k: int

    def __post_init__(self) -> None:
        _check_count("TopK", "k", self.k)

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Store:
        def top(shape: tuple[int, ...]) -> Top:
            cut = (*shape[:-1], self.k)
            keys = torch.full(cut, -1, dtype=torch.int32, device=device)
            values, rest, total = (torch.zeros(s, dtype=dtype, device=device) for s in (cut, shape[:-1], shape[:-1]))
            return Top(values, keys, rest, total)

        return TopStore(self.k, {scope: top(shape) for scope, shape in shapes.items()})


@dataclass(frozen=True)
class Pool:
    """Maps of blocks of ``block`` query tokens by ``block`` key tokens, ``[L, B, ceil(N / block), ceil(T / block)]``.

    An entry is the mean over the pairs of real tokens in its block, those that are masked as 0; 0 where there are none.
    Queries are counted as they were asked for. Maps told apart by expert have no mean and are a `ValueError`.

    >>> text = "The cat sat on the mat."  # nine tokens, with [CLS] and [SEP]
    >>> whole = ffattr.attribute(model, text, tokenizer=tokenizer)["layer"]
    >>> blocks = ffattr.attribute(model, text, tokenizer=tokenizer, keep=ffattr.Pool(4))["layer"]
    >>> blocks.shape
    torch.Size([3, 1, 3, 3])
    >>> torch.allclose(blocks[0, 0, 0, 1], whole[0, 0, :4, 4:8].mean())
    True
    """

    block: int

    def __post_init__(self) -> None:
        _check_count("Pool", "block", self.block)

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Store:
        for scope in shapes:
            if scope.endswith("_experts"):
                raise ValueError(
                    f"keep={self}: {scope} is told apart by each token's own experts and has no mean over tokens. Ask "
                    "for other scopes, or for keep='dense'"
                )
        return PoolStore(self.block, shapes, dtype, device)


@dataclass(frozen=True)
class Reduce:
    """Keeps no maps: ``fn`` is called with every block of rows, a `Rows`; what it returns is listed in ``attr.reduced``
    in the order of the calls, but for None. How rows are cut into blocks is not promised.

    >>> own = ffattr.Reduce(lambda rows: float(rows.maps["atb"].diagonal().sum() / rows.maps["atb"].sum()))
    >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, scopes="atb", keep=own)
    >>> len(attr.reduced), all(0 < share < 1 for share in attr.reduced)  # what tokens keep of themselves, by layer
    (3, True)
    """

    fn: Callable[[Rows], Any]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"Reduce({self.fn!r}), expected a function that takes an ffattr.Rows")

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Store:
        return ReduceStore(self.fn, layers, queries)


Keep = Dense | TopK | Pool | Reduce


def of(asked: object) -> Keep:
    """What the argument ``keep`` of `ffattr.attribute` stands for. Raises TypeError or ValueError naming it."""
    if isinstance(asked, (Dense, TopK, Pool, Reduce)):
        return asked
    expected = "expected 'dense', or ffattr.Dense(...), TopK(k), Pool(block) or Reduce(fn)"
    if isinstance(asked, str):
        if asked == "dense":
            return Dense()
        raise ValueError(f"unknown keep {asked!r}, {expected}")
    raise TypeError(f"keep is {asked!r}, {expected}")


def _check_count(what: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what}({name}={value!r}), expected an integer of at least 1")
    if value < 1:
        raise ValueError(f"{what}({name}={value}), expected at least 1")
