"""Contributions of words and sentences: those of their tokens, added up, which is exact where numbers have signs.

Shapes: ``K`` numbers, ``M`` boundaries, ``B`` sequences, ``T`` tokens, ``W`` words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kept.dense import DenseMaps
from ..kept.policy import Kept
from ..merge_words import WordMerger
from .contents import FLOW, SignedContents

__all__ = ["merge_words"]


def merge_words(
    contents: SignedContents, words: Sequence[Sequence[int | None]] | None, sentences: bool = False
) -> dict[str, Any]:
    """Returns the fields that `Contributions.to_words` or `to_sentences` changes, but for ``encoder``."""
    if words is not None and contents.cross_scores is not None:
        raise ValueError("words= is for models with one text, expected None for an encoder and a decoder")
    rows = WordMerger.from_tokens(contents.names, contents.mask, words, sentences)
    changed: dict[str, Any] = {
        "scores": _add_up(rows, contents.scores),
        "positions": _find_words(rows, contents.positions),
        "tokens": rows.texts,
        "labels": None,
        "mask": rows.mask,
        "residual": None if contents.residual is None else _add_up(rows, contents.residual),
        "kept": _add_flow(rows, rows, contents.kept),
    }
    if contents.cross_scores is None or contents.cross_mask is None:
        return changed
    columns = WordMerger.from_tokens(contents.cross_tokens or [], contents.cross_mask, None, sentences)
    return {
        **changed,
        "cross_scores": _add_up(columns, contents.cross_scores),
        "cross_tokens": columns.texts,
        "cross_mask": columns.mask,
        "cross_kept": _add_flow(rows, columns, contents.cross_kept),
    }


def _add_up(merger: WordMerger, scores: Tensor) -> Tensor:
    """Returns ``[K, M, B, W]`` of ``scores`` ``[K, M, B, T]``."""
    merged: Tensor = merger.merge_tokens(scores.flatten(0, 1), -1, "sum").unflatten(0, scores.shape[:2])
    return merged


def _add_flow(rows: WordMerger, columns: WordMerger, kept: Kept | None) -> Kept | None:
    """Adds up whole maps over rows and columns, which are parts of one sum; what was kept otherwise is left out."""
    if not isinstance(kept, DenseMaps):
        return None
    maps = columns.merge_tokens(kept.whole_map(FLOW), -1, "sum")
    return replace(kept, maps={FLOW: rows.merge_tokens(maps, -2, "sum")})


def _find_words(merger: WordMerger, positions: Tensor) -> Tensor:
    """Returns the words ``[K, B]`` that the tokens at ``positions`` ``[K, B]`` are of; -1 stays."""
    found = torch.full_like(positions, -1)
    for batch, (places, numbers) in enumerate(zip(merger.places, merger.numbers, strict=True)):
        word_at = dict(zip(places.tolist(), numbers.tolist(), strict=True))
        found[:, batch] = torch.tensor([word_at.get(at, -1) for at in positions[:, batch].tolist()])
    return found
