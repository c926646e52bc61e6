"""The compiled library: why it is not loaded, that it knows no Python, and that it declares what Python would."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_cases import needs_binary

from ffattr.ops import LIBRARY, SCHEMAS, contract
from ffattr.ops.library import Binary, binary, load_binary

REASON = "no compiler was found"
BUILT = {"cpu": True, "torch": "2.11.0", "reason": "built"}


def importing(record: dict[str, Any] | None) -> Callable[[str], Any]:
    def import_module(name: str) -> Any:
        if record is None:
            raise ImportError(name)
        return SimpleNamespace(BUILD=record)

    return import_module


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "was not built (no build record)"),
        ({"cpu": False, "reason": REASON}, REASON),
        (BUILT, "libffattr.so is gone, build it again"),
    ],
)
def test_why_there_is_no_library(
    record: dict[str, Any] | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib, "import_module", importing(record))
    found = load_binary(tmp_path / "libffattr.so")
    assert found.library is None
    assert reason in found.reason
    assert found.missing == f"the C++ library is not there: {found.reason}"
    assert found.info == {}


def test_why_a_library_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib, "import_module", importing(BUILT))
    path = tmp_path / "libffattr.so"
    path.write_text("no library")
    found = load_binary(path)
    assert found.library is None
    assert f"built for torch 2.11.0 does not load under torch {torch.__version__}: {path}: " in found.reason


def test_a_library_names_its_architectures() -> None:
    there = Binary(None, "built", {"architectures": ["80", "90a"]})
    assert there.architectures == "sm_80, sm_90a"
    assert Binary(None, "built").architectures == ""


@needs_binary
def test_a_library_says_what_it_runs_as() -> None:
    assert binary.missing is None
    assert list(binary.info) == ["compiler", "instruction set", "float32 by", "bfloat16 by"]
    assert binary.info["instruction set"].split()[0] in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


@needs_binary
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_it_knows_no_python() -> None:
    """A program that has no Python loads the file; Python's names would be missing there."""
    command = ["nm", "--dynamic", "--undefined-only", str(LIBRARY)]
    names = [line.split()[-1] for line in subprocess.check_output(command, text=True).splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names), "it is known by PyTorch's stable names"
    assert [name for name in names if re.match(r"_?Py[A-Z_]", name)] == []
    assert [name for name in names if "c10" in name or "_ZN2at" in name] == [], "only stable names"


def declare_by(code: str) -> str:
    lines = [
        "import sys, torch",
        code,
        "for name in sys.argv[1:]:",
        "    for space in (torch.ops.ffattr, torch.ops.ffattr_cuda):",
        "        print(getattr(space, name).default._schema)",
    ]
    command = [sys.executable, "-c", "\n".join(lines), *SCHEMAS]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_binary
def test_the_library_declares_what_python_does() -> None:
    """Each in a process of its own: the library without ffattr, where it computes too, and Python without it."""
    computes = (
        "print(torch.ops.ffattr.ig_slope(torch.tensor([[[-2.0, 4.0]]]), None, None, 'relu', 'exact', 0).tolist())"
    )
    result, *loaded = declare_by(f"torch.ops.load_library({LIBRARY!r}); {computes}").splitlines()
    assert result == "[[[0.0, 1.0]]]"
    declared = declare_by(
        "import pathlib; exists = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda path: path.name != 'libffattr.so' and exists(path)\n"
        "from ffattr.ops import contract, LIBRARY; assert LIBRARY is None"
    )
    assert len(loaded) == 2 * len(SCHEMAS)
    assert loaded == declared.splitlines()


@needs_binary
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contract.SCHEMAS, "ig_slope", "(Tensor z) -> Tensor")
    with pytest.raises(ImportError, match=r"libffattr\.so is of another version .* build it again: python setup\.py"):
        contract._check_declared("ffattr::ig_slope")
