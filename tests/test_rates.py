"""Measured speeds of both methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ffattr import rates, torch_ops
from ffattr.backends import BACKENDS

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Operators:
        def __getattr__(self, name: str) -> Any:
            def call(alpha: torch.Tensor, *others: Any) -> Any:
                calls.append(name)
                assert alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert {x.dtype for x in others if isinstance(x, torch.Tensor)} == {torch.int64, dtype}
                return getattr(torch_ops, name)(alpha, *others)

            return call

    monkeypatch.setitem(BACKENDS, "counting", replace(BACKENDS["torch"], name="counting", load=Operators))
    first = rates.measured("counting", dtype, CPU, 1)
    assert min(first) > 1e6
    assert set(calls) == {"ff_norms", "operator_norms"}
    made = len(calls)
    assert rates.measured("counting", dtype, CPU, 1) == first
    assert len(calls) == made  # once for a machine
    rates.measured.cache_clear()
