"""The key tokens of an attention: what they bring to the stations of a layer before its feed-forward block.

A layer has one source, its own tokens; with cross-attention a second one, the tokens of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Attention
from .layer import CROSS, CrossWeights, LayerWeights
from .parameters import Norm
from .reference import Encoder, own_values

__all__ = ["Level", "Source", "features", "sources"]


@dataclass(frozen=True)
class Level:
    """The residual stream at one point before the feed-forward block, as linear functions of what a token brings.

    ``matrix`` ``[H * dh, d]`` takes head values there, ``own`` ``[T, d]`` is the token's residual there, both without
    the norms' scales.
    """

    matrix: Tensor
    own: Tensor

    def after(self, norm: Norm | None) -> Level:
        return self if norm is None else Level(norm.linear(self.matrix), norm.linear(self.own))

    def to(self, dtype: torch.dtype) -> Level:
        return Level(self.matrix.to(dtype), self.own.to(dtype))


@dataclass(frozen=True)
class Source:
    """``T`` key tokens under one attention. ``values`` ``[T, H, dh]`` and ``constant`` ``[H, dh]`` are those of
    `ffattr.reference.own_values`; levels are after attention, with its residual and norms, and before the FF block."""

    prefix: str
    weights: LayerWeights | CrossWeights
    attention: Attention
    values: Tensor
    constant: Tensor
    raw: Level
    residual: Level
    ff_input: Level

    @property
    def tokens(self) -> int:
        return len(self.values)

    @property
    def own(self) -> bool:
        """Whether the tokens are the layer's own, so that a query is one of them."""
        return not self.prefix


def sources(
    weights: LayerWeights, x: Tensor, attention: Attention, encoder: Encoder | None, value_bias: str
) -> Iterator[Source]:
    """The layer's own tokens ``x`` ``[T, d]``, then those of the ``encoder`` that its cross-attention reads."""
    norms = [weights.norm_after_attn]
    matrix = weights.out.weight if weights.norm_of_attn is None else weights.norm_of_attn.linear(weights.out.weight)
    parts: list[tuple[str, LayerWeights | CrossWeights, Tensor, Attention, Level]] = [
        ("", weights, x, attention, Level(matrix, x))
    ]
    if weights.cross is not None:
        assert encoder is not None
        norms.append(weights.cross.norm_after_attn)
        # An encoder's token is no query: it has no residual.
        raw = Level(weights.cross.out.weight, x.new_zeros(1, weights.width).expand(len(encoder.states), -1))
        parts.append((CROSS, weights.cross, encoder.states, encoder.attention, raw))
    for number, (prefix, part, keys, seen, raw) in enumerate(parts):
        residual = raw
        for norm in norms[number:]:
            residual = residual.after(norm)
        values, constant = own_values(part, keys, value_bias)
        yield Source(prefix, part, seen, values, constant, raw, residual, residual.after(weights.norm_before_ff))


def features(values: Tensor, matrix: Tensor, own: Tensor, to: Tensor) -> Tensor:
    """What every head, and as one more head the residual, of a block of keys brings: ``to`` ``[m, H + 1, width]``.

    ``values`` ``[m, H, dh]``, ``matrix`` ``[H * dh, width]``, ``own`` ``[m, width]``.
    """
    for head, part in enumerate(matrix.unflatten(0, (values.shape[1], -1))):
        torch.mm(values[:, head], part, out=to[:, head])
    to[:, -1] = own
    return to
