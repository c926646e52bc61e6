"""Pieces of documents, and what was measured of them, on the way from a batch to the tables of a shard.

Shapes: ``L`` layers, ``T`` tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pandas

__all__ = ["Parts", "Piece", "PieceNumbers", "join_parts"]


@dataclass(frozen=True)
class Piece:
    """What is computed as one sequence: the token ids of a document, or of one ``window`` of a long one.

    ``key`` is the number by which its pairs are drawn, whatever it is computed beside.
    """

    row: int
    window: int
    ids: list[int]
    key: int


@dataclass(frozen=True)
class PieceNumbers:
    """What is said of a piece as a whole: ``changes`` ``[L]`` by component, and how many pairs of two tokens there are,
    ``all_pairs``, and of them in each category, ``counts``."""

    row: int
    window: int
    tokens: int
    model_error: float
    changes: Mapping[str, Any]
    all_pairs: int
    counts: Mapping[str, int]


@dataclass
class Parts:
    """What was measured of some pieces: their numbers, frames by the name of their table, with ``row`` and ``window``,
    and whole maps ``[L, T, T]`` by row, window and scope."""

    pieces: list[PieceNumbers] = field(default_factory=list)
    frames: dict[str, pandas.DataFrame] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)


def join_parts(parts: Sequence[Parts]) -> Parts:
    """Returns what was measured of all the pieces, in the order of their rows and windows."""
    import pandas as pd

    joined = Parts()
    for part in parts:
        joined.pieces += part.pieces
        joined.maps |= part.maps
    joined.pieces.sort(key=lambda piece: (piece.row, piece.window))
    for name in parts[0].frames if parts else ():
        together = pd.concat([part.frames[name] for part in parts], ignore_index=True)
        joined.frames[name] = together.sort_values(["row", "window"], kind="stable", ignore_index=True)
    return joined
