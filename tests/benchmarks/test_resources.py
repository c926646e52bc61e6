"""What the kernels take of GPUs that nobody needs to have: compiled ahead of time for sm_80, sm_90 and sm_100.

CI compiles the tiles for up to 32 heads in bfloat16 and float8, which takes a minute of two cores where Triton has not
kept them (``TRITON_CACHE_DIR``); ``python benchmarks/gpu/resources.py`` compiles all of them, in seven minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from paths import BENCHMARKS

pytest.importorskip("triton")

FOLDER = BENCHMARKS / "gpu"
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of a program, at most; CUDA's programming guide
# Without the interpreter, which tests/conftest.py asks for.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

# What the JIT compiles where a size is 1, which it takes for a constant, in the smallest tile there is.
ONES = """
import sys
sys.path.insert(0, sys.argv[1])
import resources, torch
from resources import Case, Config, Shape

for capability in (8, 0), (9, 0):
    for kernel in ("direct", "own", "build", "apply"):
        case = Case(kernel, Shape(1, 1, 64, 1, torch.bfloat16, capability), Config(16, 16, 16, 4, 2, False))
        arguments = case.arguments
        sizes = [p.name for p in case.function.params if arguments[p.name] == "i32" and not p.do_not_specialize]
        ones = {**arguments, **dict.fromkeys(sizes, 1), "EVEN": False}
        print(kernel, *sizes, resources.compiled(case.function, ones, case.capability, case.config))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("resources") / "rows.json"
    command = [sys.executable, FOLDER / "resources.py", "--usual", "--json", file]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def test_every_kernel_was_compiled(rows: list[dict[str, Any]]) -> None:
    found = {(row["kernel"], row["capability"], row["dtype"]) for row in rows}
    for capability in SHARED:
        for kernel in ("direct", "build", "apply"):
            assert (kernel, capability, "bfloat16") in found
        assert (("direct", capability, "float8_e4m3fn") in found) == (capability >= 90)


def test_they_fit(rows: list[dict[str, Any]]) -> None:
    assert not [row for row in rows if row["registers"] > 255 or row["shared"] > SHARED[row["capability"]]]


def test_nothing_is_spilled_where_it_would_cost_most(rows: list[dict[str, Any]]) -> None:
    """Of the kernel that meets almost all pairs, on the GPU that the rules were made for. What ALTI compares with takes
    a second tile of the sums' size, once for many steps of the product: a third of a KiB may not fit."""
    direct = [row for row in rows if row["kernel"] == "direct" and row["capability"] == 90]
    assert {row["reduction"] for row in direct} == {"l2", "l1", "alti"}
    assert not [row for row in direct if row["spilled"] > (352 if row["reduction"] == "alti" else 0)]


def test_matrix_instructions_and_tma(rows: list[dict[str, Any]]) -> None:
    """wgmma on sm_90, and TMA wherever a tile is made for it."""
    assert all(row["matrix"] for row in rows)
    assert all(bool(row["tma_loads"]) == row["tma"] for row in rows)
    assert {row["tma"] for row in rows} == {True, False}


def test_sizes_of_one() -> None:
    """A model with one head, a block of one key: the JIT compiles a kernel for such a size."""
    command = [sys.executable, "-c", ONES, FOLDER]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kernels = [line.split()[:2] for line in done.stdout.splitlines()]
    assert kernels == 2 * [["direct", "neurons"], ["own", "neurons"], ["build", "inner"], ["apply", "heads"]]


def test_the_interpreter_compiles_nothing() -> None:
    environment = {**ENVIRONMENT, "TRITON_INTERPRET": "1"}
    command = [sys.executable, FOLDER / "resources.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unset it" in done.stderr
