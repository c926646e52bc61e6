"""Sequences side by side, without padding, and blocks of their query tokens: what the engine works on at a time.

Short sequences share products, operators and all set-up; a long one is a pack by itself. A query has four numbers: its
place among the queries of the pack, that of its sequence, its token in the pack, and its token in its own sequence.
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

__all__ = ["OneSequence", "Pack", "QueryBlock", "concatenate", "list_starts", "shift_index"]


@dataclass(frozen=True)
class OneSequence:
    """One sequence at the input of a layer: its real tokens ``x`` ``[T, d]`` and which of them are queries,
    ``query_tokens`` ``[N]``, ascending or not.

    A mixture of experts has the ``routing`` of the ``T`` tokens, cross-attention its ``encoder``. ``groups`` ``[T]`` is
    the column that a token's vectors are added up in, -1 for none; None: every token has its own.
    """

    x: Tensor
    attention: Attention
    query_tokens: Tensor
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
        across = 0 if self.encoder is None else self.encoder.attention.pairs(self.query_tokens)
        return self.attention.pairs(self.query_tokens) + across


@dataclass(frozen=True)
class Pack:
    """Sequences of one layer, one after the other: ``K`` tokens, ``N`` query tokens."""

    sequences: tuple[OneSequence, ...]

    @cached_property
    def x(self) -> Tensor:
        """The layer's input ``[K, d]``."""
        return concatenate([one.x for one in self.sequences])

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first token of each sequence, and ``K``."""
        return list_starts([len(one.x) for one in self.sequences])

    @cached_property
    def query_starts(self) -> tuple[int, ...]:
        """The first query of each sequence, and ``N``."""
        return list_starts([len(one.query_tokens) for one in self.sequences])

    @cached_property
    def query_tokens(self) -> Tensor:
        """Which of the ``K`` tokens the queries are, ``[N]``."""
        return concatenate(
            [shift_index(one.query_tokens, by) for one, by in zip(self.sequences, self.starts, strict=False)]
        )

    @cached_property
    def routing(self) -> Routing | None:
        """The routing of the ``K`` tokens."""
        parts = [one.routing for one in self.sequences if one.routing is not None]
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else Routing.join(parts)

    @cached_property
    def _queries_by_set(self) -> list[Tensor]:
        """The queries of each set of experts."""
        return [] if self.routing is None else [tokens for _, tokens, _ in self.routing.of(self.query_tokens).by_set()]

    @cached_property
    def order(self) -> Tensor:
        """All queries in the order in which they are best worked on: in a mixture, those together that go to the same
        experts, which then are prepared once."""
        return concatenate(self._queries_by_set or [torch.arange(len(self.query_tokens), device=self.x.device)])

    @property
    def expert_sets(self) -> int:
        """How many different sets of experts the queries go to."""
        return max(1, len(self._queries_by_set))

    def query_block(self, start: int, queries: int) -> QueryBlock:
        """The next ``queries`` queries from ``start`` of `order` on, or as many as there are."""
        chosen = self.order[start : start + queries]
        return self.choose_queries(chosen.sort().values if self._queries_by_set else chosen)

    def choose_queries(self, index_in_pack: Tensor) -> QueryBlock:
        """The queries ``index_in_pack`` ``[n]``, ascending."""
        if len(self.sequences) == 1:
            return QueryBlock(self, index_in_pack, 0, (len(index_in_pack),))
        counts = _count_by_sequence(index_in_pack, self.query_starts)
        used = [number for number, count in enumerate(counts) if count] or [0]
        return QueryBlock(self, index_in_pack, used[0], tuple(counts[used[0] : used[-1] + 1]))


@dataclass(frozen=True)
class QueryBlock:
    """A block of ``n`` queries of a pack, in its order: ``index_in_pack`` ``[n]`` among its queries.

    ``counts`` of them belong to each of the sequences from ``first`` on, the last of which has some.
    """

    pack: Pack
    index_in_pack: Tensor
    first: int
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.index_in_pack)

    @property
    def one_sequence(self) -> bool:
        """Whether all queries belong to one sequence."""
        return len(self.counts) == 1

    @cached_property
    def token_in_pack(self) -> Tensor:
        """Which of the pack's tokens each query is, ``[n]``."""
        tokens = self.pack.query_tokens
        return tokens if len(self) == len(tokens) else tokens[self.index_in_pack]

    @cached_property
    def token_in_sequence(self) -> Tensor:
        """Which token of its own sequence each query is, ``[n]``."""
        parts = [
            shift_index(self.token_in_pack[queries], -self.pack.starts[number]) for number, queries in self.sequences()
        ]
        return concatenate(parts)

    def sequences(self) -> Iterator[tuple[int, slice]]:
        """Each sequence, by its number in the pack, and which of the block's queries are its."""
        for number, (start, stop) in enumerate(itertools.pairwise(list_starts(self.counts)), self.first):
            yield number, slice(start, stop)

    def key_range(self, starts: tuple[int, ...]) -> slice:
        """The keys of these sequences, which begin at ``starts`` among those of all."""
        return slice(starts[self.first], starts[self.first + len(self.counts)])

    def sequence_bounds(self, keys: list[int]) -> Tensor | None:
        """The argument ``sequences`` of the operators, where each sequence has so many ``keys``."""
        if self.one_sequence:
            return None
        return torch.tensor(list(zip(list_starts(self.counts), list_starts(keys), strict=True)))

    def select(self, index: Tensor) -> QueryBlock:
        """The queries ``index`` ``[m]``, ascending, of the block; with all of its sequences."""
        if self.one_sequence:
            return QueryBlock(self.pack, self.index_in_pack[index], self.first, (len(index),))
        counts = _count_by_sequence(index, list_starts(self.counts))
        return QueryBlock(self.pack, self.index_in_pack[index], self.first, tuple(counts))


def list_starts(lengths: Sequence[int]) -> tuple[int, ...]:
    """Returns where each part begins of what lies one after the other, and where the last one ends."""
    return (0, *itertools.accumulate(lengths))


def shift_index(index: Tensor, by: int) -> Tensor:
    """The numbers of ``index`` and ``by`` each, or ``index`` itself where that is the same: on a GPU a kernel less."""
    return index + by if by else index


def _count_by_sequence(index: Tensor, starts: tuple[int, ...]) -> list[int]:
    """Counts how many of ``index`` are in each of the sequences that begin at ``starts``."""
    number = torch.searchsorted(torch.tensor(starts[1:], device=index.device), index, right=True)
    found: list[int] = number.bincount(minlength=len(starts) - 1).tolist()
    return found


def concatenate(parts: list[Tensor], axis: int = 0) -> Tensor:
    """All parts along one axis; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
