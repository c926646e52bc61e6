"""Which backend runs, and what is said of the others."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended import Cuda, Triton

from ffattr import ops
from ffattr.errors import BackendUnavailable, FfattrError
from ffattr.ops import availability, backends, torch_kernels
from ffattr.ops.library import Binary

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
REASON = "no compiler was found"
HALF = (torch.bfloat16, torch.float16)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def without_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "binary", Binary(None, REASON))
    monkeypatch.setattr(availability, "has_cuda_kernels", lambda kind: False)


@pytest.fixture
def with_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = SimpleNamespace(ffattr_build_info=lambda: b"instruction set: avx2\n")
    monkeypatch.setattr(availability, "binary", Binary(library, "a compiler was found"))


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Triton:
    return Triton(monkeypatch)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


# ---- the choice


@pytest.mark.usefixtures("with_binary")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_prefers_the_compiled_kernels_on_the_cpu(dtype: torch.dtype, triton: Triton) -> None:
    assert backends.select_backend("auto", CPU, dtype).name == "cpu"


@pytest.mark.usefixtures("with_binary")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF, FLOAT8])
def test_auto_prefers_triton_on_a_gpu(dtype: torch.dtype, triton: Triton) -> None:
    chosen = backends.select_backend("auto", CUDA, dtype, 128)
    assert chosen.name == "triton"
    assert chosen.operators is triton.kernels


@pytest.mark.usefixtures("with_binary")
def test_auto_runs_on_a_gpu_without_triton(triton: Triton) -> None:
    assert backends.select_backend("auto", CUDA, torch.float64).name == "torch"
    assert backends.select_backend("auto", CUDA, torch.float32, 129).name == "torch"
    triton.installed = False
    for dtype in (torch.float32, *HALF):
        assert backends.select_backend("auto", CUDA, dtype).name == "torch"


@pytest.mark.usefixtures("without_binary")
def test_auto_runs_without_the_compiled_kernels() -> None:
    assert backends.select_backend("auto", CPU, torch.float32).name == "torch"


@pytest.mark.usefixtures("with_binary")
@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_a_backend_by_name(name: str) -> None:
    backend = backends.select_backend(name, CPU, torch.float64)
    assert backend.name == name
    assert backend.is_reference == (name == "reference") == (backend.operators is None)
    if name != "reference":
        assert all(callable(getattr(backend.operators, operator)) for operator in ops.OPERATORS)
    assert backends.BACKENDS["torch"].operators is torch_kernels


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None])
def test_an_unknown_backend_lists_the_known_ones(name: Any) -> None:
    known = "'cpu', 'triton', 'cuda', 'torch', 'reference'"
    with pytest.raises(ValueError, match=rf"unknown backend {name!r}, expected 'auto'.*{known}"):
        backends.select_backend(name, CPU, torch.float32)


# ---- reasons


@pytest.mark.usefixtures("without_binary")
def test_the_compiled_backend_without_a_binary_says_why() -> None:
    with pytest.raises(BackendUnavailable, match=rf"'cpu' cannot run: .*C\+\+ library is not there: {REASON}"):
        backends.select_backend("cpu", CPU, torch.float32)
    assert issubclass(BackendUnavailable, FfattrError)


@pytest.mark.usefixtures("with_binary")
def test_the_compiled_backend_on_another_device_says_what_to_do() -> None:
    with pytest.raises(BackendUnavailable, match=r"runs on the CPU, the model is on cuda:0; use backend='torch'"):
        backends.select_backend("cpu", CUDA, torch.float32)


OTHER = (torch.int64, torch.complex64, torch.float8_e5m2)
WRONG_DTYPES = [
    ("cpu", torch.float16, "float32, float64 or bfloat16", " or use backend='torch'"),
    *(("reference", dtype, "float32 or float64", " or use backend='torch'") for dtype in HALF),
    ("cpu", FLOAT8, "float32, float64 or bfloat16", " or use backend='triton'"),
    ("torch", FLOAT8, "float32, float64, bfloat16 or float16", " or use backend='triton'"),
    *(
        (name, torch.float64, "float32, bfloat16, float16 or float8_e4m3fn", " or use backend='torch'")
        for name in ("triton", "cuda")
    ),
    *((name, dtype, "", "") for name in backends.BACKENDS for dtype in OTHER),
]


@pytest.mark.usefixtures("triton", "cuda")
@pytest.mark.parametrize(("name", "dtype", "has", "remedy"), WRONG_DTYPES)
def test_other_dtypes_are_refused_by_name(name: str, dtype: torch.dtype, has: str, remedy: str) -> None:
    device = CUDA if backends.BACKENDS[name].for_gpus else CPU
    message = f"'{name}' cannot run: .*computes in {has}.*, not {dtype}; pass dtype=torch.float32{remedy}$"
    with pytest.raises(BackendUnavailable, match=message):
        backends.select_backend(name, device, dtype)


@pytest.mark.usefixtures("with_binary")
@pytest.mark.parametrize("dtype", HALF)
def test_half_products_on_the_cpu_are_plain_pytorch(dtype: torch.dtype) -> None:
    assert (
        backends.select_backend("auto", CPU, dtype).name == backends.select_backend("torch", CPU, dtype).name == "torch"
    )


@pytest.mark.usefixtures("with_binary")
def test_auto_gives_every_reason(triton: Triton, caplog: pytest.LogCaptureFixture) -> None:
    triton.capability = (8, 0)
    with (
        caplog.at_level(logging.DEBUG, "ffattr"),
        pytest.raises(BackendUnavailable, match=r"cpu: .*on cuda:0.*; triton: .* 8\.0.*; torch: .*not torch.float8"),
    ):
        backends.select_backend("auto", CUDA, FLOAT8)
    assert [message.split(":")[0] for message in caplog.messages] == ["backend cpu", "backend triton", "backend torch"]


@pytest.mark.usefixtures("with_binary", "triton")
def test_what_is_chosen_and_what_is_not_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "ffattr"):
        backends.select_backend("auto", CUDA, torch.bfloat16)
    assert caplog.messages == [
        "backend cpu: it runs on the CPU, the model is on cuda:0; use backend='torch' or move the model",
        "backend triton: chosen for torch.bfloat16 on cuda:0",
    ]
    assert {record.name for record in caplog.records} == {"ffattr"}


# ---- what `ffattr info` shows


@pytest.mark.usefixtures("without_binary", "triton")
def test_report() -> None:
    rows = {name: (runs, text) for name, runs, text in backends.report_backends(CPU)}
    assert list(rows) == list(backends.BACKENDS)
    assert rows["cpu"] == (False, f"the C++ library is not there: {REASON}")
    assert rows["triton"][0] is False
    assert rows["torch"] == (True, "chunked plain PyTorch; cpu: float32, float64, bfloat16, float16")


@pytest.mark.usefixtures("with_binary")
def test_report_with_a_gpu(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    triton.capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = {name: (runs, text) for name, runs, text in backends.report_backends()}
    assert rows["cpu"] == (True, "C++ kernels, all cores; cpu: float32, float64")
    assert rows["triton"][0]
    assert rows["triton"][1].endswith("; cuda:0: float32, bfloat16, float16")
    assert rows["reference"][1].endswith("; cuda:0: float32, float64; cpu: float32, float64")
    triton.failure = "wrong"
    assert {name: text for name, _, text in backends.report_backends()}["triton"].startswith(
        "its self-check in torch.float32 on cuda:0"
    )


@pytest.mark.usefixtures("with_binary")
def test_build_info() -> None:
    info = backends.build_info()
    assert info["build"] == "a compiler was found"
    assert info["instruction set"] == "avx2"
    assert all(operator in info["operators"] for operator in ops.OPERATORS)


@pytest.mark.usefixtures("without_binary")
def test_build_info_without_the_binary() -> None:
    assert backends.build_info() == {"operators": ", ".join(ops.OPERATORS), "build": REASON}
