"""What every benchmark shares: a random layer of a known shape, its maps by any backend, and how to time them honestly.

Nothing is timed that was not compared with the float64 definition first. Speeds are given as shares of what this
machine's own matrix product reaches, counting ``2 T^2 F d`` operations for a layer of ``T`` tokens (half of them for a
causal one) and nothing else: what any exact method that goes pair by pair has to multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..decomposition import reference
from ..decomposition.reference import Rule
from ..decomposition.scopes import Scope
from ..engine.layer_maps import LayerTask
from ..engine.pack import OneSequence, Pack
from ..engine.plan import EngineOptions, LayerPlan, LayerShape, plan_layer
from ..engine.run import LayerResult, run_layer
from ..ops import backends, torch_kernels
from ..ops.backends import Backend
from .cases import Case

__all__ = ["Run", "dense", "maps", "materialise", "operands", "prepared"]


Run = Callable[[], dict[str, Tensor]]


def prepared(
    case: Case,
    backend: str | Backend,
    method: str,
    scopes: Collection[str],
    rows: Tensor | None = None,
    wide_dtype: torch.dtype | None = None,
) -> tuple[Run, LayerPlan]:
    """What computes the maps as `ffattr.attribute` does, one layer and sequence, and the plan it follows.

    ``rows`` ``[N]``: query tokens, None for all; ``wide_dtype``: of the wide products, None for that of ``case``.
    """
    chosen = backends.BACKENDS[backend] if isinstance(backend, str) else backend
    queries = torch.arange(len(case.x), device=case.device) if rows is None else rows.to(case.device)
    pairs = case.attention.pairs(queries)
    picked = case.weights.pick_scopes(scopes)
    shape = LayerShape.from_weights(case.weights, len(queries), len(case.x), pairs, scopes=picked)
    ff_scopes = len({*picked} & {*case.weights.pairwise_scopes})
    options = EngineOptions(chosen, method, wide_dtype or case.x.dtype, case.device)
    plan = plan_layer(0, shape, ff_scopes, options)

    def run() -> dict[str, Tensor]:
        task = LayerTask(case.weights, picked, Rule(), "token", chosen, plan.dtype)
        found, _ = dense(task, OneSequence(case.x, case.attention, queries), plan)
        return found

    return run, plan


def dense(task: LayerTask, sequence: OneSequence, plan: LayerPlan) -> tuple[dict[str, Tensor], LayerResult]:
    """The maps ``{scope: [..., N, C]}`` of one sequence at a layer, and what else the engine says."""
    found: dict[str, Tensor] = {}

    def take(number: int, queries: Tensor, tiles: dict[Scope, Tensor]) -> None:
        for scope, tile in tiles.items():
            name = str(scope)
            if name not in found:
                found[name] = tile.new_zeros(*tile.shape[:-2], len(sequence.query_tokens), tile.shape[-1])
            found[name][..., queries, :] = tile

    return found, run_layer(task, Pack((sequence,)), plan, take)


def maps(
    case: Case,
    backend: str | Backend,
    method: str,
    scopes: Collection[str],
    rows: Tensor | None = None,
    wide_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """``{scope: [N, T]}``, see `prepared`."""
    run, _ = prepared(case, backend, method, scopes, rows, wide_dtype)
    return run()


def materialise(case: Case, scopes: Collection[str]) -> dict[str, Tensor]:
    """What every earlier tool does: all vectors of all pairs in memory, then their norms."""
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


def operands(case: Case, method: str, wide_dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of the layer's first call of ``ff_norms`` (method "direct") or ``operator_norms``, of which
    ``sequences``, the last, is left out."""
    recording = replace(backends.BACKENDS["torch"], load=_Recorder)
    try:
        maps(case, recording, method, case.wide_scopes, None, wide_dtype)
    except _Reached as reached:
        return reached.arguments[:-1]
    raise AssertionError("a layer without a wide operator")
