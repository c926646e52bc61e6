"""The d-wide work for every pair: operands in the dtype of the plan, and the operators' calls.

Of a mixture of experts, the tokens that go to the same experts share a dense block: those experts side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decomposition.layer import LayerWeights
from ..decomposition.precision import operand_dtype, quantised
from ..decomposition.scopes import CROSS
from ..ops import torch_kernels
from ..ops.backends import Backend
from ..ops.contract import MOST_HEADS
from .key_blocks import KeyBlock
from .key_tokens import Route, Source
from .pack import concatenated

__all__ = ["Given", "Tiles", "Wide", "WideKeys"]


@dataclass(frozen=True)
class Given:
    """What ``n`` queries bring: ``rows`` ``[n]``, which of the pack's tokens they are; ``slope`` ``[S, n, F]`` with the
    scales of all norms before the block, in the dtype of the wide operands; the scales ``[n]`` of the residual and of
    the norm after the block."""

    rows: Tensor
    slope: Tensor
    residual_scale: Tensor | None
    norm_scale: Tensor | None


@dataclass(frozen=True)
class _Target:
    """One call of a wide operator, for the maps of ``scopes``, of which the first is number ``first`` of those that it
    returns.

    ``linear`` ``[d, w]``: norms are those of what the vectors become by it (None: of the vectors themselves). The norm
    after the block is then part of it, but for the norm's scale.
    """

    scopes: tuple[str, ...]
    first: int
    linear: Tensor | None = None

    def of(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """``vectors`` ``[m, d]`` as its norms are to be taken."""
        return (vectors if self.linear is None else vectors @ self.linear.to(vectors)).to(dtype)


class Wide:
    """The feed-forward block and what is after it, as the operators want them: what all packs of a layer share."""

    def __init__(self, weights: LayerWeights, routes: Sequence[Route], backend: Backend, dtype: torch.dtype) -> None:
        self.weights, self.routes, self.backend = weights, tuple(routes), backend
        self.asked, self.dtype = dtype, operand_dtype(dtype)
        self.targets: tuple[_Target, ...] = (_Target(weights.wide_scopes, 0),)
        self._scratch: dict[str, Tensor] = {}
        self._loaded: tuple[int, ...] | None = None
        if not weights.mixture:
            self._load([weights])

    def aim(self, sketch: Mapping[str, Tensor], scopes: Collection[str]) -> None:
        """From now on, of the wide ones among ``scopes``, the exact norms, but for those in ``sketch`` approximate
        ones: of the vectors times ``sketch[scope]`` ``[d, w]``."""
        known = self.weights.wide_scopes
        targets = [_Target((scope,), min(known.index(scope), 1), self._linear(scope, p)) for scope, p in sketch.items()]
        if not sketch or not {scope.removeprefix(CROSS) for scope in scopes} & {*known} <= sketch.keys():
            targets.insert(0, _Target(known, 0))
        if len(targets) == len(self.targets) == 1 and targets[0].linear is self.targets[0].linear is None:
            return
        self.targets = tuple(targets)
        if self._loaded is not None or not self.weights.mixture:
            self._lower()

    def take(self, experts: tuple[int, ...]) -> None:
        """Use the feed-forward blocks of several experts as one."""
        if self._loaded != experts:
            self._load([self.weights.expert(number) for number in experts])
            self._loaded = experts

    def scratch(self, name: str, count: int) -> Tensor:
        """Memory for at least ``count`` numbers, the same each time: fresh memory for every block of keys would cost as
        much as filling it."""
        held = self._scratch.get(name)
        if held is None or len(held) < count:
            self._scratch.pop(name, None)
            held = self._scratch[name] = torch.empty(count, dtype=self.dtype, device=self.projections[0].device)
        return held

    def rest(self) -> None:
        """Give scratch memory back until the next block of queries, whose own way through the layer needs room, too."""
        self._scratch.clear()

    def _load(self, blocks: Sequence[LayerWeights]) -> None:
        projections = zip(*(block.projections for block in blocks), strict=True)
        self.projections = [concatenated([part.weight for part in parts], 1).to(self.dtype) for parts in projections]
        norm, down = self.weights.norm_of_ff, concatenated([block.down.weight for block in blocks])
        self._down = down if norm is None else norm.linear(down)
        # From head values to pre-activations, [S, H * dh, F].
        matrices = [route.ff_input.matrix.to(self.dtype) for route in self.routes]
        self.maps = []
        for matrix in matrices:
            self.maps.append(matrix.new_empty(len(self.projections), len(matrix), self.projections[0].shape[1]))
            for weight, to in zip(self.projections, self.maps[-1], strict=True):
                torch.mm(matrix, weight, out=to)
        self._lower()

    def _lower(self) -> None:
        """The down matrix and that of the residual by each source, as every target has them."""
        self.down: list[tuple[Tensor, Tensor | None]] = []
        for target in self.targets:
            if self.asked == torch.float8_e4m3fn:
                self.down.append(quantised(target.of(self._down, self._down.dtype).contiguous()))
            else:
                self.down.append((target.of(self._down, self.dtype).contiguous(), None))
        self.residual = [
            [target.of(route.residual.matrix, self.dtype) for target in self.targets] for route in self.routes
        ]

    def _linear(self, scope: str, projection: Tensor) -> Tensor:
        """``projection`` ``[d, w]`` after what is linear of the norm after the block, if that is before ``scope``."""
        norm = self.weights.norm_after_ff
        if norm is None or scope != self.weights.wide_scopes[-1]:
            return projection
        identity = torch.eye(len(projection), dtype=projection.dtype, device=projection.device)
        return norm.linear(identity) @ projection


class WideKeys:
    """The tokens of one source of a pack, as operands."""

    def __init__(self, wide: Wide, number: int, source: Source) -> None:
        self.wide, self.number, self.source = wide, number, source
        self.values = source.values.to(wide.dtype)
        route, residual = source.route, source.own(source.route.residual)
        self.ff_own = (residual if route.ff_input is route.residual else source.own(route.ff_input)).to(wide.dtype)
        self.residual = [target.of(residual, wide.dtype) for target in wide.targets]

    def tiles(self, block: KeyBlock, direct: bool) -> Tiles:
        """What a block of keys brings, until another is asked for."""
        wide, values = self.wide, self.values[block.tokens]
        count = len(values) * (values.shape[1] + 1)
        residual = [
            block.features(values, matrix, own[block.tokens], wide.scratch(f"residual {place}", count * own.shape[1]))
            for place, (matrix, own) in enumerate(zip(wide.residual[self.number], self.residual, strict=True))
        ]
        mixed: Tensor | None = None
        if direct or block.size > 1:  # the operator method has one value for a key
            streams, width = len(wide.projections), wide.projections[0].shape[1]
            room = wide.scratch("mixed", streams * count * width)[: streams * count * width].view(streams, -1)
            for matrix, weight, to in zip(wide.maps[self.number], wide.projections, room, strict=True):
                block.features(values, matrix, self.ff_own[block.tokens] @ weight, to)
            mixed = room.view(streams, -1, len(block.alpha) + 1, width)
        return Tiles(self, block, residual, mixed)


@dataclass(frozen=True)
class Tiles:
    """A block of ``m`` keys of a source as operands: ``residual`` ``[m, G, w]`` of every target, and ``mixed``
    ``[S, m, G, F]``, the keys' share of all pre-activations (None: by the operator method)."""

    keys: WideKeys
    block: KeyBlock
    residual: list[Tensor]
    mixed: Tensor | None

    def norms(self, given: Given, neurons: slice = slice(None)) -> dict[str, Tensor]:
        """``[n, M]`` by feed-forward scope, of the queries of the block of keys; by ``neurons`` of the layer alone."""
        wide, norm = self.keys.wide, self.keys.wide.weights.norm_after_ff
        found: dict[str, Tensor] = {}
        slope = given.slope[..., neurons].contiguous()
        for target, (down, down_scale), residual in zip(wide.targets, wide.down, self.residual, strict=True):
            exact = target.linear is None
            tail: tuple[Any, ...] = (
                residual,
                given.residual_scale,
                norm.weight if exact and norm is not None else None,
                given.norm_scale if exact else None,
                exact and norm is not None and norm.kind == "layer",
                self.block.sequences,
            )
            out = self._run(given.rows, slope, down[neurons], down_scale, neurons, tail)
            for place, scope in enumerate(target.scopes, target.first):
                found[scope] = out[place]
                if not exact and norm is not None and scope == wide.weights.wide_scopes[-1]:
                    assert given.norm_scale is not None
                    found[scope] = out[place] * given.norm_scale[:, None]
        return found

    def _run(
        self,
        rows: Tensor,
        slope: Tensor,
        down: Tensor,
        down_scale: Tensor | None,
        neurons: slice,
        tail: tuple[Any, ...],
    ) -> Tensor:
        wide, block, keys = self.keys.wide, self.block, self.keys
        operators = wide.backend.operators
        if wide.backend.for_gpus and len(block.alpha) > MOST_HEADS:  # of a large group
            operators = torch_kernels
        if self.mixed is not None:
            mixed = self.mixed[..., neurons].contiguous()
            out: Tensor = operators.ff_norms(block.alpha, block.position, mixed, slope, down, down_scale, *tail)
            return out
        if keys.source.route.own:
            own = torch.stack([keys.ff_own[rows] @ weight[:, neurons] for weight in wide.projections])
        else:
            own = torch.zeros_like(slope)
        values, maps = keys.values[block.tokens], wide.maps[keys.number][..., neurons].contiguous()
        out = operators.operator_norms(block.alpha, block.position, values, maps, own, slope, down, *tail)
        return out
