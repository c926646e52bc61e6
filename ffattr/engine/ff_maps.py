"""Feed-forward maps, by work of the model's width for every pair: operands in the dtype of the plan, and the operators'
calls.

In a mixture of experts, the tokens that go to the same experts share a dense block: those experts side by side, beside
the branches that all tokens go through.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..decomposition.layer import LayerWeights
from ..decomposition.routing import Routing
from ..decomposition.scopes import Scope
from ..ops import torch_kernels
from ..ops.contract import MOST_HEADS, Epilogue
from ..ops.mixed_operator import mixed_operator_norms
from .ff_operands import FFOperands
from .key_blocks import KeyBlock, cut_keys
from .key_tokens import KeyTokens
from .pack import concatenate
from .planning.costs import Method
from .planning.plan import LayerPlan
from .query_pass import QueryPass

__all__ = ["FFMaps", "QueryOperands"]


@dataclass(frozen=True)
class QueryOperands:
    """What ``n`` queries bring: which of the pack's tokens they are, ``token_in_pack`` ``[n]``; ``slope`` ``[S, n, F]``
    with the scales of all norms before the block, in the dtype of the operands; the scales ``[n]`` of the residual and
    of the norm after the block; and what the vectors of each scope are compared with, ``totals`` ``[scopes, n, d]``."""

    token_in_pack: Tensor
    slope: Tensor
    residual_scale: Tensor | None
    norm_scale: Tensor | None
    totals: Tensor | None = None


class KeyOperands:
    """The tokens of one source of a pack, as operands."""

    def __init__(self, ff: FFOperands, number: int, source: KeyTokens) -> None:
        self.ff, self.number, self.source = ff, number, source
        self.values = source.values.to(ff.dtype)
        path, residual = source.path, source.residual_at(source.path.residual)
        rounded = residual.to(ff.dtype)
        self.ff_own = rounded if path.ff_input is path.residual else source.residual_at(path.ff_input).to(ff.dtype)
        self.residual = [
            rounded if target.linear is None else target.project(residual, ff.dtype) for target in ff.targets
        ]

    def of_block(self, block: KeyBlock, method: Method) -> KeyBlockOperands:
        """What a block of keys brings, until another is asked for."""
        ff, values, ff_own = self.ff, self.values[block.tokens], self.ff_own[block.tokens]
        count = len(values) * (values.shape[1] + 1)
        residual = [
            block.head_vectors(values, matrix, own[block.tokens], ff.scratch(f"residual {place}", count * own.shape[1]))
            for place, (matrix, own) in enumerate(zip(ff.residual[self.number], self.residual, strict=True))
        ]
        features: Tensor | None = None
        if method == "direct":
            streams, width = len(ff.projections), ff.projections[0].shape[1]
            room = ff.scratch("features", streams * count * width)[: streams * count * width].view(streams, -1)
            for matrix, weight, to in zip(ff.maps[self.number], ff.projections, room, strict=True):
                block.head_vectors(values, matrix, ff_own @ weight, to)
            features = room.view(streams, -1, len(block.alpha) + 1, width)
        elif method == "mixed":
            room = ff.scratch("features", count * ff_own.shape[1])
            features = block.head_vectors(values, ff.matrices[self.number], ff_own, room)
        return KeyBlockOperands(self, block, residual, features)


@dataclass(frozen=True)
class KeyBlockOperands:
    """A block of ``m`` keys of a source as operands: ``residual`` ``[m, G, w]`` of every target, and ``features``: the
    keys' share ``[S, m, G, F]`` of all pre-activations by the direct method, ``[m, G, d]`` of what the block reads by
    the mixed one, and None by the operator method."""

    keys: KeyOperands
    block: KeyBlock
    residual: list[Tensor]
    features: Tensor | None

    def compute_norms(self, queries: QueryOperands, neurons: slice = slice(None)) -> dict[Scope, Tensor]:
        """``[n, M]`` by feed-forward scope, of the queries of the block of keys; by ``neurons`` of the layer alone."""
        ff, norm = self.keys.ff, self.keys.ff.weights.norm_after_ff
        found: dict[Scope, Tensor] = {}
        slope = queries.slope[..., neurons].contiguous()
        for target, (down, down_scale), residual in zip(ff.targets, ff.down, self.residual, strict=True):
            exact = target.linear is None
            epilogue = Epilogue(
                residual,
                queries.residual_scale,
                gamma=norm.weight if exact and norm is not None else None,
                norm_scale=queries.norm_scale if exact else None,
                centre=exact and norm is not None and norm.kind == "layer",
                sequences=self.block.sequences,
                reduction=ff.reduction,
                totals=queries.totals,
                triangular=target.down is not None,
            )
            out = self._call_operator(queries.token_in_pack, slope, (down[neurons], down_scale), neurons, epilogue)
            for place, scope in enumerate(target.scopes, target.first):
                found[scope] = out[place]
                if not exact and norm is not None and scope.point == "ff_res_ln":
                    assert queries.norm_scale is not None
                    found[scope] = out[place] * queries.norm_scale[:, None]
        return found

    def _call_operator(
        self,
        token_in_pack: Tensor,
        slope: Tensor,
        down: tuple[Tensor, Tensor | None],
        neurons: slice,
        epilogue: Epilogue,
    ) -> Tensor:
        ff, block, keys = self.keys.ff, self.block, self.keys
        too_many = ff.backend.for_gpus and len(block.alpha) > MOST_HEADS  # of a large group
        operators = torch_kernels if too_many else ff.backend.require_operators()
        if self.features is not None and self.features.dim() == 4:
            features = self.features[..., neurons].contiguous()
            return operators.ff_norms(block.alpha, block.position, features, slope, down[0], down[1], *epilogue)
        if self.features is not None:
            projections = [weight[:, neurons] for weight in ff.projections]
            given = (block.alpha, block.position, self.features, projections, slope, down[0], epilogue)
            return mixed_operator_norms(operators, *given)
        if keys.source.path.reads_own_tokens:
            own = torch.stack([keys.ff_own[token_in_pack] @ weight[:, neurons] for weight in ff.projections])
        else:
            own = torch.zeros_like(slope)
        values, maps = keys.values[block.tokens], ff.maps[keys.number][..., neurons].contiguous()
        return operators.operator_norms(block.alpha, block.position, values, maps, own, slope, down[0], *epilogue)


class FFMaps:
    """The feed-forward maps of a pack, by one of the methods that share work between pairs."""

    def __init__(self, ff: FFOperands, sources: Sequence[KeyTokens], scopes: frozenset[Scope]) -> None:
        self.ff, self.weights, self.sources, self.scopes = ff, ff.weights, sources, scopes
        self.keys = [KeyOperands(ff, number, source) for number, source in enumerate(sources)]

    def fill(
        self, passed: QueryPass, routing: Routing | None, plan: LayerPlan, to: MutableMapping[Scope, Tensor]
    ) -> None:
        """Write the rows ``to[scope]`` ``[..., n, C]`` of a block of queries; those that go to the same experts are
        worked on together."""
        if routing is None:
            slopes = [slope.squeeze(2) for slope in passed.slopes]
            self._fill_alike(passed, torch.cat(slopes, -1) if len(slopes) > 1 else slopes[0], plan, to)
        else:
            for experts, tokens, slots in routing.by_set():
                self.ff.load_experts(experts)
                some = {scope: rows[..., tokens, :] for scope, rows in to.items()}
                self._fill_alike(passed.select(tokens), self._slope_of_set(passed, tokens, slots), plan, some, slots)
                for scope, rows in to.items():
                    rows[..., tokens, :] = some[scope]
        self.ff.free_scratch()

    def _slope_of_set(self, passed: QueryPass, tokens: Tensor, slots: Tensor) -> Tensor:
        """The slopes ``[S, n, F]`` of queries through all branches side by side, experts in the order of ``slots``."""
        parts = [
            (slope[:, tokens[:, None], slots] if branch.routed else slope[:, tokens]).flatten(2)
            for branch, slope in zip(self.weights.branches, passed.slopes, strict=True)
        ]
        return concatenate(parts, -1)

    def _fill_alike(
        self,
        passed: QueryPass,
        slope: Tensor,
        plan: LayerPlan,
        to: MutableMapping[Scope, Tensor],
        slots: Tensor | None = None,
    ) -> None:
        """Queries that share a feed-forward block; with ``slots`` ``[n, k]`` also the maps of its experts, each of
        which has its place among the experts of a token."""
        queries = passed.queries
        for number, source in enumerate(self.sources):
            name, ff_scale = source.path.source, passed.ff_scale[number]
            scaled = _multiply_rounded(slope, ff_scale, self.ff.dtype)
            scales = passed.residual_scale[number], passed.norm_scale
            operands = QueryOperands(queries.token_in_pack, scaled, *scales, _stack_totals(self.weights, passed))
            experts = to.get(self.weights.expert_scope.seen_from(name))
            for block in cut_keys(source, passed.alpha[number], queries, plan.blocks.ff_keys):
                keys = self.keys[number].of_block(block, plan.method)
                if not self.scopes.isdisjoint(scope.seen_from(name) for scope in self.weights.pairwise_scopes):
                    for scope, tile in keys.compute_norms(operands).items():
                        if scope.seen_from(name) in self.scopes:
                            block.place_tile(tile, to, scope.seen_from(name))
                if slots is not None and experts is not None:
                    sums = passed.totals.get(self.weights.expert_scope.seen_from(name))
                    self._fill_experts(keys, operands, sums, slots, experts)

    def _fill_experts(
        self, keys: KeyBlockOperands, operands: QueryOperands, sums: Tensor | None, slots: Tensor, to: Tensor
    ) -> None:
        """The maps ``to`` ``[k, n, C]`` of each expert of queries that go to the same ones, and behind them of each
        branch that all tokens go through; ``sums`` ``[k, n, d]``: what the vectors of each are compared with."""
        rows, first, place = torch.arange(len(slots), device=slots.device), 0, slots.shape[1]
        for branch in self.weights.branches:
            shared = () if branch.routed else (torch.full_like(rows, place),)
            place += len(shared)
            for slot in shared or slots.T:
                tile = to[slot, rows]
                neurons = slice(first, first + branch.width)
                if sums is not None and operands.totals is not None:
                    operands = replace(operands, totals=sums[slot, rows].expand_as(operands.totals))
                keys.block.put_tile(keys.compute_norms(operands, neurons)[self.weights.pairwise_scopes[0]], tile)
                to[slot, rows] = tile
                first += branch.width


def _multiply_rounded(slope: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``slope`` ``[S, n, F]``, times a number for each query, rounded once."""
    if scale is None:
        return slope.to(dtype)
    return torch.mul(slope, scale[:, None], out=torch.empty_like(slope, dtype=dtype))


def _stack_totals(weights: LayerWeights, passed: QueryPass) -> Tensor | None:
    """What the vectors of every feed-forward scope are compared with, ``[scopes, n, d]``."""
    if not passed.totals:
        return None
    return torch.stack([passed.totals[scope] for scope in weights.pairwise_scopes])
