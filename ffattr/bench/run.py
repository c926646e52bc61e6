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
from ..engine import run as engine
from ..engine.layer_maps import Layer
from ..engine.pack import OneSequence, Pack
from ..engine.plan import LayerPlan, LayerShape, plan_layer
from ..engine.run import Done
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
    shape = LayerShape.of(case.weights, len(queries), len(case.x), pairs, scopes=scopes)
    wide = not set(case.wide_scopes).isdisjoint(scopes)
    plan = plan_layer(0, shape, wide, chosen, method, wide_dtype or case.x.dtype, case.device, None)

    def run() -> dict[str, Tensor]:
        layer = Layer(case.weights, scopes, Rule(), "token", chosen, plan.dtype)
        found, _ = dense(layer, OneSequence(case.x, case.attention, queries), plan)
        return found

    return run, plan


def dense(layer: Layer, sequence: OneSequence, plan: LayerPlan) -> tuple[dict[str, Tensor], Done]:
    """The maps ``{scope: [..., N, C]}`` of one sequence at a layer, and what else the engine says."""
    found: dict[str, Tensor] = {}

    def emit(number: int, rows: Tensor, tiles: dict[str, Tensor]) -> None:
        for name, tile in tiles.items():
            if name not in found:
                found[name] = tile.new_zeros(*tile.shape[:-2], len(sequence.rows), tile.shape[-1])
            found[name][..., rows, :] = tile

    done = engine.run(layer, Pack((sequence,)), plan, emit)
    return found, done


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
    for name, stream in reference.decompose(case.weights, case.x, case.attention, rows, Rule()):
        if name in scopes:
            found[name] = stream.vectors.norm(dim=-1)
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
