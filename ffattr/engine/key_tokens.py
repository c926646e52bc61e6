"""The key tokens of an attention: what they bring to the points of a layer before its feed-forward block.

A layer has one source of keys, its own tokens; with cross-attention a second one, the tokens of the encoder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..decomposition import reference
from ..decomposition.affine import Norm
from ..decomposition.attention import Attention
from ..decomposition.layer import CrossWeights, LayerWeights
from ..decomposition.scopes import Point, Source
from .pack import Pack, QueryBlock, concatenate, list_starts, shift_index

__all__ = [
    "AttentionPath",
    "KeyTokens",
    "Make",
    "Recall",
    "StreamMap",
    "attention_paths",
    "make_anew",
    "write_head_vectors",
]

Make = Callable[[], list[Tensor]]

Recall = Callable[[str, Make], list[Tensor]]
"""Gives the matrices of a name: what `Make` makes, or has made of the same weights before. Nobody writes into them."""


def make_anew(name: str, make: Make) -> list[Tensor]:
    """The matrices, of which nothing is kept."""
    return make()


@dataclass(frozen=True)
class StreamMap:
    """The residual stream at one point before the feed-forward block, as linear functions of what a token brings.

    What the attention to ``source`` reads passes its output projection ``out`` ``[H * dh, d]``, the norm ``of_attn`` of
    what it returns, and ``norms``, which a token's residual passes as well: all without the norms' scales.
    """

    source: Source
    out: Tensor
    of_attn: Norm | None
    norms: tuple[Norm, ...] = ()
    recall: Recall = make_anew

    @cached_property
    def matrix(self) -> Tensor:
        """What takes head values to the point, ``[H * dh, d]``: made when it is asked for first."""
        if not self._passed:
            return self.out
        make = functools.partial(functools.reduce, lambda matrix, norm: norm.linear(matrix), self._passed, self.out)
        return self.recall(self.name, lambda: [make()])[0]

    @property
    def name(self) -> str:
        """The name by which its matrix is recalled: those that have passed the same norms are the same."""
        return f"{self.source} {len(self._passed)}"

    @property
    def _passed(self) -> tuple[Norm, ...]:
        return self.norms if self.of_attn is None else (self.of_attn, *self.norms)

    def carry_residual(self, x: Tensor) -> Tensor:
        """The residual there of tokens ``x`` ``[m, d]``."""
        for norm in self.norms:
            x = norm.linear(x)
        return x


@dataclass(frozen=True)
class AttentionPath:
    """What the layer does with all that one attention reads: `StreamMap`s after attention (``raw``), in the residual
    stream behind its norms, and before the feed-forward block."""

    source: Source
    weights: LayerWeights | CrossWeights
    raw: StreamMap
    residual: StreamMap
    ff_input: StreamMap

    @property
    def reads_own_tokens(self) -> bool:
        """Whether the keys are the layer's own tokens, so that a query is one of them."""
        return self.source == "own"

    def key_tokens(self, pack: Pack, value_bias: str) -> KeyTokens:
        """The tokens of ``pack`` on this path."""
        if self.reads_own_tokens:
            tokens, attention = pack.x, [one.attention for one in pack.sequences]
            starts, x = pack.starts, tokens
        else:
            encoders = [one.encoder for one in pack.sequences if one.encoder is not None]
            tokens, attention = concatenate([one.states for one in encoders]), [one.attention for one in encoders]
            # An encoder's token is no query: it has no residual.
            starts = list_starts([len(one.states) for one in encoders])
            x = tokens.new_zeros(1, self.raw.out.shape[1])
        values, constant = reference.own_values(self.weights, tokens, value_bias)
        return KeyTokens(self, tuple(attention), starts, values, constant, x)


def attention_paths(weights: LayerWeights, recall: Recall = make_anew) -> Iterator[AttentionPath]:
    """The path of the layer's own tokens, then that of an encoder's."""

    points: tuple[Point, ...] = ("attn", "atb", "ff_input")
    for source, attention in weights.attentions:
        maps: list[StreamMap] = []
        for point in points:
            norms = weights.norms_before(point, source)
            if maps and norms == maps[-1].norms:  # the same stream
                maps.append(maps[-1])
            else:
                maps.append(StreamMap(source, attention.out.weight, attention.norm_of_attn, norms, recall))
        yield AttentionPath(source, attention, *maps)


@dataclass(frozen=True)
class KeyTokens:
    """The ``K`` key tokens of a pack on their path; those of sequence ``b`` begin at ``starts[b]``.

    ``values`` ``[K, H, dh]`` and ``constant`` ``[H, dh]`` are those of `reference.own_values`, ``x`` ``[K, d]`` is what
    reaches a query of the token beside attention (of an encoder ``[1, d]``: zero for all).
    """

    path: AttentionPath
    attention: tuple[Attention, ...]
    starts: tuple[int, ...]
    values: Tensor
    constant: Tensor | None
    x: Tensor

    def residual_at(self, point: StreamMap, tokens: slice | Tensor = slice(None)) -> Tensor:
        """What tokens bring to a point beside attention, ``[m, d]``."""
        if self.path.reads_own_tokens:
            return point.carry_residual(self.x[tokens])
        return point.carry_residual(self.x).expand(len(self.values), -1)[tokens]

    def values_of(self, queries: QueryBlock, query: Tensor, key: Tensor) -> Tensor:
        """The values ``[P, H, dh]`` of the keys of pairs (see `ffattr.engine.query_pass`)."""
        if queries.one_sequence:
            return self.values.index_select(0, shift_index(key, self.starts[queries.first]))
        starts = [torch.full((some.stop - some.start,), self.starts[b]) for b, some in queries.sequences()]
        return self.values.index_select(0, torch.cat(starts).to(key.device).index_select(0, query) + key)

    def alpha(self, queries: QueryBlock) -> Tensor:
        """Attention weights ``[H, n, M]``: column ``j`` is the ``j``-th key of the query's own sequence, of which the
        longest has ``M``."""
        found = [
            self.attention[b].attention_weights(queries.token_in_sequence[some]) for b, some in queries.sequences()
        ]
        if queries.one_sequence:
            return found[0]
        longest = max(alpha.shape[-1] for alpha in found)
        return torch.cat([torch.nn.functional.pad(alpha, (0, longest - alpha.shape[-1])) for alpha in found], 1)

    def read_context(self, alpha: Tensor, queries: QueryBlock) -> Tensor:
        """What the heads read, ``[n, H, dh]``."""
        if queries.one_sequence:
            return reference.context(alpha, self.values[queries.key_range(self.starts)])
        parts = []
        for b, some in queries.sequences():
            keys = slice(self.starts[b], self.starts[b + 1])
            parts.append(reference.context(alpha[:, some, : keys.stop - keys.start], self.values[keys]))
        return torch.cat(parts)


def write_head_vectors(values: Tensor, matrix: Tensor, own: Tensor, to: Tensor) -> Tensor:
    """What every head, and as one more head the residual, of a block of keys brings: ``to`` ``[m, H + 1, width]``.

    ``values`` ``[m, H, dh]``, ``matrix`` ``[H * dh, width]``, ``own`` ``[m, width]``.
    """
    # One product of all heads: written where it belongs, and on a GPU one launch.
    torch.bmm(values.transpose(0, 1), matrix.unflatten(0, (values.shape[1], -1)), out=to[:, :-1].transpose(0, 1))
    to[:, -1] = own
    return to
