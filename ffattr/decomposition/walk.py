"""The one walk through a layer, from its input to its output, that everything shares which follows a layer.

What attention and the feed-forward networks are is passed in: the definition carries the vectors of all tokens along
(`reference`), the engine only what queries need of their own streams, and the detection of structures nothing but the
stream itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import Norm
from .layer import LayerWeights
from .scopes import Scope, Source

__all__ = [
    "Station",
    "Stream",
    "add_streams",
    "join_streams",
    "normalise_stream",
    "scale_stream",
    "select_stream",
    "walk",
]


@dataclass(frozen=True)
class Stream:
    """The residual stream of ``N`` query tokens at one point of a layer, decomposed: ``total = sum_j vectors + bias``.

    ``vectors`` ``[N, T, d]``, one per input token (who needs none leaves them out: ``T`` = 0), ``bias`` and ``total``
    ``[N, d]``. ``total`` is what the model computes, not the sum, so that each is a check on the other.
    """

    vectors: Tensor
    bias: Tensor
    total: Tensor

    @classmethod
    def of_total(cls, total: Tensor) -> Stream:
        """A stream ``[N, d]`` that is not decomposed."""
        return cls(total.new_empty(len(total), 0, total.shape[-1]), torch.zeros_like(total), total)


@dataclass(frozen=True)
class Station:
    """The stream at a point of the layer; ``norm_scale`` ``1 / s_i`` ``[N]`` is that of the norm that it has just
    passed, if it has passed one.

    ``scope``: the point, seen from the tokens that the last attention reads. The point between the two attentions of a
    decoder has no name: None.
    """

    scope: Scope | None
    stream: Stream
    norm_scale: Tensor | None = None


def walk(
    weights: LayerWeights,
    own: Stream,
    attend: Callable[[Source], Stream],
    feed_forward: Callable[[Stream], Stream],
) -> Iterator[Station]:
    """Every station of the way of some query tokens, in order; nothing behind the last one asked for is computed.

    ``own`` is the layer's input at these tokens. ``attend`` gives what an attention returns to them, ``feed_forward``
    what the feed-forward networks return to what they read.
    """
    stream = own
    for source, attention in weights.attentions:
        attended, scale = normalise_stream(attention.norm_of_attn, attend(source))
        yield Station(weights.scope_at("attn", source), attended, scale)
        stream = add_streams(stream, attended) if source == "own" else join_streams(stream, attended)
        scale = None
        if attention.norm_after_attn is not None:
            yield Station(weights.scope_at("attn_res", source), stream)
            stream, scale = normalise_stream(attention.norm_after_attn, stream)
        last = source == weights.attentions[-1][0]
        yield Station(weights.scope_at("atb") if last else None, stream, scale)

    ff_input = own if weights.parallel else stream
    if weights.norm_before_ff is not None:
        ff_input, scale = normalise_stream(weights.norm_before_ff, ff_input)
        yield Station(weights.scope_at("ff_input"), ff_input, scale)
    ff, scale = normalise_stream(weights.norm_of_ff, feed_forward(ff_input))
    yield Station(weights.scope_at("ff"), ff, scale)
    stream = add_streams(stream, ff)
    yield Station(weights.scope_at("ff_res"), stream)
    if weights.norm_after_ff is not None:
        stream, scale = normalise_stream(weights.norm_after_ff, stream)
        yield Station(weights.scope_at("ff_res_ln"), stream, scale)


def add_streams(stream: Stream, other: Stream) -> Stream:
    """The sum of two streams: what a residual connection does."""
    vectors = stream.vectors + other.vectors if stream.vectors.numel() else stream.vectors
    return Stream(vectors, stream.bias + other.bias, stream.total + other.total)


def join_streams(stream: Stream, other: Stream) -> Stream:
    """The sum of two streams whose vectors come from different tokens: those of ``other`` are last."""
    vectors = torch.cat([stream.vectors, other.vectors], 1)
    return Stream(vectors, stream.bias + other.bias, stream.total + other.total)


def select_stream(stream: Stream, tokens: Tensor) -> Stream:
    """The stream of the tokens ``tokens`` ``[n]`` alone."""
    return Stream(stream.vectors[tokens], stream.bias[tokens], stream.total[tokens])


def scale_stream(stream: Stream, factor: Tensor | None) -> Stream:
    """The stream, times a number for each token, ``[N]``; None: as it is."""
    if factor is None:
        return stream
    return Stream(stream.vectors * factor[:, None, None], stream.bias * factor[:, None], stream.total * factor[:, None])


def normalise_stream(norm: Norm | None, stream: Stream) -> tuple[Stream, Tensor | None]:
    """The stream after a norm whose statistics are frozen (2021, section 3.3), and its scale ``1 / s_i`` ``[N]``.

    Without a norm it stays as it is.
    """
    if norm is None:
        return stream, None
    scale, vectors = norm.scale(stream.total), stream.vectors
    if vectors.numel():  # who needs none has no work with them
        vectors = norm.linear(vectors) * scale[:, None, None]
    return Stream(vectors, norm.affine(stream.bias, scale), norm.affine(stream.total, scale)), scale
