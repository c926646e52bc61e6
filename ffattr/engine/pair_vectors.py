"""The vectors of single pairs of tokens, each on its own: for a map of few pairs, for which nothing needs to be
prepared that many would share, and for the sample that a sketch is fitted to and judged by."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..decomposition.layer import Block, LayerWeights
from ..decomposition.routing import Routing
from ..decomposition.scopes import Scope
from ..decomposition.walk import Stream
from ..ops.reduction import Reduction, reduce_vectors
from .key_tokens import KeyTokens, StreamMap
from .pack import Pack, QueryBlock
from .planning.costs import Blocks
from .query_pass import QueryPass, Slopes, pass_queries

__all__ = ["fill_pairs", "pair_vectors", "sample_pair_vectors"]

_QUERIES = 512
"""Pairs are those of so many queries, if there are so many: few with many keys each are not like the rest of a map."""


def fill_pairs(
    weights: LayerWeights,
    sources: Sequence[KeyTokens],
    passed: QueryPass,
    routing: Routing | None,
    within: Blocks,
    to: Mapping[Scope, Tensor],
    reduction: Reduction = "l2",
) -> None:
    """Write the rows ``to[scope]`` ``[n, C]`` of feed-forward maps, with a vector for every pair."""
    for number, source in enumerate(sources):
        columns = _column_of_keys(passed.queries, passed.alpha[number].shape[-1])
        query, key = (nonzero_pairs(source, number, passed) & (columns >= 0)).nonzero(as_tuple=True)
        step = within.queries * within.ff_keys
        for some, keys in zip(query.split(step), key.split(step), strict=True):
            for scope, found in pair_vectors(weights, source, number, passed, routing, some, keys).items():
                rows = to.get(scope.seen_from(source.path.source))
                if rows is not None:
                    total = passed.totals[scope][some] if reduction == "alti" else None
                    rows[some, columns[some, keys]] = reduce_vectors(found, reduction, total)


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

    def keep(scope: Scope, stream: Stream) -> None:
        """Nothing is kept of the queries' own streams."""

    index = torch.randperm(len(pack.query_tokens), generator=generator)[:_QUERIES].sort().values
    queries = pack.choose_queries(index.to(pack.query_tokens.device))
    routing = None if pack.routing is None else pack.routing.of(queries.token_in_pack)
    passed = pass_queries(weights, sources, queries, routing, slopes, keep)
    found = []
    for number, source in enumerate(sources):
        query, key = _draw_pairs(nonzero_pairs(source, number, passed), pairs, generator)
        found.append(pair_vectors(weights, source, number, passed, routing, query, key))
    return {scope: torch.cat([one[scope] for one in found]) for scope in weights.pairwise_scopes}


def pair_vectors(
    weights: LayerWeights,
    source: KeyTokens,
    number: int,
    passed: QueryPass,
    routing: Routing | None,
    query: Tensor,
    key: Tensor,
) -> dict[Scope, Tensor]:
    """The vectors ``[p, d]`` by feed-forward scope: what key ``key[i]`` of its sequence, of source ``number``, brings
    to query ``query[i]`` of the block that has ``passed``."""
    queries, alpha = passed.queries, passed.alpha[number]
    first = torch.cat([torch.full_like(queries.token_in_sequence[q], source.starts[b]) for b, q in queries.sequences()])
    token = first[query] + key
    weight = alpha[:, query, key].T  # [p, H]
    values = (weight[..., None] * source.values[token]).flatten(1)
    # An encoder's token has no residual, even if it were the query.
    itself = (key == queries.token_in_sequence[query]).to(values)[:, None]

    def carry(point: StreamMap, scale: Tensor | None) -> Tensor:
        brought = values @ point.matrix + itself * source.residual_at(point, token)
        return brought if scale is None else brought * scale[query, None]

    path, scale, ff_scale = source.path, passed.residual_scale[number], passed.ff_scale[number]
    residual = carry(path.residual, scale)
    # Without a norm of its own, the block reads the residual stream.
    ff_input = residual if path.ff_input is path.residual and ff_scale is scale else carry(path.ff_input, ff_scale)
    ff = _feed_forward(weights, ff_input, passed.slopes, query, routing)
    found = [ff, ff + residual]
    if weights.norm_after_ff is not None:
        assert passed.norm_scale is not None
        found.append(weights.norm_after_ff.linear(ff + residual) * passed.norm_scale[query, None])
    return dict(zip(weights.pairwise_scopes, found, strict=True))


def nonzero_pairs(source: KeyTokens, number: int, passed: QueryPass) -> Tensor:
    """Which keys bring anything to which queries, by attention or as themselves: ``[n, M]``."""
    alpha = passed.alpha[number]
    seen = (alpha != 0).any(0)
    if not source.path.reads_own_tokens:
        return seen
    keys = torch.arange(alpha.shape[-1], device=alpha.device)
    return seen | (keys == passed.queries.token_in_sequence[:, None])


def _column_of_keys(queries: QueryBlock, keys: int) -> Tensor:
    """The column of every key of a query's sequence, ``[n, M]``, where each has its own; -1 for none."""
    whole = torch.arange(keys, device=queries.index_in_pack.device)
    columns = whole.repeat(len(queries), 1)
    for b, some in queries.sequences():
        groups = queries.pack.sequences[b].groups
        if groups is not None:
            columns[some, : len(groups)] = groups
    return columns


def _draw_pairs(nonzero: Tensor, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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


def _feed_forward(
    weights: LayerWeights, ff_input: Tensor, slopes: Sequence[Tensor], query: Tensor, routing: Routing | None
) -> Tensor:
    """What the feed-forward block makes of vectors ``[p, d]`` of the queries ``query`` ``[p]``, by the ``slopes``
    ``[S, n, k, F]`` that these have in every branch."""
    out = torch.zeros_like(ff_input)
    norm = weights.norm_of_ff
    for block in weights.blocks(routing):
        slope, pairs, read = slopes[block.place], None, ff_input
        if block.tokens is None:
            factors = slope[:, query, 0]
        else:
            pairs, slot = _pairs_through(block, query, slope.shape[1])
            factors, read = slope[:, query[pairs], slot], ff_input[pairs]
        parts = [
            (read @ projection.weight).mul_(factor)
            for projection, factor in zip(block.branch.projections, factors, strict=True)
        ]
        returned = functools.reduce(Tensor.add_, parts) @ block.branch.down.weight
        out = out.add_(returned) if pairs is None else out.index_add_(0, pairs, returned)
    return out if norm is None else norm.linear(out)


def _pairs_through(block: Block, query: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Which pairs ``[q]`` go to an expert, by their queries ``query`` ``[p]``, and which choice it is."""
    assert block.tokens is not None
    assert block.slots is not None
    slots = torch.full((queries,), -1, device=query.device)
    slots[block.tokens] = block.slots
    pairs = (slots[query] >= 0).nonzero()[:, 0]
    return pairs, slots[query[pairs]]
