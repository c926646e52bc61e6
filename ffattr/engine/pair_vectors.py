"""Single pairs of tokens, whose vectors are carried through the layer each on its own: all of a map of few pairs, for
which nothing needs to be prepared that many would share, and the sample that a sketch is fitted to and judged by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..decomposition.layer import LayerWeights
from ..decomposition.scopes import Scope
from ..decomposition.walk import Stream
from ..ops.reduction import Reduction, reduce_vectors
from .key_tokens import KeyTokens
from .pack import Pack, QueryBlock
from .query_pass import Pairs, Slopes, pass_queries

__all__ = ["PairRows", "nonzero_pairs", "sample_pair_vectors"]

_QUERIES = 512
"""Pairs are those of so many queries, if there are so many: few with many keys each are not like the rest of a map."""


class PairRows:
    """Rows ``to[scope]`` ``[n, C]`` of feed-forward maps of a block of queries, filled pair by pair."""

    def __init__(
        self,
        sources: Sequence[KeyTokens],
        alpha: Sequence[Tensor],
        queries: QueryBlock,
        to: Mapping[Scope, Tensor],
        reduction: Reduction,
    ) -> None:
        self.sources, self.queries, self.to, self.reduction = sources, queries, to, reduction
        self.columns = [
            _column_of_keys(queries, mixed.shape[-1]) if source.path.reads_own_tokens else None
            for source, mixed in zip(sources, alpha, strict=True)
        ]
        self.pairs = [
            _list_pairs(source, mixed, queries, columns)
            for source, mixed, columns in zip(sources, alpha, self.columns, strict=True)
        ]

    def cut_pairs(self, step: int) -> Iterator[list[Pairs]]:
        """The pairs of each source, about ``step`` of each at a time; at least once, also where there are none."""
        parts = [zip(query.split(step), key.split(step), strict=True) for query, key in self.pairs]
        none = tuple(part[:0] for part in self.pairs[0])
        for some in itertools.zip_longest(*parts, fillvalue=none):
            yield [(query, key) for query, key in some]

    def take_stream(self, scope: Scope, stream: Stream, pairs: Sequence[Pairs]) -> None:
        """Writes what the vectors of ``pairs`` are reduced to at a scope; those of every source are in the stream."""
        rows = self.to.get(scope)
        if rows is None:
            return
        first = 0
        for source, columns, (query, key) in zip(self.sources, self.columns, pairs, strict=True):
            if source.path.source == scope.source:
                vectors = stream.vectors[first : first + len(query)]
                total = stream.total[query] if self.reduction == "alti" else None
                column = key if columns is None else columns[query, key]
                rows[query, column] = reduce_vectors(vectors, self.reduction, total)
            first += len(query)


def sample_pair_vectors(
    weights: LayerWeights,
    pack: Pack,
    sources: Sequence[KeyTokens],
    slopes: Slopes,
    pairs: int,
    generator: torch.Generator,
) -> dict[Scope, Tensor]:
    """The vectors ``[p, d]`` of random pairs by feed-forward scope, which are as likely as each other among all with
    any weight; ``pairs`` of each source. A pair may come twice."""
    index = torch.randperm(len(pack.query_tokens), generator=generator)[:_QUERIES].sort().values
    queries = pack.choose_queries(index.to(pack.query_tokens.device))
    routing = None if pack.routing is None else pack.routing.of(queries.token_in_pack)
    alpha = [source.alpha(queries) for source in sources]
    drawn = [
        _draw_pairs(nonzero_pairs(source, mixed, queries), pairs, generator)
        for source, mixed in zip(sources, alpha, strict=True)
    ]
    found: dict[Scope, Tensor] = {}

    def take(scope: Scope, stream: Stream) -> None:
        if scope in weights.pairwise_scopes:
            found[scope] = stream.vectors

    pass_queries(weights, sources, queries, routing, slopes, take, alpha=alpha, pairs=drawn)
    return {scope: found[scope] for scope in weights.pairwise_scopes}


def _list_pairs(source: KeyTokens, alpha: Tensor, queries: QueryBlock, columns: Tensor | None) -> Pairs:
    """The pairs that bring anything to a column of the map."""
    nonzero = nonzero_pairs(source, alpha, queries)
    query, key = (nonzero if columns is None else nonzero & (columns >= 0)).nonzero(as_tuple=True)
    return query, key


def nonzero_pairs(source: KeyTokens, alpha: Tensor, queries: QueryBlock) -> Tensor:
    """Which keys bring anything to which queries, by attention or as themselves: ``[n, M]`` of ``alpha``
    ``[H, n, M]``."""
    seen = (alpha != 0).any(0)
    if not source.path.reads_own_tokens:
        return seen
    keys = torch.arange(alpha.shape[-1], device=alpha.device)
    return seen | (keys == queries.token_in_sequence[:, None])


def _column_of_keys(queries: QueryBlock, keys: int) -> Tensor | None:
    """The column of every key of a query's sequence, ``[n, M]``, where each has its own; -1 for none. None: its own
    number."""
    if all(queries.pack.sequences[b].groups is None for b, _ in queries.sequences()):
        return None
    columns = torch.arange(keys, device=queries.index_in_pack.device).repeat(len(queries), 1)
    for b, some in queries.sequences():
        groups = queries.pack.sequences[b].groups
        if groups is not None:
            columns[some, : len(groups)] = groups
    return columns


def _draw_pairs(nonzero: Tensor, pairs: int, generator: torch.Generator) -> Pairs:
    """Row and column of ``pairs`` random entries of ``nonzero`` ``[n, M]`` that are True, in the order of the rows."""
    upto = nonzero.cumsum(1).cpu()
    count = upto[:, -1]
    if not bool(count.any()):  # no query sees any of an encoder's tokens
        return (torch.empty(0, dtype=torch.int64, device=nonzero.device),) * 2
    rows = count.double().multinomial(pairs, replacement=True, generator=generator).bincount(minlength=len(count))
    which = torch.rand(len(count), int(rows.max()), generator=generator, dtype=torch.float64)
    column = torch.searchsorted(upto, (which * count[:, None]).long() + 1)
    row, place = (torch.arange(int(rows.max())) < rows[:, None]).nonzero(as_tuple=True)
    return row.to(nonzero.device), column[row, place].to(nonzero.device)
