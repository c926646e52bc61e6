"""The vectors of single pairs of tokens, each on its own: for a map of few pairs, for which nothing needs to be
prepared that many would share, and for the sample that a sketch is fitted to and judged by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..decomposition.layer import LayerWeights
from ..decomposition.reference import Stream
from ..decomposition.routing import Routing
from .key_tokens import Level, Source
from .pack import Pack
from .query_pass import Arrived, Fed, Slopes, arrive, feed

__all__ = ["reach", "sampled", "vectors"]

_QUERIES = 512
"""Pairs are those of so many queries, if there are so many: few with many keys each are not like the rest of a map."""


def sampled(
    weights: LayerWeights,
    pack: Pack,
    sources: Sequence[Source],
    slopes: Slopes,
    pairs: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Of every feed-forward scope ``[p, d]``: what the keys of random pairs bring to their queries, which are as likely
    as each other among all with any weight; of each source ``pairs``. A pair may come twice."""

    def keep(name: str, stream: Stream) -> None:
        """Nothing is kept of the queries' own streams."""

    places = torch.randperm(len(pack.rows), generator=generator)[:_QUERIES].sort().values
    part = pack.chosen(places.to(pack.rows.device))
    arrived = arrive(weights, sources, part, keep)
    routing = None if pack.routing is None else pack.routing.of(part.rows)
    fed = feed(weights, sources, arrived, routing, slopes, keep)
    found = []
    for number, source in enumerate(sources):
        query, column = _drawn(reach(source, number, arrived), pairs, generator)
        found.append(vectors(weights, source, number, arrived, fed, routing, query, column))
    return {name: torch.cat([one[name] for one in found]) for name in weights.wide_scopes}


def vectors(
    weights: LayerWeights,
    source: Source,
    number: int,
    arrived: Arrived,
    fed: Fed,
    routing: Routing | None,
    query: Tensor,
    column: Tensor,
) -> dict[str, Tensor]:
    """Of every feed-forward scope ``[p, d]``: what key ``column[i]`` of its sequence, on route ``number``, brings to
    query ``query[i]`` of the block that has ``arrived``."""
    part, alpha = arrived.queries, arrived.alpha[number]
    first = torch.cat([torch.full_like(part.local[rows], source.starts[b]) for b, rows in part.sequences()])
    token = first[query] + column
    weight = alpha[:, query, column].T  # [p, H]
    values = (weight[..., None] * source.values[token]).flatten(1)
    itself = (column == part.local[query]).to(values)[:, None]  # an encoder's token has no residual, even if it were

    def at(level: Level, scale: Tensor | None) -> Tensor:
        brought = values @ level.matrix + itself * source.own(level, token)
        return brought if scale is None else brought * scale[query, None]

    residual = at(source.route.residual, arrived.residual_scale[number])
    ff = _feed_forward(weights, at(source.route.ff_input, arrived.ff_scale[number]), fed.slope, query, routing)
    found = [ff, ff + residual]
    if weights.norm_after_ff is not None:
        assert fed.norm_scale is not None
        found.append(weights.norm_after_ff.linear(ff + residual) * fed.norm_scale[query, None])
    return dict(zip(weights.wide_scopes, found, strict=True))


def reach(source: Source, number: int, arrived: Arrived) -> Tensor:
    """``[n, M]``: which keys bring anything to which queries, by attention or as themselves."""
    alpha = arrived.alpha[number]
    seen = (alpha != 0).any(0)
    if not source.route.own:
        return seen
    return seen | (torch.arange(alpha.shape[-1], device=alpha.device) == arrived.queries.local[:, None])


def _drawn(reach: Tensor, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row and column of ``pairs`` random entries of ``reach`` ``[n, M]`` that are True, in the order of the rows."""
    upto = reach.cumsum(1).cpu()
    count = upto[:, -1]
    if not bool(count.any()):  # no query sees any of an encoder's tokens
        return (torch.empty(0, dtype=torch.int64, device=reach.device),) * 2
    rows = count.double().multinomial(pairs, replacement=True, generator=generator).bincount(minlength=len(count))
    which = torch.rand(len(count), int(rows.max()), generator=generator, dtype=torch.float64)
    column = torch.searchsorted(upto, (which * count[:, None]).long() + 1)
    row, place = (torch.arange(int(rows.max())) < rows[:, None]).nonzero(as_tuple=True)
    return row.to(reach.device), column[row, place].to(reach.device)


def _feed_forward(
    weights: LayerWeights, ff_input: Tensor, slope: Tensor, query: Tensor, routing: Routing | None
) -> Tensor:
    """What the feed-forward block makes of vectors ``[p, d]`` of the queries ``query`` ``[p]``, by the slopes
    ``[S, n, k, F]`` of these."""
    out = torch.zeros_like(ff_input)
    norm = weights.norm_of_ff
    everything = torch.arange(len(slope[0]), device=query.device)
    shares = [(None, everything, torch.zeros_like(everything))] if routing is None else routing.by_expert()
    for number, tokens, slots in shares:
        block = weights if number is None else weights.expert(number)
        of_query = torch.full_like(everything, -1)
        of_query[tokens] = slots
        pairs = (of_query[query] >= 0).nonzero()[:, 0]
        factors = slope[:, query[pairs], of_query[query[pairs]]]
        neurons = sum(
            ff_input[pairs] @ projection.weight * factor
            for projection, factor in zip(block.projections, factors, strict=True)
        )
        out.index_add_(0, pairs, neurons @ block.down.weight)
    return out if norm is None else norm.linear(out)
