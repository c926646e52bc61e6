"""`Pool`: means of the maps over blocks of query tokens by key tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..scope_names import extra_axis
from .policy import Kept, Policy, Shapes, Sink, check_count, require_room_for

__all__ = ["Pool", "PooledMaps"]


class PooledMaps(Kept):
    """Maps of blocks of ``block`` by ``block`` tokens."""

    @classmethod
    def from_tensors(
        cls, scopes: Sequence[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]
    ) -> PooledMaps | None:
        if content.get("block") is None:
            return None
        return cls({scope: tensors[f"maps.{scope}"] for scope in scopes}, block=content["block"])

    def describe(self) -> str:
        return f"; in blocks of {self.block} tokens"

    def check_tokens(self) -> None:
        raise ValueError("maps of blocks of tokens (keep=Pool) have no words; compute them with keep='dense'")


@dataclass(frozen=True)
class Pool(Policy):
    """Maps of blocks of ``block`` query tokens by ``block`` key tokens, ``[L, B, ceil(N / block), ceil(T / block)]``.

    An entry is the mean over the pairs of real tokens in its block, those that are masked as 0; 0 where there are none.
    Queries are counted as they were asked for. Per-expert maps have no mean and are a `ValueError`.

    >>> text = "The cat sat on the mat."  # nine tokens, with [CLS] and [SEP]
    >>> whole = ffattr.attribute(model, text, tokenizer=tokenizer)["layer"]
    >>> blocks = ffattr.attribute(model, text, tokenizer=tokenizer, keep=ffattr.Pool(4))["layer"]
    >>> blocks.shape
    torch.Size([3, 1, 3, 3])
    >>> torch.allclose(blocks[0, 0, 0, 1], whole[0, 0, :4, 4:8].mean())
    True
    """

    block: int

    kept: ClassVar = PooledMaps

    def __post_init__(self) -> None:
        check_count("Pool", "block", self.block)

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Sink:
        for scope in shapes:
            if extra_axis(scope) == "expert":
                raise ValueError(
                    f"keep={self}: {scope} is told apart by each token's own experts and has no mean over tokens. Ask "
                    "for other scopes, or for keep='dense'"
                )
        blocks = sum(
            math.prod(shape[:-2]) * -(-shape[-2] // self.block) * -(-shape[-1] // self.block)
            for shape in shapes.values()
        )
        require_room_for(self, blocks, _sum_dtype(device), device)
        return PoolSink(self.block, shapes, dtype, device)


class PoolSink(Sink):
    """Adds rows up in blocks, and counts them."""

    def __init__(self, block: int, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
        self.block, self.dtype = block, dtype
        self.sums = {
            scope: torch.zeros(
                (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block)), dtype=_sum_dtype(device), device=device
            )
            for scope, shape in shapes.items()
        }
        any_shape = next(iter(self.sums.values())).shape
        self.rows, self.keys = (
            torch.zeros((*any_shape[:2], n), dtype=_sum_dtype(device), device=device) for n in any_shape[-2:]
        )

    def add_rows(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        if len(rows) == 0:
            return
        device = self.rows.device
        row_blocks, key_blocks = rows.to(device) // self.block, keys.to(device) // self.block
        self.rows[place, batch].index_add_(0, row_blocks, self.rows.new_ones(len(rows)))
        self.keys[place, batch] = torch.bincount(key_blocks, minlength=self.keys.shape[-1])
        for scope, tile in tiles.items():
            sums = self.sums[scope][place, batch]
            where = key_blocks.to(tile.device)
            narrow = torch.zeros((*tile.shape[:-1], sums.shape[-1]), dtype=_sum_dtype(tile.device), device=tile.device)
            narrow.index_add_(-1, where, tile.to(narrow.dtype))
            sums.index_add_(-2, row_blocks, narrow.to(sums))

    def finish(self) -> Kept:
        pairs = (self.rows[..., None] * self.keys[..., None, :]).clamp_min_(1)  # [L, B, N / block, T / block]
        maps = {}
        for scope, sums in self.sums.items():
            maps[scope] = (sums / (pairs if sums.dim() == 4 else pairs[:, :, None])).to(self.dtype)
        return PooledMaps(maps, block=self.block)


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Returns what sums are made in: rows then add up to the same however they are cut."""
    return torch.float32 if device.type == "mps" else torch.float64
