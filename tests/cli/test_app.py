import io
import subprocess
import sys

import pytest
import tiny_models
import torch
from commands import HELP, fails, run
from made_tokenizers import make_tokenizer, wordpiece
from rich.console import Console
from synthetic import attribution

from ffattr import Pool, TopK, attribute, load
from ffattr.cli import map as map_command
from ffattr.cli import progress
from ffattr.decomposition.integrated_gradients import GaussLegendre, Riemann
from ffattr.errors import ArchitectureMismatch, BackendUnavailable, OutOfMemory, UnsupportedModel
from ffattr.models import pretrained
from ffattr.ops import backends
from ffattr.pipeline import attribute as attribute_module
from ffattr.pipeline import plan as plan_module
from ffattr.results import files

TOKENIZER = make_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture
def calls(monkeypatch):
    """Replaces loading and computing; gives the list of what they were called with."""
    seen = []

    def attribute(model, inputs, *, progress, **options):
        seen.append((model, inputs, options))
        progress(1, 2)
        return attribution()

    def plan(model, inputs, **options):
        seen.append((model, inputs, options))
        return "direct on torch [3 layers]"

    monkeypatch.setattr(pretrained, "load", lambda name: (f"model {name}", TOKENIZER))
    monkeypatch.setattr(attribute_module, "attribute", attribute)
    monkeypatch.setattr(plan_module, "plan", plan)
    return seen


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


def test_map_passes_what_was_asked_for(calls, tmp_path):
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
    options += ["--words", "--top", 3, "-o", tmp_path / "maps"]
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
                "groups": "words",
                "keep": TopK(3),
                "tokenizer": TOKENIZER,
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


def test_map_writes_files(calls, tmp_path):
    output, png = tmp_path / "maps.safetensors", tmp_path / "map.png"
    result = run("map", "m", "text", "-o", output, "--png", png)
    assert result.exit_code == 0, result.output
    assert load(output).layers == (0, 2, 5)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [png, output]


def test_map_writes_a_page_of_all_scopes(calls, tmp_path):
    page = tmp_path / "maps.html"
    result = run("map", "m", "text", "--html", page)
    assert result.exit_code == 0, result.output
    assert calls[0][2]["scopes"] == "all"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert f"page: {page}" in result.stdout.replace("\n", "")
    assert run("map", "m", "text", "--html", page, "--scope", "atb").exit_code == 0
    assert calls[1][2]["scopes"] == "atb"


def test_map_without_files_prints_the_strongest_pairs(calls):
    result = run("map", "m", "text")
    assert "atb_ff_res_ln, layer 5" in result.stdout
    assert "tok0." in result.stdout
    assert "a plan" in result.stdout


@pytest.fixture(scope="module")
def bert():
    return tiny_models.build("bert")


TEXT = "the cat sat on a mat"  # and [CLS], [SEP]


@pytest.mark.parametrize("options", [[], ["--words"], ["--top", "3"], ["--words", "--top", "3"]])
def test_the_strongest_pairs_are_those_of_different_tokens(bert, monkeypatch, options):
    monkeypatch.setattr(pretrained, "load", lambda name: (bert, TOKENIZER))
    monkeypatch.setattr(map_command, "_PAIRS", 1)
    result = run("map", "m", TEXT, *options)
    assert result.exit_code == 0, result.output
    whole = attribute(bert, TEXT, tokenizer=TOKENIZER)["layer"][-1, 0].fill_diagonal_(0)
    query, key = divmod(int(whole.argmax()), 8)
    names = ["[CLS]", *TEXT.split(), "[SEP]"]
    for shown in (f"{query} {names[query]}", f"{key} {names[key]}", f"{whole.max():.3g}"):
        assert f" {shown} " in result.stdout


def test_the_strongest_pairs_of_words_and_of_blocks(bert, monkeypatch):
    """Subwords, so that columns are no tokens."""
    tokenizer = wordpiece()
    text = "cats playing the cats."
    monkeypatch.setattr(pretrained, "load", lambda name: (bert, tokenizer))
    monkeypatch.setattr(map_command, "_PAIRS", 1)
    word = torch.tensor([0, 1, 1, 2, 2, 3, 4, 4, 5, 6])
    whole = attribute(bert, text, tokenizer=tokenizer, groups="words")["layer"][-1, 0].clone()
    whole[torch.arange(10), word] = 0
    key = int(whole.argmax()) % 7
    result = run("map", "m", text, "--words")
    assert f" {key} {['[CLS]', 'cats', 'playing', 'the', 'cats', '.', '[SEP]'][key]} " in result.stdout
    assert f" {whole.max():.3g} " in result.stdout
    pooled = attribute(bert, text, tokenizer=tokenizer, keep=Pool(4))["layer"][-1, 0].clone().fill_diagonal_(0)
    result = run("map", "m", text, "--pool", 4)
    assert " … " in result.stdout
    assert f" {pooled.max():.3g} " in result.stdout


def test_progress_says_how_fast_and_how_long():
    times = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, get_time=lambda: times[-1])
    with progress.show_progress(12_000, console) as update:
        for time in (10.0, 50.0, 90.0):  # the first layer comes early, all others take 40 s
            times.append(time)
            update(len(times) - 1, 6)
    shown = out.getvalue()
    assert "3/6" in shown
    assert "67 tokens/s" in shown  # 6000 in 90 s
    assert "0:02:00" in shown


def test_no_progress_where_nobody_watches():
    out = io.StringIO()
    with progress.show_progress(12, Console(file=out)) as update:
        update(1, 2)
    assert out.getvalue() == ""


def test_plan_computes_nothing(calls):
    result = run("map", "m", "text", "--plan")
    assert result.stdout.strip() == "direct on torch [3 layers]"
    assert not calls[0][2].keys() & {"progress", "keep"}


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


def test_ctrl_c_exits_with_130_and_leaves_no_file(calls, monkeypatch, tmp_path):
    def half(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", half)
    result = fails(130, "interrupted", "map", "m", "text", "-o", tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert "maps:" not in result.stdout


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
