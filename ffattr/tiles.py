"""All maps of one layer and sequence for one block of query tokens, tile by tile.

Data flow. Attention rows, then the tokens' own stream through the layer, which yields the norms' scales, the slopes,
the bias, and the output that is compared with the model's. Then, for a block of keys: value vectors, features,
operators, a tile of each map. Nothing of size ``[N, T, d]`` exists.

Precision. The wide operands are rounded once each to the dtype of the plan; attention, streams, statistics and norms
are in that of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ig, reference
from .attention import Attention
from .backends import Backend
from .dtypes import operand_dtype, quantised
from .layer import LayerWeights
from .parameters import Norm
from .plan import LayerPlan
from .reference import Rule, Stream

__all__ = ["Layer", "LayerMaps"]


@dataclass(frozen=True)
class LayerMaps:
    """Norms of one layer and one sequence, the layer output ``[N, d]`` recomputed on the way, and the plan that ran.

    ``maps[scope]`` ``[N, T]`` (``attn_heads``: ``[H, N, T]``), ``bias[scope]`` ``[N]`` (zero for ``attn_heads``).
    """

    maps: dict[str, Tensor]
    bias: dict[str, Tensor]
    output: Tensor
    plan: LayerPlan


@dataclass(frozen=True)
class _Queries:
    """What a block of ``n`` query tokens brings to every key: ``alpha`` ``[H, n, T]``, ``rows`` ``[n]``, the scales
    ``1 / s_i`` ``[n]`` of the norms on the way (None: no such norm) and the slopes ``[S, n, F]``."""

    rows: Tensor
    alpha: Tensor
    residual_scale: Tensor | None  # of the norm after attention
    ff_scale: Tensor | None  # of all norms before the feed-forward block
    slope: Tensor | None  # with ff_scale folded in, a wide operand; None where no feed-forward scope is wanted
    norm_scale: Tensor | None  # of the norm after the feed-forward block
    itself: dict[str, Tensor]  # of a parallel layer: what the query itself brings to scopes from the norm on, [n, d]


@dataclass(frozen=True)
class _Level:
    """The residual stream at one point before the feed-forward block, as linear functions of what a token brings.

    ``matrix`` ``[H * dh, d]`` takes head values there, ``own`` ``[T, d]`` is the token's residual there, both without
    the norms' scales.
    """

    matrix: Tensor
    own: Tensor

    def after(self, norm: Norm | None) -> _Level:
        return self if norm is None else _Level(norm.linear(self.matrix), norm.linear(self.own))

    def to(self, dtype: torch.dtype) -> _Level:
        return _Level(self.matrix.to(dtype), self.own.to(dtype))


_Tiles = Iterator[tuple[str, Tensor]]
_Compute = Callable[[_Queries, Tensor, Tensor, slice], _Tiles]


class Layer:
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
        self.wide = not self.scopes.isdisjoint(weights.wide_scopes)
        self.values, self.constant = reference.own_values(weights, x, value_bias)
        norm = weights.norm_of_attn
        self.raw = _Level(weights.out.weight if norm is None else norm.linear(weights.out.weight), x)
        self.residual = self.raw.after(weights.norm_after_attn)
        self.ff_input = self.residual.after(weights.norm_before_ff)
        if self.wide:
            self._prepare()

    def _prepare(self) -> None:
        """The wide operands that all blocks share, in the dtype of the plan."""
        weights, dtype = self.weights, operand_dtype(self.plan.dtype)
        self.wide_values = self.values.to(dtype)
        self.wide_residual, self.wide_input = self.residual.to(dtype), self.ff_input.to(dtype)
        self.projections = [part.weight.to(dtype) for part in weights.projections]
        # From head values to pre-activations, [S, H * dh, F].
        self.maps = torch.stack([self.wide_input.matrix @ weight for weight in self.projections])
        self.down_scale: Tensor | None = None
        down = weights.down.weight if weights.norm_of_ff is None else weights.norm_of_ff.linear(weights.down.weight)
        if self.plan.dtype == torch.float8_e4m3fn:
            self.down, self.down_scale = quantised(down.contiguous())
        else:
            self.down = down.to(dtype).contiguous()
        # Buffers of the longest block: fresh memory of this size for every block would cost as much as filling it.
        shape = (self.plan.blocks.wide_keys, weights.heads + 1)
        self.residual_features = self.x.new_empty(*shape, weights.width, dtype=dtype)
        if self.plan.method == "direct":
            self.features = self.x.new_empty(len(self.projections), *shape, weights.ff_width, dtype=dtype)

    def run(self, attention: Attention, rows: Tensor, part: slice, result: LayerMaps) -> None:
        """All maps of one block of query tokens."""
        queries = self._query_block(attention, rows, part, result)
        if not self.scopes.issubset(self.weights.wide_scopes):
            self._tiles(self._narrow, self.plan.blocks.keys, queries, part, result)
        if self.wide:
            self._tiles(self._wide, self.plan.blocks.wide_keys, queries, part, result)

    def _tiles(self, compute: _Compute, step: int, queries: _Queries, part: slice, result: LayerMaps) -> None:
        for start in range(0, len(self.x), step):
            keys = slice(start, min(start + step, len(self.x)))
            alpha, position = queries.alpha[..., keys], queries.rows - start
            # To ask would stop a GPU at every block; its kernels skip what is empty.
            if alpha.is_cuda or _in_reach(alpha, position):
                tiles = compute(queries, alpha.contiguous(), position, keys)
            else:
                tiles = ((name, torch.zeros(())) for name in self.scopes)
            for name, tile in tiles:
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
        if weights.norm_of_attn is not None:  # its scale is one of the query's weights
            stream, scale = reference.norm_stream(weights.norm_of_attn, stream)
            alpha = alpha * scale[:, None]
        keep(stream)
        own = Stream(none, torch.zeros_like(self.x[rows]), self.x[rows])
        stream = reference.residual_stream(stream, own)
        keep(stream)
        residual_scale = None
        if weights.norm_after_attn is not None:
            stream, residual_scale = reference.norm_stream(weights.norm_after_attn, stream)
            keep(stream)
        ff_input, ff_scale = stream, residual_scale
        if weights.parallel:  # the query's own vector is all there is: it takes the way that the others are spared
            ff_input, ff_scale = Stream(self.x[rows][:, None], own.bias, own.total), None
        if weights.norm_before_ff is not None:
            ff_input, scale = reference.norm_stream(weights.norm_before_ff, ff_input)
            ff_scale = scale if ff_scale is None else ff_scale * scale
            keep(ff_input)

        if self.scopes.isdisjoint(name for name in weights.scopes if "_ff" in name):  # the rest only for the output
            result.output[part] = reference.layer_output(weights, stream.total, ff_input.total)
            itself = self._itself(alpha, rows, ff_input, None) if weights.parallel else {}
            return _Queries(rows, alpha, residual_scale, ff_scale, None, None, itself)
        path = reference.preactivations(weights, ff_input, self.rule.baseline)
        slope = self._slope(path)
        ff = reference.feed_forward_stream(weights, ff_input, path, slope)
        if weights.norm_of_ff is not None:
            ff, scale = reference.norm_stream(weights.norm_of_ff, ff)
            slope *= scale[:, None]
        keep(ff)
        itself = self._itself(alpha, rows, ff_input, ff) if weights.parallel else {}
        stream = reference.residual_stream(stream, Stream(none, ff.bias, ff.total))
        keep(stream)
        norm_scale = None
        if weights.norm_after_ff is not None:
            stream, norm_scale = reference.norm_stream(weights.norm_after_ff, stream)
            keep(stream)
        result.output[part] = stream.total
        if ff_scale is not None:
            slope *= ff_scale[:, None]
        slope = slope.to(operand_dtype(self.plan.dtype))
        return _Queries(rows, alpha, residual_scale, ff_scale, slope, norm_scale, itself)

    def _itself(self, alpha: Tensor, rows: Tensor, ff_input: Stream, ff: Stream | None) -> dict[str, Tensor]:
        """Of a parallel layer: the vectors ``[n, d]`` that queries bring to their own scopes from the norm on."""
        names = self.weights.scopes[self.weights.scopes.index("atb") + 1 :]
        found = [ff_input.vectors[:, 0]] if self.weights.norm_before_ff is not None else []
        if ff is not None:
            weight = alpha.gather(-1, rows.expand(len(alpha), -1)[..., None]).transpose(0, 1)  # [n, H, 1]
            block = (weight * self.values[rows]).flatten(1) @ self.raw.matrix + self.x[rows]
            found += [ff.vectors[:, 0], block + ff.vectors[:, 0]]
        return dict(zip(names, found, strict=False))

    def _slope(self, path: reference.FeedForward) -> Tensor:
        name = self.weights.activation.name
        if name not in ig.ACTIVATIONS:  # the operators know names; any other activation is differentiated here
            return reference.slopes(self.weights, path, self.rule)
        out: Tensor = self.operators.ig_slope(path.z, path.base, None, name, self.rule.name, self.rule.steps)
        return out

    def _narrow(self, queries: _Queries, alpha: Tensor, position: Tensor, keys: slice) -> _Tiles:
        """Tiles ``(scope, [n, m])`` of the attention-level scopes, by quadratic forms."""
        weights, scopes = self.weights, self.scopes

        def gram(level: _Level) -> Tensor:
            features = self.x.new_empty(keys.stop - keys.start, weights.heads + 1, weights.width)
            wide = _features(self.values[keys], level.matrix, level.own[keys], features).double()
            return wide @ wide.mT  # in float64: in float32 a squared norm would lose half the digits

        def norms(gram: Tensor, scale: Tensor | None) -> Tensor:
            out: Tensor = self.operators.gram_norms(alpha, position, gram, scale)
            return out

        summed = "atb" if weights.norm_after_attn is None else "attn_res"
        if not scopes.isdisjoint(("attn_heads", "attn", summed, *queries.itself)):
            raw = gram(self.raw)
            of_heads = raw[:, :-1, :-1]
            head_norms = of_heads.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().to(alpha.dtype)  # [m, H]
            if "attn_heads" in scopes:
                yield "attn_heads", alpha * head_norms.T[:, None]
            if "attn" in scopes:
                yield "attn", norms(of_heads, None)
            if summed in scopes:
                yield summed, norms(raw, None)
        if weights.norm_after_attn is not None and "atb" in scopes:
            yield "atb", norms(gram(self.residual), queries.residual_scale)
        if weights.parallel and scopes & queries.itself.keys():
            # Other tokens reach the layer's output by attention alone.
            others = norms(raw, None)
            here = torch.arange(alpha.shape[-1], device=alpha.device) == position[:, None]
            for name, vectors in queries.itself.items():
                elsewhere = others if name == weights.scopes[-1] else torch.zeros_like(others)
                yield name, torch.where(here, vectors.norm(dim=-1)[:, None], elsewhere)
        if weights.norm_before_ff is not None and not weights.parallel and "atb_ln" in scopes:
            yield "atb_ln", norms(gram(self.ff_input), queries.ff_scale)

    def _wide(self, queries: _Queries, alpha: Tensor, position: Tensor, keys: slice) -> _Tiles:
        """Tiles ``(scope, [n, m])`` of all feed-forward scopes, by one pass."""
        weights, after = self.weights, self.weights.norm_after_ff
        values, residual, count = self.wide_values[keys], self.wide_residual, keys.stop - keys.start
        tail = (
            _features(values, residual.matrix, residual.own[keys], self.residual_features[:count]),
            queries.residual_scale,
            None if after is None else after.weight,
            queries.norm_scale,
            after is not None and after.kind == "layer",
        )
        if self.plan.method == "operator":
            own = torch.stack([self.wide_input.own[queries.rows] @ weight for weight in self.projections])
            out = self.operators.operator_norms(
                alpha, position, values, self.maps, own, queries.slope, self.down, *tail
            )
        else:
            # The first part of the buffer, so that a short last block is as contiguous as the others.
            shape = (len(self.features), count, *self.features.shape[2:])
            features = self.features.flatten()[: math.prod(shape)].view(shape)
            for matrix, weight, to in zip(self.maps, self.projections, features, strict=True):
                _features(values, matrix, self.wide_input.own[keys] @ weight, to)
            out = self.operators.ff_norms(alpha, position, features, queries.slope, self.down, self.down_scale, *tail)
        yield from zip(weights.wide_scopes, out, strict=True)


def _in_reach(alpha: Tensor, position: Tensor) -> bool:
    """Whether any pair of a block has weight: none does beyond the causal diagonal or outside a window."""
    return bool(((position >= 0) & (position < alpha.shape[-1])).any()) or bool(alpha.any())


def _features(values: Tensor, matrix: Tensor, own: Tensor, to: Tensor) -> Tensor:
    """What every head, and as one more head the residual, of a block of keys brings: ``to`` ``[m, H + 1, width]``.

    ``values`` ``[m, H, dh]``, ``matrix`` ``[H * dh, width]``, ``own`` ``[m, width]``.
    """
    for head, part in enumerate(matrix.unflatten(0, (values.shape[1], -1))):
        torch.mm(values[:, head], part, out=to[:, head])
    to[:, -1] = own
    return to
