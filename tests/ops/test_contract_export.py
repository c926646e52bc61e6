"""The operators in exported programs, and compiled ahead of time: bit for bit what they are by themselves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import MAPS, OPERATORS, case
from torch import Tensor, nn


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


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling ahead of time needs g++")
def test_compile_ahead_of_time(tmp_path: Path) -> None:
    program, tensors, expected = exported("ff_norms")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "norms.pt2"))
    assert torch.equal(torch._inductor.aoti_load_package(package)(*tensors), expected)
