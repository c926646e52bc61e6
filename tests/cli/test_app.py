import subprocess
import sys

import pytest
import torch
from commands import HELP, fails, run

from ffattr import Pool, TopK
from ffattr.decomposition.integrated_gradients import GaussLegendre, Riemann
from ffattr.errors import ArchitectureMismatch, BackendUnavailable, OutOfMemory, UnsupportedModel
from ffattr.ops import backends
from ffattr.pipeline import attribute as attribute_module


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


def test_map_passes_what_was_asked_for(calls, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\ufeffGrüße", encoding="utf-8")  # as some editors begin a file
    options = [
        "--scope",
        "atb",
        "--scope",
        "layer",
        "--layers",
        "0,-1",
        "--ig",
        "riemann:50:midpoint",
        "--dtype",
        "float64",
    ]
    options += ["--value-bias", "separate", "--baseline", "bias", "--backend", "torch", "--method", "direct"]
    options += ["--reduce", "l1", "--words", "--top", 3, "-o", tmp_path / "maps"]
    result = run("map", "somewhere", "--file", text, *options)
    assert result.exit_code == 0, result.output
    assert calls == [
        (
            "model somewhere",
            "Grüße",
            {
                "scopes": ["atb", "layer"],
                "layers": [0, -1],
                "ig": Riemann(50, "midpoint"),
                "value_bias": "separate",
                "baseline": "bias",
                "dtype": torch.float64,
                "backend": "torch",
                "method": "direct",
                "reduce": "l1",
                "groups": "words",
                "keep": TopK(3),
                "tokenizer": tokenizer,
            },
        )
    ]


def test_map_defaults_are_those_of_attribute(calls):
    assert run("map", "m", "text", "--layers", "1:", "--ig", "gauss:16").exit_code == 0
    options = calls[0][2]
    assert (options["scopes"], options["layers"], options["dtype"]) == ("layer", slice(1, None), None)
    assert options["ig"] == GaussLegendre(16)
    assert (options["groups"], options["keep"]) == (None, "dense")
    assert run("map", "m", "text", "--pool", 2).exit_code == 0
    assert calls[1][2]["keep"] == Pool(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either TEXT or --file"),
        (["text", "--file", "f"], "not both"),
        (["  "], "the text is empty"),
        (["--file", "nowhere.txt"], "cannot read 'nowhere.txt'"),
        (["text", "--layers", "first"], "--layers 'first'"),
        (["text", "--layers", "1:2:3"], "--layers '1:2:3'"),
        (["text", "--ig", "simpson"], "--ig 'simpson'"),
        (["text", "--ig", "riemann:x"], "--ig 'riemann:x'"),
        (["text", "--ig", "riemann:5:up"], "'up'"),
        (["text", "--dtype", "float31"], "--dtype 'float31'"),
        (["text", "--top", "2", "--pool", "2"], "--top 2 and --pool 2 are both given"),
        (["text", "--top", "0"], "--top 0: expected at least 1"),
        (["text", "--pool", "-3"], "--pool -3: expected at least 1"),
        (["text", "-o", "nowhere/a.safetensors"], "there is no folder 'nowhere'"),
        (["text", "--png", "nowhere/a.png"], "there is no folder 'nowhere'"),
        (["text", "--html", "nowhere/a.html"], "there is no folder 'nowhere'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(calls, arguments, message):
    fails(2, message, "map", "m", *arguments)
    assert calls == []


def test_a_file_that_is_not_text(calls, tmp_path):
    (tmp_path / "f").write_bytes(b"\xff\xfe\x00")
    fails(2, "is not UTF-8 text", "map", "m", "--file", tmp_path / "f")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnsupportedModel("no adapter for [bold]x[/bold],\n known: bert"), 2),
        (ArchitectureMismatch("layer 3 is off"), 1),
        (BackendUnavailable("no GPU"), 1),
        (OutOfMemory("layer 3 ran out of memory"), 1),
        (ZeroDivisionError("a bug"), 1),
        (KeyError("no scope 'x'"), 2),
        (MemoryError(), 1),
    ],
)
def test_errors_are_one_line(calls, monkeypatch, error, code):
    def attribute(*_, **__):
        raise error

    monkeypatch.setattr(attribute_module, "attribute", attribute)
    text = " ".join(str(error.args[0]).split()) if error.args else "MemoryError"
    fails(code, text, "map", "m", "text")
    result = run("map", "m", "text", "--debug")
    assert result.exception is error


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
