"""The feed-forward block and what is after it, as the operators want them: what all packs of a layer share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition.layer import Branch, LayerWeights
from ..decomposition.precision import operand_dtype, quantised
from ..decomposition.scopes import Scope
from ..ops.backends import Backend
from ..ops.reduction import Reduction
from .key_tokens import AttentionPath, Recall, make_anew
from .pack import concatenate

__all__ = ["FFOperands", "NormTarget"]


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
        reduction: Reduction = "l2",
    ) -> None:
        self.weights, self.paths, self.backend, self.reduction = weights, tuple(paths), backend, reduction
        self.recall = make_anew if weights.mixture else recall  # the operands of a mixture are those of some experts
        self.asked, self.dtype = dtype, operand_dtype(dtype, backend.rounded)
        self.matrices = [path.ff_input.matrix.to(self.dtype) for path in self.paths]  # from head values to the block
        self.targets: tuple[NormTarget, ...] = (NormTarget(weights.pairwise_scopes, 0),)
        self._maps: list[Tensor] = []
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

    @property
    def maps(self) -> list[Tensor]:
        """The maps from head values of each source to pre-activations, ``[S, H * dh, F]``, made when a method asks."""
        if not self._maps:
            self._maps = self.recall(f"maps {self.dtype}", self._make_maps)
        return self._maps

    def _make_maps(self) -> list[Tensor]:
        maps = []
        for matrix in self.matrices:
            maps.append(matrix.new_empty(len(self.projections), len(matrix), self.projections[0].shape[1]))
            for weight, to in zip(self.projections, maps[-1], strict=True):
                torch.mm(matrix, weight, out=to)
        return maps

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
        self._maps = []
        self._prepare_down()

    def _prepare_down(self) -> None:
        """The down matrix and that of the residual by each source, as every target has them."""
        self.down: list[tuple[Tensor, Tensor | None]] = []
        for target in self.targets:
            if self.asked == torch.float8_e4m3fn:
                self.down.append(quantised(target.project(self._down, self._down.dtype).contiguous()))
            elif target.linear is None:
                (down,) = self.recall(f"down {self.asked}", lambda: [self._down.to(self.asked).contiguous()])
                self.down.append((down, None))
            else:
                self.down.append((target.project(self._down, self.asked).contiguous(), None))
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
