"""Which backend runs, and what is said of the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ffattr import backends, ops, torch_ops
from ffattr.errors import BackendUnavailable, FfattrError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
REASON = "no compiler was found"


@pytest.fixture
def without_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_binary", None)
    monkeypatch.setattr(backends, "_binary_reason", REASON)


@pytest.fixture
def with_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_binary", SimpleNamespace(build_info=lambda: {"instruction set": "avx2"}))


@pytest.mark.usefixtures("with_binary")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_prefers_the_compiled_kernels(dtype: torch.dtype) -> None:
    assert backends.select("auto", CPU, dtype).name == "cpu"
    assert backends.select("auto", CUDA, dtype).name == "torch"


@pytest.mark.usefixtures("without_binary")
def test_auto_runs_without_the_compiled_kernels() -> None:
    assert backends.select("auto", CPU, torch.float32).name == "torch"


@pytest.mark.usefixtures("with_binary")
@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_a_backend_by_name(name: str) -> None:
    backend = backends.select(name, CPU, torch.float64)
    assert backend.name == name
    assert backend.is_reference == (name == "reference")
    if name != "reference":
        assert all(callable(getattr(backend.operators, operator)) for operator in ops.OPERATORS)
    assert backends.BACKENDS["torch"].operators is torch_ops


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None])
def test_an_unknown_backend_lists_the_known_ones(name: Any) -> None:
    with pytest.raises(ValueError, match=rf"unknown backend {name!r}, expected 'auto'.*'cpu', 'torch', 'reference'"):
        backends.select(name, CPU, torch.float32)


@pytest.mark.usefixtures("without_binary")
def test_the_compiled_backend_without_a_binary_says_why() -> None:
    with pytest.raises(BackendUnavailable, match=rf"'cpu' cannot run: .*C\+\+ extension is not there: {REASON}"):
        backends.select("cpu", CPU, torch.float32)
    assert issubclass(BackendUnavailable, FfattrError)


@pytest.mark.usefixtures("with_binary")
def test_the_compiled_backend_on_another_device_says_what_to_do() -> None:
    with pytest.raises(BackendUnavailable, match=r"runs on the CPU, the model is on cuda:0; use backend=\"torch\""):
        backends.select("cpu", CUDA, torch.float32)


@pytest.mark.usefixtures("with_binary")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("name", ["auto", "cpu", "torch", "reference"])
def test_other_dtypes_are_refused_by_name(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(BackendUnavailable, match=f"'{name}' cannot run: .*float32 or float64, not {dtype}"):
        backends.select(name, CPU, dtype)


@pytest.mark.usefixtures("with_binary")
def test_auto_gives_every_reason() -> None:
    with pytest.raises(BackendUnavailable, match=r"cpu: .*on cuda:0.*; torch: .*not torch.bfloat16"):
        backends.select("auto", CUDA, torch.bfloat16)


@pytest.mark.usefixtures("without_binary")
def test_report() -> None:
    rows = {name: (runs, text) for name, runs, text in backends.report()}
    assert list(rows) == list(backends.BACKENDS)
    assert rows["cpu"] == (False, f"the C++ extension is not there: {REASON}")
    assert rows["torch"] == (True, backends.BACKENDS["torch"].description)
    assert not any(runs for _, runs, _ in backends.report(CPU, torch.float16))


@pytest.mark.usefixtures("with_binary")
def test_report_with_the_binary() -> None:
    rows = {name: runs for name, runs, _ in backends.report()}
    assert all(rows.values())
    on_gpu = {name: runs for name, runs, _ in backends.report(CUDA)}
    assert on_gpu == {"cpu": False, "torch": True, "reference": True}


def test_build_info(monkeypatch: pytest.MonkeyPatch, with_binary: None) -> None:
    monkeypatch.setattr(backends, "_binary_reason", "a compiler was found")
    info = backends.build_info()
    assert info["build"] == "a compiler was found"
    assert info["instruction set"] == "avx2"
    assert all(operator in info["operators"] for operator in ops.OPERATORS)


@pytest.mark.usefixtures("without_binary")
def test_build_info_without_the_binary() -> None:
    assert backends.build_info() == {"operators": ", ".join(ops.OPERATORS), "build": REASON}


def importing(**modules: Any) -> Callable[[str], Any]:
    def import_module(name: str) -> Any:
        found = modules.get(name.rpartition(".")[2])
        if found is None:
            raise ImportError(f"undefined symbol in {name}")
        return found

    return import_module


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({}, "was not built (no build record)"),
        ({"_build_info": SimpleNamespace(BUILD={"cpu": False, "reason": REASON})}, REASON),
        (
            {"_build_info": SimpleNamespace(BUILD={"cpu": True, "torch": "2.11.0", "reason": "built"})},
            f"built for torch 2.11.0 does not load under torch {torch.__version__}: undefined symbol in ffattr._C",
        ),
    ],
)
def test_why_the_binary_is_not_loaded(modules: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", importing(**modules))
    binary, said = backends._load_binary()
    assert binary is None
    assert reason in said


def test_a_binary_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    record = SimpleNamespace(BUILD={"cpu": True, "torch": "2.13.0", "reason": "built with gcc"})
    module = SimpleNamespace()
    monkeypatch.setattr(importlib, "import_module", importing(_build_info=record, _C=module))
    assert backends._load_binary() == (module, "built with gcc")
