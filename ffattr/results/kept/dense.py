"""`Dense`: whole maps, in memory or in a file that they are written to while they are computed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ..files import Reserved, read
from .policy import Kept, Policy, Shapes, Sink, require_room_for, write_tile

__all__ = ["Dense", "DenseMaps"]


class DenseMaps(Kept):
    """Whole maps ``[L, B, N, T]``."""

    @classmethod
    def from_tensors(
        cls, scopes: Sequence[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]
    ) -> DenseMaps:
        return cls({scope: tensors[f"maps.{scope}"] for scope in scopes})


@dataclass(frozen=True)
class Dense(Policy):
    """Whole maps ``[L, B, N, T]``.

    dtype: ``torch.float16``, ``bfloat16``, ``float32`` or ``float64`` to keep them in; None: what they are computed in.
    path: a file that they are written to while they are computed, for maps beyond the memory. It appears complete, as
        ``save`` would write it, or not at all; ``attr.maps`` are then read from it as they are looked at.

    Raises `OSError` at the start where the disk has no room, `NonFiniteError` where an entry is beyond the dtype's
    range.

    >>> on_disk = ffattr.Dense(torch.float16, path="maps.safetensors")
    >>> attr = ffattr.attribute(model, "The cat sat.", tokenizer=tokenizer, keep=on_disk)
    >>> attr["layer"].dtype, ffattr.load("maps.safetensors")["layer"].shape
    (torch.float16, torch.Size([3, 1, 6, 6]))
    """

    dtype: torch.dtype | None = None
    path: str | os.PathLike[str] | None = None

    kept: ClassVar = DenseMaps

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"Dense(dtype={self.dtype!r}), expected torch.float16, bfloat16, float32, float64 or None")
        if not isinstance(self.path, (str, os.PathLike, type(None))):
            raise TypeError(f"Dense(path={self.path!r}), expected the name of a file to write, or None")

    def open(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, layers: Sequence[int], queries: Sequence[int]
    ) -> Sink:
        kept = dtype if self.dtype is None else self.dtype
        if self.path is not None:
            return FileSink(shapes, kept, self.path)
        require_room_for(self, sum(map(math.prod, shapes.values())), kept, device)
        return DenseSink({scope: torch.zeros(shape, dtype=kept, device=device) for scope, shape in shapes.items()})

    def check_stacks(self) -> None:
        if self.path is not None:
            raise ValueError("keep=Dense(path=...) holds one stack of layers, not an encoder and a decoder; use save()")


class DenseSink(Sink):
    """Writes rows into maps of zeros."""

    def __init__(self, maps: dict[str, Tensor]) -> None:
        self.kept = DenseMaps(maps)

    def add_rows(self, place: int, batch: int, rows: Tensor, keys: Tensor, tiles: Mapping[str, Tensor]) -> None:
        for scope, tile in tiles.items():
            maps = self.kept.maps[scope]
            if tile.numel() and torch.finfo(maps.dtype).max < torch.finfo(tile.dtype).max:
                largest = tile.abs().amax()
                if largest.isfinite() and largest.to(maps.dtype).isinf():
                    wider = "bfloat16" if maps.dtype == torch.float16 else "float64"
                    raise NonFiniteError(
                        f"an entry of {scope} is {float(largest):.3g} in size, beyond the range of {maps.dtype} "
                        f"({torch.finfo(maps.dtype).max:.3g}): keep the maps in torch.{wider}"
                    )
            write_tile(maps[place, batch], rows, keys, tile)

    def finish(self) -> Kept:
        return self.kept


class FileSink(DenseSink):
    """Writes rows into the maps of a file, which has its name once it is whole."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, path: str | os.PathLike[str]) -> None:
        # For a bias in float64, the text of tokens and the description.
        spare = sum(8 * math.prod(shape[:2] + shape[-2:-1]) + 64 * shape[1] * shape[-1] for shape in shapes.values())
        self.path = Path(path).resolve()  # should the program change its folder meanwhile
        named = {f"maps.{scope}": shape for scope, shape in shapes.items()}
        self.file = Reserved(self.path, dtype, named, spare + 2**20)
        super().__init__({scope: self.file.tensors[f"maps.{scope}"] for scope in shapes})

    def seal_file(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        self.file.seal(tensors, content)
        found, _ = read(self.path, verify=False)  # mapped anew, so that changing the result does not change the file
        self.kept.maps = {scope: found[f"maps.{scope}"] for scope in self.kept.maps}

    def discard_file(self) -> None:
        self.file.discard()
