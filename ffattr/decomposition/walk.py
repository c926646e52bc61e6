"""The one walk through a layer, from its input to its output, that everything shares which follows a layer.

What attention and the feed-forward networks are is passed in: the definition carries the vectors of all tokens along
(`reference`), the engine only what queries need of their own streams, and the detection of structures nothing but the
stream itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
    "select_rows",
    "walk",
]


@dataclass(frozen=True)
class Stream:
    """The residual stream of ``N`` query tokens at one point of a layer, decomposed: ``total = sum of vectors + bias``.

    All of it lies in ``rows`` ``[P + 2 N, d]``, so that a projection is one product, which reads its matrix once: the
    ``vectors`` ``[P, d]``, each of an input token, then of every query the ``bias`` and the ``total``. ``query``
    ``[P]`` says which query a vector belongs to. Who needs no vectors leaves them out: ``P`` = 0. ``total`` is what the
    model computes, not the sum, so that each is a check on the other.
    """

    rows: Tensor
    query: Tensor
    queries: int

    @classmethod
    def from_parts(cls, vectors: Tensor, query: Tensor, bias: Tensor, total: Tensor) -> Stream:
        """The stream of ``vectors`` ``[P, d]`` of the queries ``query`` ``[P]``, ``bias`` and ``total`` ``[N, d]``."""
        return cls(torch.cat([vectors, bias, total]), query, len(total))

    @classmethod
    def of_pairs(cls, own: Tensor, tokens: Tensor, query: Tensor, key: Tensor) -> Stream:
        """A layer's input ``own`` ``[N, d]``, and as vectors what keys of pairs ``(query, key)`` ``[P]`` bring to
        it: the query itself, which is key ``tokens`` ``[N]``, its own vector, all others nothing."""
        itself = tokens.index_select(0, query) == key
        return cls.from_parts(own.index_select(0, query) * itself[:, None], query, torch.zeros_like(own), own)

    @classmethod
    def of_total(cls, total: Tensor) -> Stream:
        """A stream ``[N, d]`` that is not decomposed."""
        none = torch.empty(0, dtype=torch.int64, device=total.device)
        return cls(torch.cat([torch.zeros_like(total), total]), none, len(total))

    @property
    def pairs(self) -> int:
        """How many vectors there are, ``P``."""
        return len(self.query)

    @property
    def vectors(self) -> Tensor:
        return self.rows[: self.pairs]

    @property
    def bias(self) -> Tensor:
        return self.rows[self.pairs : self.pairs + self.queries]

    @property
    def total(self) -> Tensor:
        return self.rows[self.pairs + self.queries :]

    def with_rows(self, rows: Tensor, shift: Tensor | None = None) -> Stream:
        """The stream of other ``rows``, new ones; ``shift`` ``[d]`` is added to bias and total, which alone take what
        belongs to no token."""
        if shift is not None:
            rows[self.pairs :].add_(shift)
        return replace(self, rows=rows)

    def with_vectors(self, vectors: Tensor, query: Tensor) -> Stream:
        """The same bias and total beside other vectors."""
        return Stream.from_parts(vectors, query, self.bias, self.total)

    def with_total(self, total: Tensor) -> Stream:
        """``total`` alone: vectors and bias are zero."""
        return replace(self, rows=torch.cat([torch.zeros_like(self.rows[: -len(total) or None]), total]))

    def multiply(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """``rows`` ``[P + 2 N, d]``, each times the number of its query, of ``numbers`` ``[N]``."""
        if not self.pairs:
            both: Tensor = rows.unflatten(0, (2, self.queries))
            return (both * numbers[:, None]).flatten(0, 1)
        return rows * torch.cat([numbers.index_select(0, self.query), numbers, numbers])[:, None]


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
    """The sum of two streams, of the same pairs in the same order: what a residual connection does."""
    return replace(stream, rows=stream.rows + other.rows)


def join_streams(stream: Stream, other: Stream) -> Stream:
    """The sum of two streams whose vectors come from different tokens: those of ``other`` are last."""
    vectors = torch.cat([stream.vectors, other.vectors])
    query = torch.cat([stream.query, other.query])
    return Stream.from_parts(vectors, query, stream.bias + other.bias, stream.total + other.total)


def select_rows(stream: Stream, tokens: Tensor) -> tuple[Stream, Tensor]:
    """The stream of the queries ``tokens`` ``[n]`` alone, and which of the rows those are."""
    first, query = stream.pairs, stream.query
    index = torch.cat([tokens + first, tokens + (first + stream.queries)])
    if first:
        place = torch.full((stream.queries,), -1, device=tokens.device)
        place[tokens] = torch.arange(len(tokens), device=tokens.device)
        found = place[query]
        kept = (found >= 0).nonzero()[:, 0]
        index, query = torch.cat([kept, index]), found[kept]
    return Stream(stream.rows.index_select(0, index), query, len(tokens)), index


def scale_stream(stream: Stream, factor: Tensor | None) -> Stream:
    """The stream, times a number for each query, ``[N]``; None: as it is."""
    return stream if factor is None else replace(stream, rows=stream.multiply(stream.rows, factor))


def normalise_stream(norm: Norm | None, stream: Stream) -> tuple[Stream, Tensor | None]:
    """The stream after a norm whose statistics are frozen (2021, section 3.3), and its scale ``1 / s_i`` ``[N]``.

    Without a norm it stays as it is.
    """
    if norm is None:
        return stream, None
    centred = norm.centre(stream.rows)
    scale = norm.scale_centred(centred[stream.pairs + stream.queries :])
    return stream.with_rows(norm.stretch(stream.multiply(centred, scale)), norm.bias), scale
