"""What ``ffattr bench`` prints, stores and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import TINY
from typer.testing import CliRunner

from ffattr import cli
from ffattr.bench.cases import SHAPES
from ffattr.cli import bench as bench_command
from ffattr.engine.machine_rates import calibrated
from ffattr.machine import name_processor

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in TINY.items():
        monkeypatch.setitem(SHAPES, name, size)
    monkeypatch.setattr(bench_command, "matrix_rate", lambda device, dtype: (torch.float32, 1e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "200"})


@pytest.mark.usefixtures("small")
def test_bench_prints_a_table_and_why_not() -> None:
    result = run("--shape", "gpt2", "--tokens", "5", "--rounds", "1")
    assert result.exit_code == 0, result.output
    assert f"{name_processor(CPU)}: gpt2, 5 tokens, float32" in result.stdout
    assert "its own float32 matrix product: 0.001 TFLOP/s" in result.stdout
    assert "no triton: " in result.stdout
    for name in ("torch", "reference"):
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert "%" in line
        assert "e-0" in line


@pytest.mark.usefixtures("small")
def test_bench_of_one_backend_in_another_precision() -> None:
    for dtype in ("bfloat16", "float64"):
        result = run("--tokens", "4", "--backend", "torch", "--dtype", dtype, "--rounds", "1", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert dtype in result.stdout
        assert "reference" not in result.stdout


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--shape", "gpt5"], 2, "--shape 'gpt5': expected one of minilm, bert-base, gpt2, llama-7b"),
        (["--device", "tpu"], 2, "--device 'tpu': expected auto, cpu or cuda"),
        (["--device", "cuda"], 2, "--device cuda: torch sees no CUDA device here"),
        (["--dtype", "int8"], 2, "--dtype 'int8': expected one of float64, float32, bfloat16, float16, float8_e4m3fn"),
        (["--dtype", "float31"], 2, "--dtype 'float31': expected one of"),
        (["--backend", "cpu", "--dtype", "float16"], 1, "cpu"),
        (["--backend", "gpu"], 2, "unknown backend 'gpu'"),
        (["--minutes", "1"], 2, "--minutes goes with --tune"),
        (["--tune"], 1, "--tune times Triton kernels on a CUDA device, not on cpu"),
    ],
)
def test_bench_errors_are_one_line(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_bench_calibrate_stores_what_plans_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFATTR_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    found = run("--calibrate", "--backend", "torch", "--device", "cpu")
    assert found.exit_code == 0, found.output
    assert "rates.json" in found.output
    assert calibrated("torch", torch.float32, CPU, threads) is not None
    both = run("--calibrate", "--tune")
    assert both.exit_code == 2
    assert "--calibrate and --tune are two runs" in both.output
