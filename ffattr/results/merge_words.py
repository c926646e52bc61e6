"""Maps of words made of maps of tokens: an estimate, for what was computed by token.

Shapes: ``T`` tokens and ``W`` words of the sequence that has most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..analysis.rows import key_mask
from ..analysis.words import Words, mark_of
from .contents import Contents, name_columns
from .scope_names import extra_axis

__all__ = ["WordMerger", "merge_words"]

_KEYS = ("sum", "max")
_QUERIES = ("mean", "max", "first", "last")


def merge_words(
    contents: Contents, keys: str, queries: str, words: Sequence[Sequence[int | None]] | None
) -> dict[str, Any]:
    """Returns the fields that `Attribution.to_words` changes."""
    for name, value, known in (("keys", keys, _KEYS), ("queries", queries, _QUERIES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}, expected one of {', '.join(known)}")
    contents.kept.check_tokens()
    if contents.queries != tuple(range(contents.mask.shape[1])):
        raise ValueError(
            f"words are made of all their tokens, but only {len(contents.queries)} of {contents.mask.shape[1]} queries "
            "were computed; compute them with queries=None"
        )
    if words is not None and contents.key_tokens is not None:
        raise ValueError("words= is for maps whose columns are the same tokens as their rows")
    rows = WordMerger.from_tokens(contents.names, contents.mask, words)
    changed: dict[str, Any] = {"queries": tuple(range(rows.mask.shape[1])), "mask": rows.mask}
    changed |= {"tokens": rows.texts, "labels": None}
    if contents.groups is not None:  # columns are groups already
        columns, changed["groups"] = (
            None,
            rows.merge_tokens(contents.groups[None], -1, "first")[0].masked_fill(~rows.mask, -1),
        )
    elif contents.key_tokens is None:
        columns = rows
    else:
        columns = WordMerger.from_tokens(name_columns(contents), key_mask(contents), None)
        changed |= {"key_tokens": columns.texts, "key_mask": columns.mask}
    scopes = tuple(scope for scope in contents.scopes if extra_axis(scope) != "expert")
    maps = {scope: contents[scope] for scope in scopes}
    if columns is not None:
        maps = {scope: columns.merge_tokens(values, -1, keys) for scope, values in maps.items()}
    maps = {scope: rows.merge_tokens(values, -2, queries) for scope, values in maps.items()}
    bias = {scope: rows.merge_tokens(contents.bias[scope], -1, queries) for scope in scopes}
    kept = replace(contents.kept, maps=maps)
    return {**changed, "kept": kept, "bias": bias, "scopes": scopes, "experts": None, "shares": None}


@dataclass(frozen=True)
class WordMerger:
    """Knows the ``places`` of the real tokens of each sequence and their words' ``numbers``; ``mask`` ``[B, W]``."""

    places: list[Tensor]
    numbers: list[Tensor]
    texts: list[list[str]]
    mask: Tensor

    @classmethod
    def from_tokens(
        cls,
        tokens: Sequence[Sequence[str]],
        mask: Tensor,
        given: Sequence[Sequence[int | None]] | None,
        sentences: bool = False,
    ) -> WordMerger:
        """Reads words, or ``sentences``, off the marks of tokens, or where they are ``given``."""
        if given is not None and (not isinstance(given, Sequence) or isinstance(given, str)):
            raise TypeError(f"words is {given!r}, expected for every sequence a number for each token")
        if given is not None and len(given) != len(mask):
            raise ValueError(f"words has {len(given)} lists, expected one for each of the {len(mask)} sequences")
        places = [row.nonzero().flatten().cpu() for row in mask]
        real = [[row[place] for place in of.tolist()] for row, of in zip(tokens, places, strict=True)]
        mark = mark_of(token for row in real for token in row)
        if sentences:
            found = [Words.from_sentences(row, mark) for row in real]
        else:
            found = [
                Words.from_tokens(
                    row,
                    mark,
                    words=None if given is None else _select_words(given[batch], places[batch], batch, len(mask[0])),
                )
                for batch, row in enumerate(real)
            ]
        most = max((len(one.texts) for one in found), default=0)
        there = torch.arange(most) < torch.tensor([[len(one.texts)] for one in found])
        texts = [[*one.texts, *[""] * (most - len(one.texts))] for one in found]
        return cls(places, [torch.tensor(one.number, dtype=torch.int64) for one in found], texts, there.to(mask.device))

    def merge_tokens(self, values: Tensor, dim: int, how: str) -> Tensor:
        """Returns ``values`` ``[L, B, ..., T, ...]`` with words instead of tokens along ``dim``, which is negative."""
        shape = list(values.shape)
        shape[dim] = self.mask.shape[1]
        merged = values.new_zeros(shape)
        for batch, (places, numbers) in enumerate(zip(self.places, self.numbers, strict=True)):
            of_tokens = values[:, batch].index_select(dim, places.to(values.device))
            _MERGE[how](merged[:, batch], of_tokens, dim, numbers.to(values.device))
        return merged


def _add_tokens(to: Tensor, values: Tensor, dim: int, numbers: Tensor) -> None:
    to.index_add_(dim, numbers, values)


def _average_tokens(to: Tensor, values: Tensor, dim: int, numbers: Tensor) -> None:
    _add_tokens(to, values, dim, numbers)
    counts = numbers.bincount(minlength=to.shape[dim]).clamp_min(1)
    to.div_(counts.view(-1, *[1] * (-dim - 1)))


def _take_largest(to: Tensor, values: Tensor, dim: int, numbers: Tensor) -> None:
    at = numbers.view(-1, *[1] * (-dim - 1)).expand_as(values)
    to.scatter_reduce_(dim, at, values, "amax")  # of norms, which are no less than the zeros there


def _take_first(to: Tensor, values: Tensor, dim: int, numbers: Tensor) -> None:
    begins = torch.diff(numbers, prepend=numbers.new_tensor([-1])).nonzero().flatten()
    to.narrow(dim, 0, len(begins)).copy_(values.index_select(dim, begins))


def _take_last(to: Tensor, values: Tensor, dim: int, numbers: Tensor) -> None:
    ends = torch.diff(numbers, append=numbers.new_tensor([len(numbers)])).nonzero().flatten()
    to.narrow(dim, 0, len(ends)).copy_(values.index_select(dim, ends))


_MERGE: Mapping[str, Callable[[Tensor, Tensor, int, Tensor], None]] = {
    "sum": _add_tokens,
    "mean": _average_tokens,
    "max": _take_largest,
    "first": _take_first,
    "last": _take_last,
}


def _select_words(words: Sequence[int | None], places: Tensor, batch: int, tokens: int) -> list[int | None]:
    if not isinstance(words, Sequence) or isinstance(words, str):
        raise TypeError(f"words[{batch}] is {words!r}, expected a number for each token, None at special ones")
    if len(words) != tokens:
        raise ValueError(f"words[{batch}] has {len(words)} entries, expected one for each of {tokens} tokens")
    return [words[place] for place in places.tolist()]
