"""The operators in exported programs, and compiled ahead of time: bit for bit what they are by themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import MAPS, OPERATORS, case, needs_binary
from paths import BENCHMARKS, ROOT
from torch import Tensor, nn

from ffattr.ops.library import binary

sys.path.insert(0, str(BENCHMARKS / "examples"))
import export_norms


class Calls(nn.Module):
    """Calls an operator by its arguments; those that are no tensors are constants of the program."""

    def __init__(self, operator: str, given: dict[str, Any]) -> None:
        super().__init__()
        self.operator, self.given = operator, given

    def forward(self, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        arguments = [next(left) if isinstance(value, Tensor) else value for value in self.given.values()]
        out: Tensor = getattr(OPERATORS, self.operator)(*arguments) * 2
        return out


def exported(operator: str) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...], Tensor]:
    given = case(operator, 5, 7)
    tensors = tuple(value for value in given.values() if isinstance(value, Tensor))
    calls = Calls(operator, given)
    return torch.export.export(calls, tensors), tensors, calls(*tensors)


@pytest.mark.parametrize("operator", MAPS)
def test_export(operator: str) -> None:
    program, tensors, expected = exported(operator)
    assert f"ffattr.{operator}" in str(program.graph)
    assert torch.equal(program.module()(*tensors), expected)


@needs_binary
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling ahead of time needs g++")
def test_packages_run_without_python(tmp_path: Path) -> None:
    """The lines of docs/operators.md as they stand there: both programs print the same, C++ after comparing bits."""
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-euc", lines]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert f"instruction set: {binary.info['instruction set']}" in said
    assert said[-1].removesuffix("; the package's are the same") == said[0].removeprefix("norms.pt2: ")
    package = str(tmp_path / "norms.pt2")
    arguments = export_norms.make_arguments()
    assert torch.equal(torch._inductor.aoti_load_package(package)(*arguments), export_norms.Norms()(*arguments))
