"""The comparison that ``ffattr bench`` prints: the time and error of each backend on one case, or why it has none.

Nothing is timed whose maps were not compared with the float64 definition first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import OutOfMemory
from ..ops import backends
from .cases import Case
from .run import prepare_run
from .timing import time_median
from .truth import TOLERANCE, Truth, WrongResult

__all__ = ["Row", "compare_backends"]


@dataclass(frozen=True)
class Row:
    """A backend's median ``seconds`` for all feed-forward scopes and its error, or in ``reason`` why there are none."""

    backend: str
    method: str = ""
    seconds: float | None = None
    error: float | None = None
    reason: str = ""


def compare_backends(case: Case, wide_dtype: torch.dtype, backend: str, rounds: int) -> Iterator[Row]:
    """Yields a row for each backend, or for the one asked for (``"auto"``: all). Raises `BackendUnavailable` for it."""
    heads = case.weights.heads
    if backend != "auto":
        backends.select_backend(backend, case.device, wide_dtype, heads)
    truth = Truth.from_case(case, case.wide_scopes)
    for name in backends.BACKENDS if backend == "auto" else (backend,):
        reason = backends.BACKENDS[name].why_not(case.device, wide_dtype, heads)
        if reason is None and backend == "auto" and backends.BACKENDS[name].is_emulated(case.device):
            reason = f"{name} kernels without a GPU show no speed: they run only where backend {name!r} is asked for"
        if reason is not None:
            yield Row(name, reason=reason)
            continue
        try:
            run, plan = prepare_run(case, name, "auto", case.wide_scopes, None, wide_dtype)
            error = truth.verify_maps(name, run(), TOLERANCE[wide_dtype])
            yield Row(name, plan.method, time_median(run, case.device, rounds, limit=10.0), error)
        except (WrongResult, OutOfMemory) as failure:
            yield Row(name, reason=str(failure))
