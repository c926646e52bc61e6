import subprocess
import sys

import pytest
import torch
from commands import HELP, fails, run

from ffattr.ops import backends


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert "map" in result.output
    assert "info" in result.output


@pytest.mark.parametrize("arguments", [["--help"], ["map", "--help"]])
def test_help_loads_no_torch(arguments):
    result = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
    assert "LOADED []" in result.stderr


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "nowhere.gguf"])
def test_a_model_path_that_does_not_exist_is_not_looked_up_elsewhere(name):
    fails(2, f"no model at '{name}'", "map", name, "text")


def test_a_folder_or_file_that_is_no_model(tmp_path):
    fails(2, "could not load a model", "map", tmp_path, "text")
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    fails(2, "could not load a model", "map", tmp_path / "a.gguf", "text")


def test_info_says_what_can_run(monkeypatch):
    monkeypatch.setattr(backends, "build_info", lambda: {"cuda": "not built: no nvcc [auto]"})
    monkeypatch.setattr(backends, "report_backends", lambda: [("cpu", True, "AVX2"), ("cuda", False, "no GPU here")])
    result = run("info")
    assert result.exit_code == 0, result.output
    for text in (torch.__version__, "not built: no nvcc [auto]", "AVX2", "no GPU here"):
        assert text in result.stdout
