"""The comparison of backends on one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_cases import TINY, Off, pretend

from ffattr.bench import compare as comparing
from ffattr.bench.cases import Case
from ffattr.bench.compare import Row, compare_backends
from ffattr.errors import OutOfMemory
from ffattr.ops import backends


def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cpu", Off(1.01))
    monkeypatch.setattr(comparing, "time_median", lambda run, device, rounds, limit: run() and 0.5)
    case = Case.draw_random(TINY["bert-base"], 6)
    rows = {row.backend: row for row in compare_backends(case, torch.float32, "auto", 1)}
    assert list(rows) == list(backends.BACKENDS)
    assert "cpu is wrong by" in rows["cpu"].reason
    assert "triton" in rows["triton"].reason.lower()  # not there, or only as an interpreter
    assert (rows["torch"].seconds, rows["torch"].method, rows["reference"].method) == (0.5, "direct", "reference")
    assert 0 < (rows["torch"].error or 0) < 1e-5

    real = comparing.prepare_run

    def full(case: Case, backend: Any, *rest: Any) -> Any:
        if backend == "torch":
            raise OutOfMemory("too long")
        return real(case, backend, *rest)

    monkeypatch.setattr(comparing, "prepare_run", full)
    assert list(compare_backends(case, torch.float32, "torch", 1)) == [Row("torch", reason="too long")]
