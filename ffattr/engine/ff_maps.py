"""Feed-forward maps, by work of the model's width for every pair: operands in the dtype of the plan, and the operators'
calls.

In a mixture of experts, the tokens that go to the same experts share a dense block: those experts side by side, beside
the branches that all tokens go through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition.layer import Branch, LayerWeights
from ..decomposition.precision import operand_dtype, quantised
from ..decomposition.routing import Routing
from ..decomposition.scopes import Scope
from ..ops import torch_kernels
from ..ops.backends import Backend
from ..ops.contract import MOST_HEADS, Epilogue
from .key_blocks import KeyBlock, cut_keys
from .key_tokens import AttentionPath, KeyTokens
from .pack import QueryBlock, concatenate
from .plan import LayerPlan
from .query_pass import QueryPass
from .recall import Recall, make_anew

__all__ = ["FFMaps", "FFOperands", "QueryOperands"]


@dataclass(frozen=True)
class QueryOperands:
    """What ``n`` queries bring: which of the pack's tokens they are, ``token_in_pack`` ``[n]``; ``slope`` ``[S, n, F]``
    with the scales of all norms before the block, in the dtype of the operands; the scales ``[n]`` of the residual and
    of the norm after the block."""

    token_in_pack: Tensor
    slope: Tensor
    residual_scale: Tensor | None
    norm_scale: Tensor | None


@dataclass(frozen=True)
class NormTarget:
    """One call of an operator, for the maps of ``scopes``, of which the first is number ``first`` of those that it
    returns.

    ``linear`` ``[d, w]``: norms are those of what the vectors become by it (None: of the vectors themselves). The norm
    after the block is then part of it, but for the norm's scale.
    """

    scopes: tuple[Scope, ...]
    first: int
    linear: Tensor | None = None

    def project(self, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """``vectors`` ``[m, d]`` as their norms are to be taken."""
        return (vectors if self.linear is None else vectors @ self.linear.to(vectors)).to(dtype)


class FFOperands:
    """The feed-forward block and what is after it, as the operators want them: what all packs of a layer share."""

    def __init__(
        self,
        weights: LayerWeights,
        paths: Sequence[AttentionPath],
        backend: Backend,
        dtype: torch.dtype,
        recall: Recall = make_anew,
    ) -> None:
        self.weights, self.paths, self.backend = weights, tuple(paths), backend
        self.recall = make_anew if weights.mixture else recall  # the operands of a mixture are those of some experts
        self.asked, self.dtype = dtype, operand_dtype(dtype)
        self.targets: tuple[NormTarget, ...] = (NormTarget(weights.pairwise_scopes, 0),)
        self._scratch: dict[str, Tensor] = {}
        self._experts: tuple[int, ...] | None = None
        if not weights.mixture:
            self._load_branches(weights.branches)

    def set_projections(self, sketch: Mapping[Scope, Tensor], scopes: Iterable[Scope]) -> None:
        """Sets how norms of ``scopes`` are computed from now on: exactly, but for those in ``sketch``, whose vectors
        are multiplied by ``sketch[scope]`` ``[d, w]`` before."""
        known = self.weights.pairwise_scopes
        targets = [
            NormTarget((scope,), min(known.index(scope), 1), self._with_norm(scope, p)) for scope, p in sketch.items()
        ]
        if not sketch or not {scope.seen_from("own") for scope in scopes} & {*known} <= sketch.keys():
            targets.insert(0, NormTarget(known, 0))
        if len(targets) == len(self.targets) == 1 and targets[0].linear is self.targets[0].linear is None:
            return
        self.targets = tuple(targets)
        if self._experts is not None or not self.weights.mixture:
            self._prepare_down()

    def load_experts(self, experts: tuple[int, ...]) -> None:
        """Use these experts, and the branches that all tokens go through, as one dense block."""
        if self._experts != experts:
            dtype = self.weights.out.weight.dtype
            self._load_branches(
                [
                    part
                    for branch in self.weights.branches
                    for part in ([branch.expert(n, dtype) for n in experts] if branch.routed else [branch])
                ]
            )
            self._experts = experts

    def scratch(self, name: str, count: int) -> Tensor:
        """Memory for at least ``count`` numbers, the same each time: fresh memory for every block of keys would cost as
        much as filling it."""
        held = self._scratch.get(name)
        if held is None or len(held) < count:
            self._scratch.pop(name, None)
            held = self._scratch[name] = torch.empty(count, dtype=self.dtype, device=self.projections[0].device)
        return held

    def free_scratch(self) -> None:
        """Give scratch memory back until the next block of queries, whose own way through the layer needs room, too."""
        self._scratch.clear()

    def _load_branches(self, branches: Sequence[Branch]) -> None:
        projections = zip(*(branch.projections for branch in branches), strict=True)
        self.projections = [concatenate([part.weight for part in parts], 1).to(self.dtype) for parts in projections]
        norm, down = self.weights.norm_of_ff, concatenate([branch.down.weight for branch in branches])
        self._down = down if norm is None else norm.linear(down)
        self.maps = self.recall(f"maps {self.dtype}", self._make_maps)
        self._prepare_down()

    def _make_maps(self) -> list[Tensor]:
        """From head values to pre-activations, ``[S, H * dh, F]`` of each source."""
        maps = []
        for matrix in [path.ff_input.matrix.to(self.dtype) for path in self.paths]:
            maps.append(matrix.new_empty(len(self.projections), len(matrix), self.projections[0].shape[1]))
            for weight, to in zip(self.projections, maps[-1], strict=True):
                torch.mm(matrix, weight, out=to)
        return maps

    def _prepare_down(self) -> None:
        """The down matrix and that of the residual by each source, as every target has them."""
        self.down: list[tuple[Tensor, Tensor | None]] = []
        for target in self.targets:
            if self.asked == torch.float8_e4m3fn:
                self.down.append(quantised(target.project(self._down, self._down.dtype).contiguous()))
            elif target.linear is None:
                (down,) = self.recall(f"down {self.dtype}", lambda: [self._down.to(self.dtype).contiguous()])
                self.down.append((down, None))
            else:
                self.down.append((target.project(self._down, self.dtype).contiguous(), None))
        self.residual = [
            [target.project(path.residual.matrix, self.dtype) for target in self.targets] for path in self.paths
        ]

    def _with_norm(self, scope: Scope, projection: Tensor) -> Tensor:
        """``projection`` ``[d, w]`` after what is linear of the norm after the block, if that is before ``scope``."""
        norm = self.weights.norm_after_ff
        if norm is None or scope.point != "ff_res_ln":
            return projection
        identity = torch.eye(len(projection), dtype=projection.dtype, device=projection.device)
        return norm.linear(identity) @ projection


class KeyOperands:
    """The tokens of one source of a pack, as operands."""

    def __init__(self, ff: FFOperands, number: int, source: KeyTokens) -> None:
        self.ff, self.number, self.source = ff, number, source
        self.values = source.values.to(ff.dtype)
        path, residual = source.path, source.residual_at(source.path.residual)
        self.ff_own = (residual if path.ff_input is path.residual else source.residual_at(path.ff_input)).to(ff.dtype)
        self.residual = [target.project(residual, ff.dtype) for target in ff.targets]

    def of_block(self, block: KeyBlock, direct: bool) -> KeyBlockOperands:
        """What a block of keys brings, until another is asked for."""
        ff, values = self.ff, self.values[block.tokens]
        count = len(values) * (values.shape[1] + 1)
        residual = [
            block.head_vectors(values, matrix, own[block.tokens], ff.scratch(f"residual {place}", count * own.shape[1]))
            for place, (matrix, own) in enumerate(zip(ff.residual[self.number], self.residual, strict=True))
        ]
        mixed: Tensor | None = None
        if direct or block.size > 1:  # the operator method has one value for a key
            streams, width = len(ff.projections), ff.projections[0].shape[1]
            room = ff.scratch("mixed", streams * count * width)[: streams * count * width].view(streams, -1)
            for matrix, weight, to in zip(ff.maps[self.number], ff.projections, room, strict=True):
                block.head_vectors(values, matrix, self.ff_own[block.tokens] @ weight, to)
            mixed = room.view(streams, -1, len(block.alpha) + 1, width)
        return KeyBlockOperands(self, block, residual, mixed)


@dataclass(frozen=True)
class KeyBlockOperands:
    """A block of ``m`` keys of a source as operands: ``residual`` ``[m, G, w]`` of every target, and ``mixed``
    ``[S, m, G, F]``, the keys' share of all pre-activations (None: by the operator method)."""

    keys: KeyOperands
    block: KeyBlock
    residual: list[Tensor]
    mixed: Tensor | None

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
        if self.mixed is not None:
            mixed = self.mixed[..., neurons].contiguous()
            return operators.ff_norms(block.alpha, block.position, mixed, slope, down[0], down[1], *epilogue)
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
        queries, direct = passed.queries, plan.method == "direct"
        for number, source in enumerate(self.sources):
            name, ff_scale = source.path.source, passed.ff_scale[number]
            scaled = (slope if ff_scale is None else slope * ff_scale[:, None]).to(self.ff.dtype)
            operands = QueryOperands(queries.token_in_pack, scaled, passed.residual_scale[number], passed.norm_scale)
            experts = to.get(self.weights.expert_scope.seen_from(name))
            for block in cut_keys(source, passed.alpha[number], queries, plan.blocks.ff_keys):
                keys = self.keys[number].of_block(block, direct)
                if not self.scopes.isdisjoint(scope.seen_from(name) for scope in self.weights.pairwise_scopes):
                    for scope, tile in keys.compute_norms(operands).items():
                        if scope.seen_from(name) in self.scopes:
                            block.put_tile(tile, to[scope.seen_from(name)])
                if slots is not None and experts is not None:
                    self._fill_experts(keys, operands, queries, slots, experts)

    def _fill_experts(
        self, keys: KeyBlockOperands, operands: QueryOperands, queries: QueryBlock, slots: Tensor, to: Tensor
    ) -> None:
        """The maps ``to`` ``[k, n, C]`` of each expert of queries that go to the same ones."""
        rows, first = torch.arange(len(queries), device=slots.device), 0
        for branch in self.weights.branches:
            for slot in slots.T if branch.routed else ():
                tile = to[slot, rows]
                neurons = slice(first, first + branch.width)
                keys.block.put_tile(keys.compute_norms(operands, neurons)[self.weights.pairwise_scopes[0]], tile)
                to[slot, rows] = tile
                first += branch.width
            first += 0 if branch.routed else branch.width
