"""The check that stands between a GPU nobody has tried and a wrong map; here on a CPU, in small."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ffattr import ops
from ffattr.ops import availability, out_of_memory, selfcheck, torch_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layers = (selfcheck._Layer(6, 3, 40, 24, 1, True), selfcheck._Layer(5, 2, 24, 40, 2, False))
    monkeypatch.setattr(selfcheck, "_LAYERS", layers)
    selfcheck._find_failure.cache_clear()
    yield
    selfcheck._find_failure.cache_clear()


class Operators:
    """Right ones, but for ``wrong``."""

    def __init__(self, **wrong: Callable[..., Tensor]) -> None:
        for name in ops.OPERATORS:
            setattr(self, name, wrong.get(name, getattr(torch_kernels, name)))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_kernels_pass(dtype: torch.dtype) -> None:
    assert selfcheck.find_failure(availability.triton_ops(), DEVICE, dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FLOAT8])
def test_cuda_kernels_pass(dtype: torch.dtype) -> None:
    """Where there are any: elsewhere PyTorch runs."""
    if (
        dtype == FLOAT8
        and availability.has_cuda_kernels(DEVICE.type)
        and availability.check_cuda(DEVICE, dtype, 1) is not None
    ):
        pytest.skip("this GPU has no float8 kernel")
    assert selfcheck.find_failure(torch.ops.ffattr_cuda, DEVICE, dtype) is None


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_a_wrong_kernel_is_named(operator: str) -> None:
    def wrong(*arguments: Any) -> Tensor:
        out: Tensor = getattr(torch_kernels, operator)(*arguments)
        out.flatten()[-1] = 1e3
        return out

    found = selfcheck.find_failure(Operators(**{operator: wrong}), DEVICE, torch.float32)
    assert found is not None
    assert f"{operator} is off by" in found


def test_nan_is_a_failure() -> None:
    found = selfcheck.find_failure(
        Operators(ff_norms=lambda alpha, *_: alpha.new_full((3, *alpha.shape[1:]), torch.nan)), DEVICE, torch.float32
    )
    assert found is not None
    assert "ff_norms is off by nan" in found


def test_a_compiler_that_fails_is_a_failure() -> None:
    def refused(*_: object) -> Tensor:
        raise RuntimeError("out of resource\nshared memory")

    found = selfcheck.find_failure(Operators(operator_norms=refused), DEVICE, torch.bfloat16)
    assert found == "RuntimeError: out of resource"


def test_operators_are_checked_once() -> None:
    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return torch_kernels.gram_norms(*arguments)

    operators = Operators(gram_norms=counted)
    for _ in range(2):
        assert selfcheck.find_failure(operators, DEVICE, torch.float32) is None
    assert len(calls) == len(selfcheck._LAYERS)
    assert selfcheck.find_failure(Operators(ff_norms=counted), DEVICE, torch.float32) is not None  # others are others


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("API call failed")])
def test_memory_that_runs_out_is_not_remembered(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = 0
    monkeypatch.setattr(out_of_memory.OutOfMemoryWatch, "_count_refusals", lambda self: refused)

    def full(alpha: Tensor, *others: Any) -> Tensor:
        nonlocal refused
        refused += 1
        if refused == 1:
            raise error
        return torch_kernels.gram_norms(alpha, *others)

    operators = Operators(gram_norms=full)
    with pytest.raises(torch.OutOfMemoryError, match=str(error)):
        selfcheck.find_failure(operators, DEVICE, torch.float32)
    assert selfcheck.find_failure(operators, DEVICE, torch.float32) is None
