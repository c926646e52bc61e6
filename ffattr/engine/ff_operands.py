"""The feed-forward block and what is after it, as the operators want them: what all packs of a layer share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
from .planning.rotation import choose_vectors, rotate_down

__all__ = ["FFOperands", "NormTarget"]


@dataclass(frozen=True)
class NormTarget:
    """One call of an operator, for the maps of ``scopes``, of which the first is number ``first`` of those that it
    returns.

    ``linear`` ``[d, w]``: norms are those of what the vectors become by it (None: of the vectors themselves). The norm
    after the block is then part of it, but for the norm's scale. ``down`` ``[F, w]``: what the down matrix becomes,
    where it is zero right of its diagonal (None: to be made).
    """

    scopes: tuple[Scope, ...]
    first: int
    linear: Tensor | None = None
    down: Tensor | None = None

    def is_same(self, other: NormTarget) -> bool:
        """Tells whether both are the same scopes by the same matrices."""
        return self.scopes == other.scopes and self.linear is other.linear and self.down is other.down

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
        # From head values to the block.
        self.matrices = [self._cast_matrix(path.ff_input.name, path.ff_input.matrix) for path in self.paths]
        self.targets: tuple[NormTarget, ...] = (NormTarget(weights.pairwise_scopes, 0),)
        self._maps: list[Tensor] = []
        self._scratch: dict[str, Tensor] = {}
        self._rotated: dict[tuple[Scope, ...], NormTarget] = {}
        self._prepared: tuple[list[tuple[Tensor, Tensor | None]], list[list[Tensor]]] | None = None
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
        self._set_targets(targets)

    def rotate(self, scopes: Collection[Scope]) -> None:
        """Sets that norms of ``scopes`` are computed with the width rotated, if all of them can be
        (`ffattr.engine.planning.rotation`)."""
        together = choose_vectors(self.weights, {scope.seen_from("own") for scope in scopes})
        if not together:
            self.set_projections({}, scopes)
            return

        def make() -> list[Tensor]:
            norm, plain = self.weights.norm_after_ff, self._down
            if norm is None or together[-1].point != "ff_res_ln":
                return list(rotate_down(plain))
            turn, down = rotate_down(norm.linear(plain))
            return [self._with_norm(together[-1], turn), down]

        if together not in self._rotated:
            linear, down = self.recall(f"rotated {together[-1].point}", make)
            first = min(self.weights.pairwise_scopes.index(together[0]), 1)
            self._rotated[together] = NormTarget(together, first, linear, down)
        self._set_targets([self._rotated[together]])

    def _set_targets(self, targets: Sequence[NormTarget]) -> None:
        if not all(map(NormTarget.is_same, targets, self.targets)) or len(targets) != len(self.targets):
            self.targets, self._prepared = tuple(targets), None

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
        whole = [concatenate([part.weight for part in parts], 1) for parts in projections]
        self.projections = [self._cast_matrix(f"projection {place}", weight) for place, weight in enumerate(whole)]
        norm, down = self.weights.norm_of_ff, concatenate([branch.down.weight for branch in branches])
        self._down = down if norm is None else norm.linear(down)
        self._maps, self._prepared = [], None

    @property
    def down(self) -> list[tuple[Tensor, Tensor | None]]:
        """The down matrix as every target has it, and in float8 its scale."""
        return self._prepare()[0]

    @property
    def residual(self) -> list[list[Tensor]]:
        """The matrices of the residual by each source, as every target has them."""
        return self._prepare()[1]

    def _prepare(self) -> tuple[list[tuple[Tensor, Tensor | None]], list[list[Tensor]]]:
        """What depends on the targets, made when it is asked for first."""
        if self._prepared is None:
            residual = [[self._make_residual(path, target) for target in self.targets] for path in self.paths]
            self._prepared = [self._make_down(target) for target in self.targets], residual
        return self._prepared

    def _make_residual(self, path: AttentionPath, target: NormTarget) -> Tensor:
        if target.linear is None:
            return self._cast_matrix(path.residual.name, path.residual.matrix)
        return target.project(path.residual.matrix, self.dtype)

    def _cast_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """A matrix of the weights alone, known by ``name``, in the dtype of the operands."""
        if matrix.dtype == self.dtype:
            return matrix
        return self.recall(f"{name} {self.dtype}", lambda: [matrix.to(self.dtype)])[0]

    def _make_down(self, target: NormTarget) -> tuple[Tensor, Tensor | None]:
        if target.down is None and target.linear is None and self.asked != torch.float8_e4m3fn:
            return self.recall(f"down {self.asked}", lambda: [self._down.to(self.asked).contiguous()])[0], None
        down = target.project(self._down, self._down.dtype) if target.down is None else target.down
        if self.asked == torch.float8_e4m3fn:
            return quantised(down.contiguous())
        return down.to(self.asked).contiguous(), None

    def _with_norm(self, scope: Scope, projection: Tensor) -> Tensor:
        """``projection`` ``[d, w]`` after what is linear of the norm after the block, if that is before ``scope``."""
        norm = self.weights.norm_after_ff
        if norm is None or scope.point != "ff_res_ln":
            return projection
        identity = torch.eye(len(projection), dtype=projection.dtype, device=projection.device)
        return norm.linear(identity) @ projection
