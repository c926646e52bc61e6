"""A block of query tokens on their own way through a layer, by the formulas of `reference` without any vectors.

It yields what tiles need of a query: attention weights, the norms' scales, slopes; the bias of every scope; and the
layer's output, which is compared with the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..decomposition import integrated_gradients as ig
from ..decomposition import reference
from ..decomposition.layer import LayerWeights
from ..decomposition.reference import FeedForward, Rule, Stream
from ..decomposition.routing import Routing
from .key_tokens import Source
from .pack import Part

__all__ = ["Arrived", "Fed", "Slopes", "arrive", "feed", "output"]

Keep = Callable[[str, Stream], None]
"""Takes the stream at a scope for its bias."""


@dataclass(frozen=True)
class Slopes:
    """Integrated-Gradients factors ``[S, n, F]`` of a path, by the backend's operator where it knows the activation."""

    rule: Rule
    operators: Any

    def __call__(self, weights: LayerWeights, path: FeedForward) -> Tensor:
        name = weights.activation.name
        if weights.clamp is not None or name not in ig.ACTIVATIONS:  # operators know names
            return reference.slopes(weights, path, self.rule)
        out: Tensor = self.operators.ig_slope(path.z, path.base, None, name, self.rule.name, self.rule.steps)
        return out


@dataclass(frozen=True)
class Arrived:
    """``n`` query tokens before the feed-forward block.

    For each source: attention weights ``alpha`` ``[H, n, M]`` (see `ffattr.engine.key_tokens.Source.alpha`), with the scale of a
    norm on what attention returns, and the scales ``1 / s_i`` ``[n]`` of the norms that its vectors have passed, before
    the residual stream and before the feed-forward block (None: no norm). ``stream`` is what the block's output is
    added to, ``ff_input`` what it reads.
    """

    queries: Part
    alpha: list[Tensor]
    residual_scale: list[Tensor | None]
    ff_scale: list[Tensor | None]
    stream: Stream
    ff_input: Stream

    def only(self, index: Tensor) -> Arrived:
        """The queries ``index`` ``[m]`` alone, without their streams."""

        def some(scales: list[Tensor | None]) -> list[Tensor | None]:
            return [None if scale is None else scale[index] for scale in scales]

        alpha = [part[:, index] for part in self.alpha]
        return replace(self, alpha=alpha, residual_scale=some(self.residual_scale), ff_scale=some(self.ff_scale))


@dataclass(frozen=True)
class Fed:
    """The block's query tokens after the feed-forward block: what it returned; the slopes ``[S, n, k, F]`` of each
    token's ``k`` experts (1: a dense block), with the scale of a norm on what it returns; the scale of the norm after
    it; the layer's ``output`` ``[n, d]``."""

    ff: Stream
    slope: Tensor
    norm_scale: Tensor | None
    output: Tensor


def arrive(weights: LayerWeights, sources: Sequence[Source], queries: Part, keep: Keep) -> Arrived:
    """From the layer's input to the feed-forward block."""
    x = queries.pack.x[queries.rows]
    none = x.new_empty(len(x), 0, weights.width)
    own = Stream(none, torch.zeros_like(x), x)
    stream = own
    alphas: list[Tensor] = []
    scales: list[Tensor | None] = []
    for source in sources:
        part = source.route.weights
        alpha = source.alpha(queries)
        added = reference.attention_stream(part, alpha, source.read(alpha, queries), source.constant, none)
        if source.route.own and weights.norm_of_attn is not None:  # its scale is one of the query's weights
            added, scale = reference.norm_stream(weights.norm_of_attn, added)
            alpha = alpha * scale[:, None]
        keep(f"{source.route.prefix}attn", added)
        stream = reference.residual_stream(stream, added)
        passed: Tensor | None = None
        if part.norm_after_attn is not None:
            keep(f"{source.route.prefix}attn_res", stream)
            stream, passed = reference.norm_stream(part.norm_after_attn, stream)
        alphas.append(alpha)
        # What came before passes this norm as well.
        scales = [_times(scale, passed) for scale in [*scales, None]]
    ff_input, ff_scales = stream, scales
    if weights.parallel:  # the query's own vector is all there is: it takes the way that the others are spared
        ff_input, ff_scales = Stream(x[:, None], own.bias, own.total), [None]
    _keep_all(keep, sources, "atb", stream)
    if weights.norm_before_ff is not None:
        ff_input, passed = reference.norm_stream(weights.norm_before_ff, ff_input)
        ff_scales = [_times(scale, passed) for scale in ff_scales]
        _keep_all(keep, sources, weights.own_scopes[weights.own_scopes.index("atb") + 1], ff_input)
    return Arrived(queries, alphas, scales, ff_scales, stream, ff_input)


def feed(
    weights: LayerWeights,
    sources: Sequence[Source],
    arrived: Arrived,
    routing: Routing | None,
    slopes: Slopes,
    keep: Keep,
) -> Fed:
    """Through the feed-forward block and what follows it. ``routing`` is that of the block's tokens."""
    ff, slope = _by_expert(weights, arrived.ff_input, routing, slopes)
    names = iter(weights.ff_scopes)
    if weights.norm_of_ff is not None:
        ff, scale = reference.norm_stream(weights.norm_of_ff, ff)
        slope *= scale[:, None, None]
    _keep_all(keep, sources, next(names), ff)
    stream = reference.residual_stream(arrived.stream, Stream(arrived.stream.vectors, ff.bias, ff.total))
    _keep_all(keep, sources, next(names), stream)
    norm_scale = None
    if weights.norm_after_ff is not None:
        stream, norm_scale = reference.norm_stream(weights.norm_after_ff, stream)
        _keep_all(keep, sources, next(names), stream)
    return Fed(ff, slope, norm_scale, stream.total)


def output(weights: LayerWeights, arrived: Arrived, routing: Routing | None) -> Tensor:
    """The layer's output ``[n, d]`` alone, where no feed-forward scope is wanted."""
    t = arrived.ff_input.total
    if weights.mixture:
        assert routing is not None
        added = torch.zeros_like(t)
        for number, tokens, slots in routing.by_expert():
            share = routing.weight[tokens, slots].to(t)[:, None]
            added.index_add_(0, tokens, reference.feed_forward(weights.expert(number), t[tokens]) * share)
    else:
        added = reference.feed_forward(weights, t)
    total = arrived.stream.total + (added if weights.norm_of_ff is None else weights.norm_of_ff(added))
    return total if weights.norm_after_ff is None else weights.norm_after_ff(total)


def _by_expert(
    weights: LayerWeights, ff_input: Stream, routing: Routing | None, slopes: Slopes
) -> tuple[Stream, Tensor]:
    """What the feed-forward block returns, and its slopes ``[S, n, k, F]`` with the experts' weights."""
    if not weights.mixture:
        path = reference.preactivations(weights, ff_input, slopes.rule.baseline)
        slope = slopes(weights, path)
        return reference.feed_forward_stream(weights, ff_input, path, slope), slope[:, :, None]
    assert routing is not None
    bias, total = torch.zeros_like(ff_input.bias), torch.zeros_like(ff_input.total)
    shape = (len(weights.projections), *routing.index.shape, weights.ff_width)
    every = total.new_zeros(shape)
    for number, tokens, slots in routing.by_expert():
        one = weights.expert(number)
        part = Stream(ff_input.vectors[tokens], ff_input.bias[tokens], ff_input.total[tokens])
        path = reference.preactivations(one, part, slopes.rule.baseline)
        slope = slopes(one, path)
        part = reference.feed_forward_stream(one, part, path, slope)
        share = routing.weight[tokens, slots].to(total)[:, None]
        bias.index_add_(0, tokens, part.bias * share)
        total.index_add_(0, tokens, part.total * share)
        every[:, tokens, slots] = slope * share
    return Stream(ff_input.vectors, bias, total), every


def _times(scale: Tensor | None, passed: Tensor | None) -> Tensor | None:
    return passed if scale is None else scale if passed is None else scale * passed


def _keep_all(keep: Keep, sources: Sequence[Source], name: str, stream: Stream) -> None:
    """Of a point of the layer that the tokens of all sources have reached."""
    for source in sources:
        keep(source.route.prefix + name, stream)
