"""A block of query tokens on their own way through a layer: the walk of `decomposition`.

It yields what maps need of a query: attention weights, the norms' scales, slopes; the stream of every scope, for its
bias; and the layer's output, which is compared with the model's. Vectors of single pairs may come along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..decomposition import integrated_gradients as ig
from ..decomposition import reference
from ..decomposition.layer import Branch, LayerWeights
from ..decomposition.reference import Path, Rule
from ..decomposition.routing import Routing
from ..decomposition.scopes import Scope, Source
from ..decomposition.walk import Stream, add_streams, walk
from ..ops.contract import Operators
from .key_tokens import KeyTokens
from .pack import QueryBlock

__all__ = ["Pairs", "QueryPass", "Slopes", "pass_queries"]

TakeStream = Callable[[Scope, Stream], None]
"""Takes the stream at a scope."""

Pairs = tuple[Tensor, Tensor]
"""Some queries and keys ``[P]`` each: places in a block of queries, and in the columns of their weights."""


@dataclass(frozen=True)
class Slopes:
    """Integrated-Gradients factors by the backend's operator, where that knows the activation."""

    rule: Rule
    operators: Operators

    def compute(self, branch: Branch, path: Path) -> Tensor:
        """The factors ``[S, n, F]`` of a path."""
        name = branch.activation.name
        if branch.clamp is not None or name not in ig.ACTIVATIONS:  # operators know names
            return reference.slopes(branch, path, self.rule)
        return self.operators.ig_slope(path.z, path.base, None, name, self.rule.name, self.rule.steps)


@dataclass(frozen=True)
class QueryPass:
    """What ``n`` query tokens leave on their way through a layer.

    For each source of keys: attention weights ``alpha`` ``[H, n, M]`` (see `KeyTokens.alpha`), with the scale of a norm
    on what attention returns, and the scales ``1 / s_i`` ``[n]`` of the norms that its vectors have passed, before the
    residual stream and before the feed-forward block (None: no norm). ``ff_input`` is what that block reads, ``ff``
    what it returns.

    ``slopes``: for each branch of the block ``[S, n, k, F]``, of each token's ``k`` experts (1: a dense branch), with
    their shares and the scale of a norm on what the block returns; none where no feed-forward scope is wanted.
    ``norm_scale`` ``[n]`` is that of the norm after the block, ``output`` ``[n, d]`` that of the layer.

    Where vectors are to be compared with what they add up to, ``totals`` holds that by scope: ``[n, d]``, told apart by
    head or expert ``[H, n, d]`` and ``[k, n, d]``. ``expert_sums`` is the latter, where it was asked for.
    """

    queries: QueryBlock
    alpha: list[Tensor]
    residual_scale: list[Tensor | None]
    ff_scale: list[Tensor | None]
    ff_input: Stream
    ff: Stream
    slopes: tuple[Tensor, ...]
    norm_scale: Tensor | None
    output: Tensor
    expert_sums: Tensor | None = None
    totals: Mapping[Scope, Tensor] = field(default_factory=dict)

    def select(self, index: Tensor) -> QueryPass:
        """The queries ``index`` ``[m]`` alone, without their streams."""

        def select_scales(scales: list[Tensor | None]) -> list[Tensor | None]:
            return [None if scale is None else scale[index] for scale in scales]

        return replace(
            self,
            queries=self.queries.select(index),
            alpha=[part[:, index] for part in self.alpha],
            residual_scale=select_scales(self.residual_scale),
            ff_scale=select_scales(self.ff_scale),
            slopes=tuple(slope[:, index] for slope in self.slopes),
            norm_scale=None if self.norm_scale is None else self.norm_scale[index],
            totals={scope: total.index_select(-2, index) for scope, total in self.totals.items()},
        )


def pass_queries(
    weights: LayerWeights,
    sources: Sequence[KeyTokens],
    queries: QueryBlock,
    routing: Routing | None,
    slopes: Slopes | None,
    take: TakeStream,
    by_expert: bool = False,
    alpha: Sequence[Tensor] = (),
    pairs: Sequence[Pairs] = (),
) -> QueryPass:
    """Through the whole layer. ``routing`` is that of the block's tokens; ``slopes`` None: no feed-forward scope is
    wanted, so that of its block only the output is computed. ``by_expert``: the sum of all vectors by each expert is
    wanted, too.

    ``pairs`` of each source: the vectors of these are carried along, in this order, to each scope that ``take`` is
    called for; the block's weights ``alpha`` are then known. A parallel layer carries none, nor does ``by_expert``.
    """
    x = queries.pack.x[queries.token_in_pack]

    def number_queries() -> Tensor:
        return torch.arange(len(queries), device=x.device)

    by_source = {source.path.source: source for source in sources}
    mixed = dict(zip(by_source, alpha or [source.alpha(queries) for source in sources], strict=True))
    chosen = dict(zip(by_source, pairs, strict=True)) if pairs else {}
    if weights.parallel:  # its block reads the query's own vector alone, which takes the way that others are spared
        own = Stream.from_parts(x, number_queries(), torch.zeros_like(x), x)
    elif chosen:
        own = Stream.of_pairs(x, queries.token_in_sequence, *chosen["own"])
    else:
        own = Stream.of_total(x)
    passed: list[Tensor | None] = []
    ff_scale: list[Tensor | None] | None = None
    factors: tuple[Tensor, ...] = ()
    norm_scale: Tensor | None = None
    expert_sums: Tensor | None = None
    ff_input = ff = own

    def attend(source: Source) -> Stream:
        keys, of_pairs = by_source[source], None
        if chosen:
            query, key = chosen[source]
            values = keys.values_of(queries, query, key)
            of_pairs = reference.weigh_values(mixed[source], values, query, key), query
        read = keys.read_context(mixed[source], queries)
        found = reference.attention_stream(keys.path.weights, mixed[source], read, keys.constant, of_pairs)
        return found.with_vectors(torch.zeros_like(x), number_queries()) if weights.parallel else found

    def feed_forward(read: Stream) -> Stream:
        nonlocal ff_input, factors, expert_sums
        ff_input = read
        if slopes is None:
            return read.with_total(reference.feed_forward(weights, read.total, routing))
        summed = read
        if by_expert and routing is not None:  # the sum of all as one vector
            places = routing.index.shape[1] + weights.shared
            expert_sums = read.total.new_zeros(places, len(read.total), weights.width)
            summed = read.with_vectors(read.total - read.bias, number_queries())
        returned, factors = _through_branches(weights, summed, routing, slopes, expert_sums)
        return returned if summed is read else read.with_rows(returned.rows[returned.pairs :])

    for station in walk(weights, own, attend, feed_forward):
        scope, scale = station.scope, station.norm_scale
        if scope is None or scope.point == "atb":  # what came before passes a norm behind attention as well
            passed = [_multiply_scales(one, scale) for one in [*passed, None]]
            ff_scale = [None] if weights.parallel else passed
        elif scope.point == "attn" and scale is not None:  # the scale is one of the query's weights
            mixed[scope.source] = mixed[scope.source] * scale[:, None]
        elif scope.point == "ff_input" and ff_scale is not None:
            ff_scale = [_multiply_scales(one, scale) for one in ff_scale]
        elif scope.point == "ff" and scale is not None:
            factors = tuple(slope * scale[:, None, None] for slope in factors)
            if expert_sums is not None and weights.norm_of_ff is not None:
                expert_sums = weights.norm_of_ff.linear(expert_sums) * scale[:, None]
        elif scope.point == "ff_res_ln":
            norm_scale = scale
        if scope is not None:
            if scope.point == "ff":
                ff = station.stream
            # Behind all attentions, the tokens of every source have reached the point.
            everywhere = scope.point not in ("attn", "attn_res")
            for source in by_source if everywhere else (scope.source,):
                take(scope.seen_from(source), station.stream)
    assert ff_scale is not None
    weighted = [mixed[source] for source in by_source]
    output = station.stream.total
    return QueryPass(queries, weighted, passed, ff_scale, ff_input, ff, factors, norm_scale, output, expert_sums)


def _through_branches(
    weights: LayerWeights, read: Stream, routing: Routing | None, slopes: Slopes, expert_sums: Tensor | None
) -> tuple[Stream, tuple[Tensor, ...]]:
    """What the feed-forward block returns, and its slopes with the experts' shares. ``expert_sums`` ``[k, n, d]`` take
    every expert's share of vectors of which each query has one."""
    returned: Stream | None = None
    shared = weights.shared
    factors: list[Tensor] = [read.total.new_empty(0)] * len(weights.branches)
    for place, branch in enumerate(weights.branches):
        if branch.routed:
            assert routing is not None
            factors[place] = read.total.new_zeros(len(branch.projections), *routing.index.shape, branch.width)
            returned = read.with_rows(torch.zeros_like(read.rows))
    for block in weights.blocks(routing):
        branch, tokens, share = block.branch, block.tokens, block.share
        part, index = reference.enter_block(block, read)
        path = reference.preactivations(branch, part, slopes.rule.baseline)
        slope = slopes.compute(branch, path)
        part = reference.leave_block(block, reference.branch_stream(branch, part, path, slope))
        slope = slope if share is None else slope * share[:, None]
        if tokens is None:
            factors[block.place] = slope[:, :, None]
            if expert_sums is not None:  # behind those of the experts
                expert_sums[len(expert_sums) - shared] = part.vectors
                shared -= 1
            returned = part if returned is None else add_streams(returned, part)
        elif returned is not None and index is not None:
            returned.rows.index_add_(0, index, part.rows)
            factors[block.place][:, tokens, block.slots] = slope
            if expert_sums is not None and block.slots is not None:
                expert_sums[block.slots, tokens] = part.vectors
    assert returned is not None
    return returned, tuple(factors)


def _multiply_scales(scale: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if scale is None else scale if other is None else scale * other
