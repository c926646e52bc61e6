"""When the Triton backend runs, and which of its kernels `torch.ops.ffattr` reaches on a GPU. Nothing runs on one."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from op_cases import arguments
from pretended import Triton

from ffattr import ops
from ffattr.errors import BackendUnavailable
from ffattr.ops import backends, torch_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Triton:
    return Triton(monkeypatch)


@pytest.mark.parametrize(
    ("given", "heads", "dtype", "reason"),
    [
        ({"installed": False}, 1, torch.float32, "triton is not installed: pip install triton$"),
        ({}, 129, torch.bfloat16, "up to 128 attention heads, the model has 129; use backend='torch'$"),
        (
            {"capability": (7, 5)},
            1,
            torch.bfloat16,
            "cuda:0 has compute capability 7.5, .* needs 8.0; use backend='tor",
        ),
        ({"capability": (8, 6)}, 1, FLOAT8, "capability 8.6, .*float8_e4m3fn needs 8.9; pass dtype=torch.bfloat16$"),
        ({"capability": (7, 5)}, 1, FLOAT8, "capability 7.5, .*float8_e4m3fn needs 8.9; use backend='torch'$"),
        (
            {"failure": "ff_norms is wrong"},
            1,
            torch.float32,
            "on cuda:0 failed: ff_norms is wrong; use backend='torch'$",
        ),
    ],
)
def test_why_triton_does_not_run(
    given: dict[str, Any], heads: int, dtype: torch.dtype, reason: str, triton: Triton
) -> None:
    assert backends.BACKENDS["triton"].why_not(CUDA, dtype, 128) is None
    for name, value in given.items():
        setattr(triton, name, value)
    with pytest.raises(BackendUnavailable, match=f"'triton' cannot run: triton: .*{reason}"):
        backends.select_backend("triton", CUDA, dtype, heads)


def test_a_triton_that_does_not_load(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffattr.ops.triton", None)
    with pytest.raises(BackendUnavailable, match=r"do not load under the triton installed \(.*ops.triton.*--upgrade"):
        backends.select_backend("triton", CUDA, torch.float32)
    assert backends.select_backend("auto", CUDA, torch.float32).name == "torch"


def test_the_interpreter_is_only_for_who_asks_for_it(triton: Triton, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        BackendUnavailable, match="run on CUDA devices, not on cpu; move the model or use backend='torch'"
    ):
        backends.select_backend("triton", CPU, torch.float32)
    triton.interpret()
    assert backends.select_backend("triton", CPU, torch.float16).name == "triton"
    with caplog.at_level(logging.DEBUG, "ffattr"):
        assert backends.select_backend("auto", CPU, torch.float16).name == "torch"
    assert "backend triton: Triton's interpreter is for trying kernels out" in caplog.text
    with pytest.raises(BackendUnavailable, match="not on meta"):
        backends.select_backend("triton", torch.device("meta"), torch.float32)


# ---- the operators on a GPU


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_cuda_tensors_go_to_triton_where_it_runs(operator: str, triton: Triton) -> None:
    call = backends._on_cuda(operator)
    given = arguments(operator, torch.float32, torch.float32)
    expected = getattr(torch_kernels, operator)(*given)
    assert torch.equal(call(*given), expected)  # on the CPU here, without an interpreter
    triton.interpret()
    assert call(*given) == tuple(given)
    double = arguments(operator, torch.float64, torch.float64)
    assert call(*double).dtype == torch.float64


REGISTERED = """
import sys
import torch
torch.version.cuda = {version}
import ffattr.ops.backends
has = torch._C._dispatch_has_kernel_for_dispatch_key
print([has(f"ffattr::{{name}}", "CUDA") for name in ffattr.ops.contract.OPERATORS], "triton" in sys.modules)
"""


@pytest.mark.parametrize("version", ["12.8", None])
def test_cuda_kernels_are_registered_without_importing_triton(version: str | None) -> None:
    code = REGISTERED.format(version=repr(version))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    there = version is not None and importlib.util.find_spec("triton") is not None
    assert found == f"{[there] * len(ops.OPERATORS)} False"
