"""One layer of one sequence, from weights and attention to the norms of every scope asked for.

Data flow. For a block of queries: attention rows, then the tokens' own stream through the layer, which yields the
norms' scales, the slopes, the bias, and the output that is compared with the model's. Then, for a block of keys: value
vectors, features, operators, a tile of each map. Nothing of size ``[N, T, d]`` exists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ig, reference
from .backends import Backend
from .layer import Attention, LayerWeights, Norm
from .plan import LayerPlan
from .reference import Rule, Stream

__all__ = ["LayerMaps", "layer_maps"]


@dataclass(frozen=True)
class LayerMaps:
    """Norms of one layer and one sequence, and the layer output ``[N, d]`` recomputed on the way.

    ``maps[scope]`` ``[N, T]`` (``attn_heads``: ``[H, N, T]``), ``bias[scope]`` ``[N]`` (zero for ``attn_heads``).
    """

    maps: dict[str, Tensor]
    bias: dict[str, Tensor]
    output: Tensor


def layer_maps(
    weights: LayerWeights,
    x: Tensor,
    attention: Attention,
    rows: Tensor,
    scopes: Collection[str],
    rule: Rule,
    value_bias: str,
    backend: Backend,
    plan: LayerPlan,
) -> LayerMaps:
    """Norm maps of the query tokens ``rows`` ``[N]`` of one sequence ``x`` ``[T, d]`` without padding."""
    shape = (len(rows), len(x))
    result = LayerMaps(
        {name: x.new_empty((weights.heads, *shape) if name == "attn_heads" else shape) for name in scopes},
        {name: x.new_zeros(len(rows)) for name in scopes},
        x.new_empty(len(rows), weights.width),
    )
    layer = None if backend.is_reference else _Layer(weights, x, scopes, rule, value_bias, backend, plan)
    for start in range(0, len(rows), plan.blocks.queries):
        part = slice(start, min(start + plan.blocks.queries, len(rows)))
        if layer is None:
            _materialised(weights, x, attention, rows[part], part, rule, value_bias, result)
        else:
            layer.run(attention, rows[part], part, result)
    return result


def _materialised(
    weights: LayerWeights,
    x: Tensor,
    attention: Attention,
    rows: Tensor,
    part: slice,
    rule: Rule,
    value_bias: str,
    result: LayerMaps,
) -> None:
    for name, stream in reference.decompose(weights, x, attention, rows, rule, value_bias):
        if name in result.maps:
            result.maps[name][..., part, :] = stream.vectors.norm(dim=-1)
        if name in result.bias and name != "attn_heads":
            result.bias[name][part] = stream.bias.norm(dim=-1)
        output = stream.total
    result.output[part] = output


@dataclass(frozen=True)
class _Queries:
    """What a block of ``n`` query tokens brings to every key: ``alpha`` ``[H, n, T]``, ``rows`` ``[n]``, the scales
    ``1 / s_i`` ``[n]`` of the norms on the way (None: no such norm) and the slopes ``[S, n, F]``."""

    rows: Tensor
    alpha: Tensor
    residual_scale: Tensor | None  # of the norm after attention
    ff_scale: Tensor | None  # of all norms before the feed-forward block
    slope: Tensor | None  # with ff_scale folded in; None where no feed-forward scope is wanted
    norm_scale: Tensor | None  # of the norm after the feed-forward block


class _Layer:
    """What all blocks of one layer and sequence share."""

    def __init__(
        self,
        weights: LayerWeights,
        x: Tensor,
        scopes: Collection[str],
        rule: Rule,
        value_bias: str,
        backend: Backend,
        plan: LayerPlan,
    ) -> None:
        self.weights, self.x, self.rule, self.plan = weights, x, rule, plan
        self.operators = backend.operators
        self.scopes = frozenset(scopes)
        self.wide_scopes = weights.wide_scopes
        self.wide = not self.scopes.isdisjoint(self.wide_scopes)
        self.values, self.constant = reference.own_values(weights, x, value_bias)
        if self.wide:
            self.projections = torch.stack([projection.weight for projection in weights.projections])  # [S, d, F]
            folded = self.projections
            for norm in reversed(self._norms_before_ff()):
                folded = torch.stack([norm.fold(matrix) for matrix in folded])
            self.maps = weights.out.weight @ folded  # [S, H * dh, F]: from the heads' values to pre-activations
            self.down = weights.down.weight.contiguous()

    def _norms_before_ff(self) -> list[Norm]:
        norms = (self.weights.norm_after_attn, self.weights.norm_before_ff)
        return [norm for norm in norms if norm is not None]

    def run(self, attention: Attention, rows: Tensor, part: slice, result: LayerMaps) -> None:
        """All maps of one block of query tokens."""
        queries = self._query_block(attention, rows, part, result)
        step = self.plan.blocks.keys
        for start in range(0, len(self.x), step):
            keys = slice(start, min(start + step, len(self.x)))
            alpha, position = queries.alpha[..., keys], rows - start
            own_keys = (position >= 0) & (position < keys.stop - start)
            if not own_keys.any() and not alpha.any():  # a block beyond the causal diagonal or outside a window
                for tile in result.maps.values():
                    tile[..., part, keys] = 0
                continue
            for name, tile in self._key_block(queries, alpha.contiguous(), position, keys):
                if name in self.scopes:
                    result.maps[name][..., part, keys] = tile

    def _query_block(self, attention: Attention, rows: Tensor, part: slice, result: LayerMaps) -> _Queries:
        """The query tokens' own way through the layer, by the formulas of `reference` without any vectors."""
        weights = self.weights
        alpha = reference.attention_rows(attention, rows)
        none = self.x.new_empty(len(rows), 0, weights.width)
        names = iter(weights.scopes)
        next(names)  # attn_heads has no bias and no output

        def keep(stream: Stream) -> None:
            name = next(names)
            if name in self.scopes:
                result.bias[name][part] = stream.bias.norm(dim=-1)

        stream = reference.attention_stream(weights, alpha, self.values, self.constant, none)
        keep(stream)
        own = self.x[rows]
        stream = reference.residual_stream(stream, Stream(none, torch.zeros_like(own), own))
        keep(stream)
        residual_scale = None
        if weights.norm_after_attn is not None:
            stream, residual_scale = reference.norm_stream(weights.norm_after_attn, stream)
            keep(stream)
        ff_input, ff_scale = stream, residual_scale
        if weights.norm_before_ff is not None:
            ff_input, scale = reference.norm_stream(weights.norm_before_ff, stream)
            ff_scale = scale if ff_scale is None else ff_scale * scale
            keep(ff_input)

        if not self.wide:  # the rest of the layer only to compare its output
            result.output[part] = reference.layer_output(weights, stream.total, ff_input.total)
            return _Queries(rows, alpha, residual_scale, ff_scale, None, None)
        path = reference.preactivations(weights, ff_input, self.rule.baseline)
        slope = self._slope(path)
        ff = reference.feed_forward_stream(weights, ff_input, path, slope)
        keep(ff)
        stream = reference.residual_stream(stream, ff)
        keep(stream)
        norm_scale = None
        if weights.norm_after_ff is not None:
            stream, norm_scale = reference.norm_stream(weights.norm_after_ff, stream)
            keep(stream)
        result.output[part] = stream.total
        if ff_scale is not None:
            slope *= ff_scale[:, None]
        return _Queries(rows, alpha, residual_scale, ff_scale, slope, norm_scale)

    def _slope(self, path: reference.FeedForward) -> Tensor:
        name = self.weights.activation.name
        if name not in ig.ACTIVATIONS:  # the operators know names; any other activation is differentiated here
            return reference.slopes(self.weights, path, self.rule)
        out: Tensor = self.operators.ig_slope(path.z, path.base, None, name, self.rule.name, self.rule.steps)
        return out

    def _key_block(
        self, queries: _Queries, alpha: Tensor, position: Tensor, keys: slice
    ) -> Iterator[tuple[str, Tensor]]:
        """``(scope, [n, m])`` of the wanted scopes, and of those that come from the same pass."""
        weights, scopes = self.weights, self.scopes

        def norms(gram: Tensor, scale: Tensor | None) -> Tensor:
            out: Tensor = self.operators.gram_norms(alpha, position, gram, scale)
            return out

        vectors = reference.head_vectors(weights, self.values[keys])
        raw = torch.cat([vectors, self.x[keys, None]], dim=1)  # [m, H + 1, d]: the residual is one more head
        if "attn_heads" in scopes:
            yield "attn_heads", alpha * vectors.norm(dim=-1).T[:, None]
        summed = "atb" if weights.norm_after_attn is None else "attn_res"
        if not scopes.isdisjoint(("attn", summed)):
            gram = _gram(raw)
            yield "attn", norms(gram[:, :-1, :-1], None)
            yield summed, norms(gram, None)
        residual = raw
        if weights.norm_after_attn is not None:
            residual = weights.norm_after_attn.linear(raw)
            if "atb" in scopes:
                yield "atb", norms(_gram(residual), queries.residual_scale)
        if weights.norm_before_ff is not None and "atb_ln" in scopes:
            yield "atb_ln", norms(_gram(weights.norm_before_ff.linear(residual)), queries.ff_scale)
        if self.wide:
            yield from zip(self.wide_scopes, self._wide(queries, alpha, position, keys, residual), strict=True)

    def _wide(self, queries: _Queries, alpha: Tensor, position: Tensor, keys: slice, residual: Tensor) -> Tensor:
        """All feed-forward scopes at once: ``[2 or 3, n, m]``."""
        weights = self.weights
        values, own = self.values[keys], self.x[keys]
        for norm in self._norms_before_ff():
            own = norm.linear(own)
        own = own @ self.projections  # [S, m, F]
        after = weights.norm_after_ff
        tail = (
            residual,
            queries.residual_scale,
            None if after is None else after.weight,
            queries.norm_scale,
            after is not None and after.kind == "layer",
        )
        out: Tensor
        if self.plan.method == "operator":
            out = self.operators.operator_norms(
                alpha, position, values, self.maps, own, queries.slope, self.down, *tail
            )
            return out
        features = own.new_empty(len(own), len(values), weights.heads + 1, weights.ff_width)
        for stream, matrix in enumerate(self.maps):
            by_head = values.transpose(0, 1) @ matrix.unflatten(0, (weights.heads, -1))  # [H, m, F]
            features[stream, :, :-1] = by_head.transpose(0, 1)
        features[:, :, -1] = own
        out = self.operators.ff_norms(alpha, position, features, queries.slope, self.down, *tail)
        return out


def _gram(features: Tensor) -> Tensor:
    """Inner products of each token's feature vectors, ``[m, G, d]`` to ``[m, G, G]``."""
    wide = features.double()  # in float32 a squared norm would lose half the digits
    return wide @ wide.mT
