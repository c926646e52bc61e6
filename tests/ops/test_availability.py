"""Why a backend cannot run: what was built, what is installed, what the device has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended import Cuda, Triton

from ffattr.ops import availability, torch_kernels
from ffattr.ops.backends import BACKENDS
from ffattr.ops.library import Binary

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
REASON = "no compiler was found"
FLOAT8 = torch.float8_e4m3fn


def test_has_cuda_kernels() -> None:
    library = torch.library.Library("ffattr_cuda", "IMPL")
    before = availability.has_cuda_kernels("cuda")
    try:
        if not before:
            library.impl("ff_norms", torch_kernels.ff_norms, "CUDA")
        assert availability.has_cuda_kernels("cuda")
    finally:
        library._destroy()
    assert availability.has_cuda_kernels("cuda") == before
    assert not availability.has_cuda_kernels("meta")


def test_every_backend_has_its_dtypes() -> None:
    assert availability.DTYPES.keys() == BACKENDS.keys()
    assert availability.name_dtypes(availability.DTYPES["cpu"]) == ["float32", "float64", "bfloat16"]
    assert all(torch.float32 in dtypes for dtypes in availability.DTYPES.values())


def test_the_first_reason_is_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a binary nothing else matters; on another device the dtype does not."""
    monkeypatch.setattr(availability, "binary", Binary(None, REASON))
    assert availability.check_cpu(GPU, FLOAT8, 1) == f"the C++ library is not there: {REASON}"
    monkeypatch.setattr(availability, "binary", Binary(object(), "built"))
    assert str(availability.check_cpu(GPU, FLOAT8, 1)).startswith("it runs on the CPU, the model is on cuda:0; ")
    assert str(availability.check_cpu(CPU, FLOAT8, 1)).endswith(
        "not torch.float8_e4m3fn; pass dtype=torch.float32 or use backend='triton'"
    )
    assert availability.check_cpu(CPU, torch.float64, 10_000) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "triton_runs", "cuda_runs"),
    [
        ((7, 5), torch.float32, False, False),
        ((8, 0), torch.bfloat16, True, True),
        ((8, 0), FLOAT8, False, False),
        ((8, 9), FLOAT8, True, False),
        ((9, 0), FLOAT8, True, True),
        ((10, 0), FLOAT8, True, False),
    ],
)
def test_what_a_gpu_can_do(
    capability: tuple[int, int],
    dtype: torch.dtype,
    triton_runs: bool,
    cuda_runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float8 is one instruction of one generation in CUDA, and any later one's in Triton."""
    triton, cuda = Triton(monkeypatch), Cuda(monkeypatch)
    triton.capability = cuda.capability = capability
    assert (availability.check_triton(GPU, dtype, 12) is None) == triton_runs
    assert (availability.check_cuda(GPU, dtype, 12) is None) == cuda_runs


def test_the_interpreter_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = Triton(monkeypatch)
    assert "run on CUDA devices, not on cpu" in str(availability.check_triton(CPU, torch.float32, 1))
    triton.interpret()
    assert availability.check_triton(CPU, torch.float32, 1) is None
    assert "up to 128 attention heads, the model has 129" in str(availability.check_triton(CPU, torch.float32, 129))


def test_bfloat16_on_a_processor_takes_something_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(unit: str) -> str | None:
        text = f"instruction set: avx2\nbfloat16 by: {unit}\n"
        library: Any = SimpleNamespace(ffattr_build_info=text.encode)
        monkeypatch.setattr(availability, "binary", Binary(library, "built"))
        return availability.check_cpu(torch.device("cpu"), torch.bfloat16, 12)

    assert pretend("a matrix unit") is None
    reason = pretend("")
    assert reason is not None
    assert "instruction set avx2" in reason
    assert "pass dtype=torch.float32 or use backend='torch'" in reason


def test_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"float32 by": "three bfloat16 products", "bfloat16 by": "a matrix unit"}
    library: Any = SimpleNamespace(ffattr_build_info=lambda: "\n".join(map(": ".join, info.items())).encode())
    monkeypatch.setattr(availability, "binary", Binary(library, "built"))
    assert availability.describe_product("cpu", torch.float32) == "three bfloat16 products"
    assert availability.describe_product("cpu", torch.bfloat16) == "a matrix unit"
    assert availability.describe_product("cpu", torch.float64) == ""
    assert availability.describe_product("torch", torch.float32) == ""
    info["float32 by"] = "float32"
    assert availability.describe_product("cpu", torch.float32) == ""
