"""``ffattr bench --tune`` on a GPU that is only pretended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning import CASE, Pretended, configs
from typer.testing import CliRunner

from ffattr import cli
from ffattr.cli import bench as bench_command
from ffattr.ops import backends


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pretended]:
    yield Pretended(monkeypatch, tmp_path)
    monkeypatch.undo()
    configs._read_tuned.cache_clear()


@pytest.fixture
def on_gpu(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    layer = bench_command.Layer("bert-base", 3, torch.bfloat16, torch.device("cuda", 0))
    monkeypatch.setattr(bench_command, "choose_layer", lambda *asked: layer)
    monkeypatch.setattr(bench_command.Layer, "make_case", lambda self: CASE)
    monkeypatch.setattr(bench_command, "name_processor", lambda device: "A GPU")
    monkeypatch.setattr(backends.Backend, "why_not", lambda *asked: None)
    return gpu


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "--tune", *arguments], env={"COLUMNS": "200"})


def test_tune_prints_tables_and_stores(on_gpu: Pretended) -> None:
    best = configs.Config(64, 64, 32, 8, 4, True)
    on_gpu.seconds = lambda config: 0.25 if config == best else 2.0
    result = run()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "A GPU: bert-base, 3 tokens, bfloat16, all feed-forward scopes of a layer"
    assert lines[-1] == f"stored in {configs.tuned_file()}"
    assert sum("the rule's" in line for line in lines) == 3
    assert sum("timed, 0 do not run here or are wrong" in line for line in lines) == 3
    first = next(line for line in lines if " 250 " in line)
    assert [word for word in first.split() if word != "│"] == ["250", "64", "64", "32", "8", "4", "True"]
    assert configs.tuned_file().exists()


def test_tune_within_minutes(on_gpu: Pretended) -> None:
    result = run("--minutes", "0")
    assert result.exit_code == 0, result.output
    assert "not tried for want of time" in result.stdout


def test_ctrl_c_at_the_command_line(on_gpu: Pretended) -> None:
    def interrupted(config: Any) -> float:
        raise KeyboardInterrupt

    on_gpu.seconds = interrupted
    result = run()
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not configs.tuned_file().exists()


def test_tune_says_why_triton_does_not_run(on_gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.Backend, "why_not", lambda *asked: "triton is not installed")
    result = run()
    assert result.exit_code == 1
    assert result.stderr.strip() == "error: --tune needs the triton backend: triton is not installed"
