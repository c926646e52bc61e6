"""The maps of a case as the engine computes them by a backend, and the arguments of its first feed-forward operator."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..decomposition import reference
from ..decomposition.reference import Rule
from ..decomposition.scopes import Scope
from ..engine.key_tokens import Make
from ..engine.layer_maps import LayerTask
from ..engine.pack import OneSequence, Pack
from ..engine.planning.choose import plan_layer
from ..engine.planning.costs import LayerShape
from ..engine.planning.plan import EngineOptions, LayerPlan
from ..engine.run import LayerResult, run_layer
from ..ops import backends, torch_kernels
from ..ops.backends import Backend
from ..ops.contract import Operators
from ..ops.reduction import Reduction
from .cases import Case

__all__ = ["Run", "compute_maps", "materialise_maps", "prepare_run", "record_operands", "run_dense"]


Run = Callable[[], dict[str, Tensor]]


def prepare_run(
    case: Case,
    backend: str | Backend,
    method: str,
    scopes: Collection[str],
    rows: Tensor | None = None,
    wide_dtype: torch.dtype | None = None,
    reduction: Reduction = "l2",
    rotate: bool = False,
) -> tuple[Run, LayerPlan]:
    """Returns what computes the maps as `ffattr.attribute` does, one layer and sequence, and the plan it follows.

    ``rows`` ``[N]``: query tokens, None for all; ``wide_dtype``: of the wide products, None for that of ``case``;
    ``reduction``: what vectors become; ``rotate``: whether the width may be rotated where that pays. Matrices that
    depend on the weights alone are kept from one run to the next, as `ffattr.attribute` keeps them with a model.
    """
    chosen = backends.BACKENDS[backend] if isinstance(backend, str) else backend
    queries = torch.arange(len(case.x), device=case.device) if rows is None else rows.to(case.device)
    pairs = case.attention.pairs(queries)
    picked = case.weights.pick_scopes(scopes)
    shape = LayerShape.from_weights(
        *(case.weights, len(queries), len(case.x), pairs),
        scopes=picked,
        reduction=reduction,
        rounded=chosen.rounded,
    )
    shape = replace(shape, rotatable=shape.rotatable and rotate)
    ff_scopes = len({*picked} & {*case.weights.pairwise_scopes})
    options = EngineOptions(chosen, method, wide_dtype or case.x.dtype, case.device)
    plan = plan_layer(0, shape, ff_scopes, options)
    kept: dict[str, list[Tensor]] = {}

    def recall(name: str, make: Make) -> list[Tensor]:
        if name not in kept:
            kept[name] = make()
        return kept[name]

    def compute_once() -> dict[str, Tensor]:
        task = LayerTask(case.weights, picked, Rule(), "token", chosen, plan.dtype, recall, reduction)
        found, _ = run_dense(task, OneSequence(case.x, case.attention, queries), plan)
        return found

    return compute_once, plan


def run_dense(task: LayerTask, sequence: OneSequence, plan: LayerPlan) -> tuple[dict[str, Tensor], LayerResult]:
    """Returns the maps ``{scope: [..., N, C]}`` of one sequence at a layer, and what else the engine says."""
    found: dict[str, Tensor] = {}

    def take_rows(number: int, queries: Tensor, tiles: dict[Scope, Tensor]) -> None:
        for scope, tile in tiles.items():
            name = str(scope)
            if len(queries) == len(sequence.query_tokens):
                found[name] = tile
                continue
            if name not in found:
                found[name] = tile.new_zeros(*tile.shape[:-2], len(sequence.query_tokens), tile.shape[-1])
            found[name][..., queries, :] = tile

    return found, run_layer(task, Pack((sequence,)), plan, take_rows)


def compute_maps(
    case: Case,
    backend: str | Backend,
    method: str,
    scopes: Collection[str],
    rows: Tensor | None = None,
    wide_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Returns maps ``{scope: [N, T]}``; the arguments are those of `prepare_run`."""
    run, _ = prepare_run(case, backend, method, scopes, rows, wide_dtype)
    return run()


def materialise_maps(case: Case, scopes: Collection[str]) -> dict[str, Tensor]:
    """Does what every earlier tool does: all vectors of all pairs in memory, then their norms ``{scope: [T, T]}``."""
    rows = torch.arange(len(case.x), device=case.device)
    found: dict[str, Tensor] = {}
    for scope, stream in reference.decompose(case.weights, case.x, case.attention, rows, Rule()):
        if str(scope) in scopes:
            found[str(scope)] = stream.vectors.norm(dim=-1)
        if len(found) == len(scopes):
            break
    return found


class _Reached(Exception):
    """No error: it carries out what was looked for."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class _Recorder:
    """Operators that stop a layer at its first wide one."""

    ig_slope = staticmethod(torch_kernels.ig_slope)

    def ff_norms(self, *arguments: Any) -> Tensor:
        raise _Reached(*arguments)

    operator_norms = ff_norms


def record_operands(case: Case, method: str, wide_dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of the layer's first call of ``ff_norms`` (method "direct") or ``operator_norms``, without those
    that have defaults: the last four."""
    recording = replace(backends.BACKENDS["torch"], load=lambda: cast(Operators, _Recorder()))
    try:
        compute_maps(case, recording, method, case.wide_scopes, None, wide_dtype)
    except _Reached as reached:
        return reached.arguments[:-4]
    raise AssertionError("a layer without a wide operator")
