"""The check that stands between a GPU nobody has tried and a wrong map; here in Triton's interpreter, in small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

selfcheck = pytest.importorskip("ffattr.triton_ops.selfcheck")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layers = (selfcheck._Layer(6, 3, 40, 24, 1, True), selfcheck._Layer(5, 2, 24, 40, 2, False))
    monkeypatch.setattr(selfcheck, "_LAYERS", layers)
    selfcheck._failure.cache_clear()
    yield
    selfcheck._failure.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    assert selfcheck.failure(DEVICE, dtype) is None


@pytest.mark.parametrize("operator", ["gram_norms", "ig_slope", "ff_norms", "operator_norms"])
def test_a_wrong_kernel_is_named(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(selfcheck, operator)

    def wrong(*arguments: Any) -> Tensor:
        out: Tensor = right(*arguments)
        out.flatten()[-1] = 1e3
        return out

    monkeypatch.setattr(selfcheck, operator, wrong)
    assert f"{operator} is off by" in selfcheck.failure(DEVICE, torch.float32)


def test_nan_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "ff_norms", lambda alpha, *_: alpha.new_full((3, *alpha.shape[1:]), torch.nan))
    assert "ff_norms is off by nan" in selfcheck.failure(DEVICE, torch.float32)


def test_a_compiler_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise RuntimeError("out of resource\nshared memory")

    monkeypatch.setattr(selfcheck, "operator_norms", refused)
    assert selfcheck.failure(DEVICE, torch.bfloat16) == "RuntimeError: out of resource"


def test_memory_that_runs_out_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as context:
        context.setattr(selfcheck, "gram_norms", full)
        with pytest.raises(torch.OutOfMemoryError):
            selfcheck.failure(DEVICE, torch.float32)
    assert selfcheck.failure(DEVICE, torch.float32) is None
