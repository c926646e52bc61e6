"""Sequences side by side, without padding, and blocks of their query tokens: what the engine works on at a time.

Short sequences share products, operators and all set-up; a long one is a pack by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..decomposition.attention import Attention
from ..decomposition.reference import Encoder
from ..decomposition.routing import Routing

__all__ = ["OneSequence", "Pack", "Part", "concatenated", "starts_of"]


@dataclass(frozen=True)
class OneSequence:
    """One sequence at the input of a layer: its real tokens ``x`` ``[T, d]`` and query tokens ``rows`` ``[N]``,
    ascending or not.

    A mixture of experts has the ``routing`` of the ``T`` tokens, cross-attention its ``encoder``. ``groups`` ``[T]`` is
    the column that a token's vectors are added up in, -1 for none; None: every token has its own.
    """

    x: Tensor
    attention: Attention
    rows: Tensor
    routing: Routing | None = None
    encoder: Encoder | None = None
    groups: Tensor | None = None

    @property
    def keys(self) -> int:
        """How many tokens are keys, the encoder's included."""
        return len(self.x) + (0 if self.encoder is None else len(self.encoder.states))

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs are not masked."""
        across = 0 if self.encoder is None else self.encoder.attention.pairs(self.rows)
        return self.attention.pairs(self.rows) + across


@dataclass(frozen=True)
class Pack:
    """Sequences of one layer, one after the other: ``K`` tokens, ``N`` query tokens."""

    sequences: tuple[OneSequence, ...]

    @cached_property
    def x(self) -> Tensor:
        """``[K, d]``"""
        return concatenated([one.x for one in self.sequences])

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first token of each sequence, and ``K``."""
        return starts_of([len(one.x) for one in self.sequences])

    @cached_property
    def query_starts(self) -> tuple[int, ...]:
        """The first query of each sequence, and ``N``."""
        return starts_of([len(one.rows) for one in self.sequences])

    @cached_property
    def rows(self) -> Tensor:
        """``[N]``: which of the ``K`` tokens the queries are."""
        return concatenated([one.rows + start for one, start in zip(self.sequences, self.starts, strict=False)])

    @cached_property
    def routing(self) -> Routing | None:
        """Of the ``K`` tokens."""
        parts = [one.routing for one in self.sequences if one.routing is not None]
        if not parts:
            return None
        return Routing(concatenated([part.index for part in parts]), concatenated([part.weight for part in parts]))

    @cached_property
    def _by_set(self) -> list[Tensor]:
        """The queries of each set of experts."""
        return [] if self.routing is None else [tokens for _, tokens, _ in self.routing.of(self.rows).by_set()]

    @cached_property
    def order(self) -> Tensor:
        """All queries in the order in which they are best worked on: of a mixture, those together that go to the same
        experts, which then are prepared once."""
        return concatenated(self._by_set or [torch.arange(len(self.rows), device=self.rows.device)])

    @property
    def sets(self) -> int:
        """How many different sets of experts the queries go to."""
        return max(1, len(self._by_set))

    def part(self, start: int, queries: int) -> Part:
        """``queries`` of them, from place ``start`` of `order` on, or as many as there are."""
        return self.chosen(self.order[start : start + queries].sort().values)

    def chosen(self, places: Tensor) -> Part:
        """The queries ``places`` ``[n]``, ascending."""
        if len(self.sequences) == 1:
            return Part(self, places, 0, (len(places),))
        counts = _counts(places, self.query_starts)
        used = [number for number, count in enumerate(counts) if count] or [0]
        return Part(self, places, used[0], tuple(counts[used[0] : used[-1] + 1]))


@dataclass(frozen=True)
class Part:
    """A block of ``n`` queries of a pack, in its order; ``counts`` of them belong to each of the sequences from
    ``first`` on, the last of which has some."""

    pack: Pack
    places: Tensor
    first: int
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def single(self) -> bool:
        """Whether all queries belong to one sequence."""
        return len(self.counts) == 1

    @cached_property
    def rows(self) -> Tensor:
        """``[n]``: which of the pack's tokens."""
        return self.pack.rows[self.places]

    @cached_property
    def local(self) -> Tensor:
        """``[n]``: which tokens of their own sequences."""
        return concatenated([self.rows[rows] - self.pack.starts[number] for number, rows in self.sequences()])

    def sequences(self) -> Iterator[tuple[int, slice]]:
        """Each sequence, by its number in the pack, and which of the part's queries are its."""
        for number, (start, stop) in enumerate(itertools.pairwise(starts_of(self.counts)), self.first):
            yield number, slice(start, stop)

    def tokens(self, starts: tuple[int, ...]) -> slice:
        """The keys of these sequences, which begin at ``starts`` among those of all."""
        return slice(starts[self.first], starts[self.first + len(self.counts)])

    def bounds(self, keys: list[int]) -> Tensor | None:
        """The argument ``sequences`` of the operators, where each sequence has so many ``keys``."""
        if self.single:
            return None
        return torch.tensor(list(zip(starts_of(self.counts), starts_of(keys), strict=True)))

    def only(self, index: Tensor) -> Part:
        """The queries ``index`` ``[m]``, ascending, of the part; with all of its sequences."""
        if self.single:
            return Part(self.pack, self.places[index], self.first, (len(index),))
        counts = _counts(index, starts_of(self.counts))
        return Part(self.pack, self.places[index], self.first, tuple(counts))


def starts_of(lengths: Sequence[int]) -> tuple[int, ...]:
    """Where each begins of what lies one after the other, and where the last one ends."""
    return (0, *itertools.accumulate(lengths))


def _counts(places: Tensor, starts: tuple[int, ...]) -> list[int]:
    """How many of ``places`` are in each of the sequences that begin at ``starts``."""
    number = torch.searchsorted(torch.tensor(starts[1:], device=places.device), places, right=True)
    found: list[int] = number.bincount(minlength=len(starts) - 1).tolist()
    return found


def concatenated(parts: list[Tensor], axis: int = 0) -> Tensor:
    """Along one axis; of a single one no copy is made."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
