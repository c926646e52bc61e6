"""``ffattr check`` and ``ffattr models``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import HELP, fails, run
from saved_models import save_model
from tiny_models import build
from torch import nn
from torch.nn import functional as F

from ffattr.errors import UnsupportedModel
from ffattr.models import huggingface, pretrained, registry, verified

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a small random model, or the one given, with what makes its inputs."""
    return partial(save_model, tmp_path_factory.mktemp("models"))


def table(output: str) -> list[list[str]]:
    """The cells of its lines."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


def scopes(output: str) -> list[str]:
    return " ".join(row[-4] for row in table(output)).split()


# ---- check


def test_text(saved: Callable[..., Path]) -> None:
    result = run("check", saved("bert"))
    assert result.exit_code == 0, result.output
    assert 'input: "The cat' in result.stdout
    assert '": 19 tokens' in result.stdout
    rows = [row for row in table(result.stdout) if row[0]]
    assert [row[0] for row in rows] == ["0", "1"]
    assert [row[3:] for row in rows] == [["2e-05", "reproduced"]] * 2
    assert all(0 < float(row[2]) < 2e-6 for row in rows)
    assert scopes(result.stdout) == ["attn_heads", "attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"]
    assert re.search(r"^2 layers reproduced to \de-07; adapter: bert$", result.stdout, re.MULTILINE)
    given = run("check", saved("bert"), "the cat sat", "--dtype", "float64")
    assert 'input: "the cat sat": 3 tokens' in given.stdout
    assert "1e-09" in given.stdout
    assert re.search(r"^2 layers reproduced to \de-16; adapter: bert$", given.stdout, re.MULTILINE)


def test_mixture_some_of_whose_layers_are_dense(saved: Callable[..., Path]) -> None:
    result = run("check", saved("qwen3-moe-mixed"))
    assert result.exit_code == 0, result.output
    assert scopes(result.stdout).count("atb_ln_ff") == 2
    assert scopes(result.stdout)[-1] == "atb_ln_ff_experts"


def test_encoder_and_decoder(saved: Callable[..., Path]) -> None:
    model = build("t5", head="ForConditionalGeneration", dtype=torch.float32)
    result = run("check", saved("t5", model))
    assert result.exit_code == 0, result.output
    assert 'encoder input: "The cat' in result.stdout
    assert "decoder input: its start token, 0, and 7 of the model's own by greedy decoding: 8 tokens" in result.stdout
    assert [row[:2] for row in table(result.stdout) if row[0]] == [
        ["encoder", "0"],
        ["encoder", "1"],
        ["decoder", "0"],
        ["decoder", "1"],
        ["decoder", "2"],
    ]
    assert scopes(result.stdout)[-3:] == ["cross.attn_heads", "to", "cross.atb_ln_ff_res"]
    assert "5 layers reproduced to" in result.stdout


def test_encoder_without_its_decoder(saved: Callable[..., Path]) -> None:
    """Whose missing weights would be random ones."""
    model = build("t5", head="EncoderModel", dtype=torch.float32)
    folder = saved("t5-encoder", model)
    assert "2 layers reproduced to" in run("check", folder).stdout
    loaded, tokenizer = pretrained.load(str(folder))
    assert type(loaded) is type(model)
    assert tokenizer("the cat")["input_ids"] == [5, 6]


def test_images(saved: Callable[..., Path]) -> None:
    from transformers import ViTImageProcessor

    result = run("check", saved("vit", processor=ViTImageProcessor(size={"height": 12, "width": 12})))
    assert result.exit_code == 0, result.output
    assert "input: a generated picture, [3, 12, 12], by the model's image processor: 10 tokens" in result.stdout
    assert "2 layers reproduced to" in result.stdout
    alone = saved("dinov2")
    (alone / "tokenizer_config.json").unlink()
    result = run("check", alone)
    assert "a generated picture, [3, 12, 12], of the size in its configuration: 10 tokens" in result.stdout
    assert "adapter: dinov2" in result.stdout


def test_sound(saved: Callable[..., Path]) -> None:
    from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    # A quarter of a second would be 666 tokens of these small convolutions.
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=600)
    result = run("check", saved("wav2vec2", processor=extractor))
    assert result.exit_code == 0, result.output
    assert "input: a generated tone, [600], by the model's feature extractor: 99 tokens" in result.stdout
    assert "2 layers reproduced to" in result.stdout
    model = build("whisper", head="ForConditionalGeneration", dtype=torch.float32, max_source_positions=50)
    result = run("check", saved("whisper", model, WhisperFeatureExtractor(feature_size=6, chunk_length=1)))
    assert result.exit_code == 0, result.output
    assert "encoder input: a generated tone, [6, 100], by the model's feature extractor: 50 tokens" in result.stdout
    assert "5 layers reproduced to" in result.stdout
    assert "adapter: whisper" in result.stdout


def test_structure(saved: Callable[..., Path]) -> None:
    import transformers

    size = {"d_model": 40, "num_layers": 2, "attention_heads": 5, "ffn_dim": 52}
    torch.manual_seed(0)
    folder = saved("xglm", transformers.XGLMModel(transformers.XGLMConfig(vocab_size=61, **size)))
    result = run("check", folder)
    assert result.exit_code == 0, result.output
    assert "adapter: structure of XGLMModel" in result.stdout


def test_every_layer_is_listed_where_one_differs(monkeypatch: pytest.MonkeyPatch, saved: Callable[..., Path]) -> None:
    def wrong(base: nn.Module) -> list[Any]:
        first, *others = huggingface.describe_pretrained(base, "bert").layers
        return [replace(first, activation=lambda z: F.gelu(z, approximate="tanh")), *others]

    folder = saved("bert")
    monkeypatch.setattr(registry, "_registered", {"bert": (wrong, True)})
    result = run("check", folder)
    assert result.exit_code == 1
    rows = [row for row in table(result.stdout) if row[0]]
    assert [(row[0], row[-1]) for row in rows] == [("0", "differs"), ("1", "reproduced")]
    assert "1 of 2 layers differ, the first is layer 0; adapter: bert" in result.stdout
    assert "Traceback" not in result.output


def test_no_description_is_a_named_error_with_what_to_complete(
    monkeypatch: pytest.MonkeyPatch, saved: Callable[..., Path]
) -> None:
    def refuse(base: nn.Module) -> list[Any]:
        raise UnsupportedModel("[bold]no[/bold] layers:\n\n    def adapter(base):")

    folder = saved("bert")
    monkeypatch.setattr(registry, "_registered", {"bert": (refuse, True)})
    result = run("check", folder)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "UnsupportedModel: [bold]no[/bold] layers:\n\n    def adapter(base):\n"
    assert isinstance(run("check", folder, "--debug").exception, UnsupportedModel)


def test_wrong_usage(saved: Callable[..., Path], tmp_path: Path) -> None:
    fails(2, "no model at './nowhere'", "check", "./nowhere")
    fails(2, "could not load a model from", "check", tmp_path)
    fails(2, "--dtype 'int8': expected one of float64, float32", "check", saved("bert"), "--dtype", "int8")
    fails(2, "takes pixel_values, not text: leave out 'a cat'", "check", saved("siglip-vision"), "a cat")
    fails(2, "makes no tokens of ' '", "check", saved("bert"), " ")
    build("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "gpt2")
    fails(2, "was it saved with the model?", "check", tmp_path / "gpt2")
    build("hubert", dtype=torch.float32).save_pretrained(tmp_path / "hubert")
    fails(2, "could not load the feature extractor from", "check", tmp_path / "hubert")


# ---- models


def test_models_prints_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    result = run("models")
    assert result.exit_code == 0, result.output
    record = verified.read()
    head, *rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert head == ["model types", "layers", "scopes", "error", "of maps", "trained"]
    types = {re.sub(r" \(.*?\)", "", row[0]) for row in rows}
    by_structure = {one.model_type for one in record.structures}
    assert types == {variant.model_type for variant in record.variants} | by_structure
    assert {row[0] for row in rows if row[1] == "found by structure"} == by_structure
    assert not any("…" in cell for row in rows for cell in row)
    for model in record.trained:
        assert f"{model.name} {model.error:.0e}" in result.stdout
    said = json.loads(run("models", "--json").stdout)
    assert [row["model_type"] for row in said] == [row[0] for row in rows]
    assert [" ".join(row["scopes"]) for row in said] == [row[2] for row in rows]


def test_check_in_json(saved: Callable[..., Path]) -> None:
    result = run("check", saved("bert"), "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 0
    assert said["adapter"] == "bert"
    assert all(layer["reproduced"] and layer["error"] <= layer["tolerance"] for layer in said["layers"])
    assert said["error"] == max(layer["error"] for layer in said["layers"])


@pytest.mark.parametrize("arguments", [["models"], ["check", "--help"], ["models", "--help"]])
def test_what_needs_no_torch_loads_none(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "LOADED []" in result.stderr
