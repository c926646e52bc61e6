"""The key tokens of an attention: what they bring to the stations of a layer before its feed-forward block.

A layer has one source, its own tokens; with cross-attention a second one, the tokens of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition import reference
from ..decomposition.affine import Norm
from ..decomposition.attention import Attention
from ..decomposition.layer import CrossWeights, LayerWeights
from ..decomposition.scopes import CROSS
from .pack import Pack, Part, concatenated, starts_of

__all__ = ["Level", "Route", "Source", "features", "routes"]


@dataclass(frozen=True)
class Level:
    """The residual stream at one point before the feed-forward block, as linear functions of what a token brings.

    ``matrix`` ``[H * dh, d]`` takes head values there, ``norms`` what a token's residual passes on its way there: both
    without the norms' scales.
    """

    matrix: Tensor
    norms: tuple[Norm, ...] = ()

    def after(self, norm: Norm | None) -> Level:
        return self if norm is None else Level(norm.linear(self.matrix), (*self.norms, norm))

    def own(self, x: Tensor) -> Tensor:
        """Of tokens ``x`` ``[m, d]``, their residual there."""
        for norm in self.norms:
            x = norm.linear(x)
        return x


@dataclass(frozen=True)
class Route:
    """What the layer does with all that one attention reads: its levels are after attention, with its residual and
    norms, and before the feed-forward block."""

    prefix: str
    weights: LayerWeights | CrossWeights
    raw: Level
    residual: Level
    ff_input: Level

    @property
    def own(self) -> bool:
        """Whether the tokens are the layer's own, so that a query is one of them."""
        return not self.prefix

    def source(self, pack: Pack, value_bias: str) -> Source:
        """The tokens of ``pack`` on this route."""
        if self.own:
            tokens, attention = pack.x, [one.attention for one in pack.sequences]
            starts, x = pack.starts, tokens
        else:
            encoders = [one.encoder for one in pack.sequences if one.encoder is not None]
            tokens, attention = concatenated([one.states for one in encoders]), [one.attention for one in encoders]
            # An encoder's token is no query: it has no residual.
            starts, x = starts_of([len(one.states) for one in encoders]), tokens.new_zeros(1, self.raw.matrix.shape[1])
        values, constant = reference.own_values(self.weights, tokens, value_bias)
        return Source(self, tuple(attention), starts, values, constant, x)


def routes(weights: LayerWeights) -> Iterator[Route]:
    """Of the layer's own tokens, then of those of an encoder."""
    matrix = weights.out.weight if weights.norm_of_attn is None else weights.norm_of_attn.linear(weights.out.weight)
    raw = Level(matrix)
    residual = raw.after(weights.norm_after_attn)
    if weights.cross is not None:  # whose norm the layer's own tokens pass as well
        residual = residual.after(weights.cross.norm_after_attn)
    yield Route("", weights, raw, residual, residual.after(weights.norm_before_ff))
    if weights.cross is not None:
        raw = Level(weights.cross.out.weight)
        residual = raw.after(weights.cross.norm_after_attn)
        yield Route(CROSS, weights.cross, raw, residual, residual.after(weights.norm_before_ff))


@dataclass(frozen=True)
class Source:
    """The ``K`` key tokens of a pack on their route; those of sequence ``b`` begin at ``starts[b]``.

    ``values`` ``[K, H, dh]`` and ``constant`` ``[H, dh]`` are those of `ffattr.decomposition.reference.own_values`, ``x`` ``[K, d]``
    is what reaches a query of the token beside attention (of an encoder ``[1, d]``: zero for all).
    """

    route: Route
    attention: tuple[Attention, ...]
    starts: tuple[int, ...]
    values: Tensor
    constant: Tensor
    x: Tensor

    def own(self, level: Level, tokens: slice | Tensor = slice(None)) -> Tensor:
        """``[m, d]``: what tokens bring to a level beside attention."""
        if self.route.own:
            return level.own(self.x[tokens])
        return level.own(self.x).expand(len(self.values), -1)[tokens]

    def alpha(self, queries: Part) -> Tensor:
        """Attention weights ``[H, n, M]``: column ``j`` is the ``j``-th key of the query's own sequence, of which the
        longest has ``M``."""
        found = [self.attention[b].weights(queries.local[rows]) for b, rows in queries.sequences()]
        if queries.single:
            return found[0]
        longest = max(alpha.shape[-1] for alpha in found)
        return torch.cat([torch.nn.functional.pad(alpha, (0, longest - alpha.shape[-1])) for alpha in found], 1)

    def read(self, alpha: Tensor, queries: Part) -> Tensor:
        """What the heads read, ``[n, H, dh]``."""
        if queries.single:
            return reference.context(alpha, self.values[queries.tokens(self.starts)])
        parts = []
        for b, rows in queries.sequences():
            keys = slice(self.starts[b], self.starts[b + 1])
            parts.append(reference.context(alpha[:, rows, : keys.stop - keys.start], self.values[keys]))
        return torch.cat(parts)


def features(values: Tensor, matrix: Tensor, own: Tensor, to: Tensor) -> Tensor:
    """What every head, and as one more head the residual, of a block of keys brings: ``to`` ``[m, H + 1, width]``.

    ``values`` ``[m, H, dh]``, ``matrix`` ``[H * dh, width]``, ``own`` ``[m, width]``.
    """
    for head, part in enumerate(matrix.unflatten(0, (values.shape[1], -1))):
        torch.mm(values[:, head], part, out=to[:, head])
    to[:, -1] = own
    return to
