"""What every benchmark shares: a random layer of a known shape, its maps by any backend, and how to time them honestly.

Nothing is timed that was not compared with the float64 definition first. Speeds are given as shares of what this
machine's own matrix product reaches, counting ``2 T^2 F d`` operations for a layer of ``T`` tokens (half of them for a
causal one) and nothing else: what any exact method that goes pair by pair has to multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import OutOfMemory
from ..ops import backends
from .cases import Case
from .run import prepared
from .timing import timed
from .truth import TOLERANCE, Truth, WrongResult

__all__ = ["Row", "compare"]


@dataclass(frozen=True)
class Row:
    """A backend's median ``seconds`` for all feed-forward scopes and its error, or in ``reason`` why there are none."""

    backend: str
    method: str = ""
    seconds: float | None = None
    error: float | None = None
    reason: str = ""


def compare(case: Case, wide_dtype: torch.dtype, backend: str, rounds: int) -> Iterator[Row]:
    """A row for each backend, or for the one asked for (``"auto"``: all). Raises `BackendUnavailable` for that one."""
    heads = case.weights.heads
    if backend != "auto":
        backends.select(backend, case.device, wide_dtype, heads)
    truth = Truth.of(case, case.wide_scopes)
    for name in backends.BACKENDS if backend == "auto" else (backend,):
        reason = backends.BACKENDS[name].why_not(case.device, wide_dtype, heads)
        if reason is None and backend == "auto" and backends.BACKENDS[name].emulated(case.device):
            reason = f"{name} kernels without a GPU show no speed: they run only where backend {name!r} is asked for"
        if reason is not None:
            yield Row(name, reason=reason)
            continue
        try:
            run, plan = prepared(case, name, "auto", case.wide_scopes, None, wide_dtype)
            error = truth.verify(name, run(), TOLERANCE[wide_dtype])
            yield Row(name, plan.method, timed(run, case.device, rounds, limit=10.0), error)
        except (WrongResult, OutOfMemory) as failure:
            yield Row(name, reason=str(failure))
