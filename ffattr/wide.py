"""The d-wide work for every pair: operands in the dtype of the plan, and the operators' calls.

Of a mixture of experts, the tokens that go to the same experts share a dense block: those experts side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .dtypes import operand_dtype, quantised
from .layer import LayerWeights
from .plan import LayerPlan
from .sources import Source, features

__all__ = ["Tiles", "Wide"]


class Wide:
    """The feed-forward block and what is after it, as the operators want them, for the keys of every source."""

    def __init__(self, weights: LayerWeights, sources: Sequence[Source], backend: Backend, plan: LayerPlan) -> None:
        self.weights, self.plan, self.operators = weights, plan, backend.operators
        self.dtype = operand_dtype(plan.dtype)
        self.keys = [_Keys(source, plan, self.dtype) for source in sources]
        if not weights.mixture:
            self.load([weights])

    def load(self, blocks: Sequence[LayerWeights]) -> None:
        """Take the feed-forward block of a dense layer, or those of several experts as one."""
        norm = self.weights.norm_of_ff
        projections = zip(*(block.projections for block in blocks), strict=True)
        self.projections = [torch.cat([part.weight for part in parts], 1).to(self.dtype) for parts in projections]
        down = torch.cat([block.down.weight for block in blocks])
        down = down if norm is None else norm.linear(down)
        self.down_scale: Tensor | None = None
        if self.plan.dtype == torch.float8_e4m3fn:
            self.down, self.down_scale = quantised(down.contiguous())
        else:
            self.down = down.to(self.dtype).contiguous()
        for keys in self.keys:
            keys.load(self.projections, self.plan.method == "direct")

    def of_keys(self, source: int, keys: slice) -> Tiles:
        """What the keys ``keys`` of a source bring, until others are asked for."""
        of = self.keys[source]
        residual = of.residual_features[: keys.stop - keys.start]
        features(of.values[keys], of.residual.matrix, of.residual.own[keys], residual)
        mixed = of.mixed(keys, self.projections) if self.plan.method == "direct" else None
        return Tiles(self, of, keys, residual, mixed)


@dataclass(frozen=True)
class Tiles:
    """A block of ``m`` keys of a source, as operands."""

    wide: Wide
    of: _Keys
    keys: slice
    residual: Tensor
    mixed: Tensor | None

    def norms(
        self,
        alpha: Tensor,
        rows: Tensor,
        position: Tensor,
        slope: Tensor,
        residual_scale: Tensor | None,
        norm_scale: Tensor | None,
        neurons: slice = slice(None),
    ) -> Tensor:
        """All feed-forward scopes ``[W, n, m]`` of the queries ``rows`` ``[n]``, by ``neurons`` of the block alone.

        ``alpha`` ``[H, n, m]``, ``position`` ``[n]`` of the query among the keys, ``slope`` ``[S, n, F]`` with the
        scales of all norms before the block, in the dtype of the wide operands.
        """
        wide, of = self.wide, self.of
        after = wide.weights.norm_after_ff
        tail = (
            self.residual,
            residual_scale,
            None if after is None else after.weight,
            norm_scale,
            after is not None and after.kind == "layer",
        )
        slope, down = slope[..., neurons].contiguous(), wide.down[neurons]
        if self.mixed is None:
            own = torch.stack([of.ff_input.own[rows] @ weight[:, neurons] for weight in wide.projections])
            maps = of.maps[..., neurons].contiguous()
            values = of.values[self.keys]
            out: Tensor = wide.operators.operator_norms(alpha, position, values, maps, own, slope, down, *tail)
        else:
            mixed = self.mixed[..., neurons].contiguous()
            out = wide.operators.ff_norms(alpha, position, mixed, slope, down, wide.down_scale, *tail)
        return out


class _Keys:
    """The tokens of one source as operands, and buffers of the longest block of them: fresh memory of this size for
    every block would cost as much as filling it."""

    def __init__(self, source: Source, plan: LayerPlan, dtype: torch.dtype) -> None:
        self.values = source.values.to(dtype)
        self.residual, self.ff_input = source.residual.to(dtype), source.ff_input.to(dtype)
        self.shape = (min(plan.blocks.wide_keys, source.tokens), source.values.shape[1] + 1)
        self.residual_features = self.values.new_empty(*self.shape, source.residual.matrix.shape[1])
        self.buffer: Tensor | None = None

    def load(self, projections: Sequence[Tensor], direct: bool) -> None:
        # From head values to pre-activations, [S, H * dh, F].
        self.maps = torch.stack([self.ff_input.matrix @ weight for weight in projections])
        shape = (len(projections), *self.shape, projections[0].shape[1])
        if direct and (self.buffer is None or self.buffer.shape != shape):
            self.buffer = self.values.new_empty(shape)

    def mixed(self, keys: slice, projections: Sequence[Tensor]) -> Tensor:
        """The keys' share of all pre-activations, ``[S, m, H + 1, F]``."""
        assert self.buffer is not None
        # The first part of the buffer, so that a short last block is as contiguous as the others.
        shape = (len(self.buffer), keys.stop - keys.start, *self.buffer.shape[2:])
        mixed = self.buffer.flatten()[: math.prod(shape)].view(shape)
        for matrix, weight, to in zip(self.maps, projections, mixed, strict=True):
            features(self.values[keys], matrix, self.ff_input.own[keys] @ weight, to)
        return mixed
