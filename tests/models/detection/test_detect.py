"""Models that no adapter knows: their layers are found by structure, or what was found is said."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from compare_results import assert_same_layers
from own_modules import DECODER, Attention, FeedForward, Torch, mine, renamed, transformers_model
from recording import assert_recomputed, run
from tiny_models import build
from torch import nn
from torch.nn import functional as F

import ffattr
import ffattr.models.registry as adapters
from ffattr.models.detection import detect
from ffattr.models.registry import resolve
from ffattr.models.spec.weights import Columns

pytestmark = pytest.mark.usefixtures("one_thread")

KNOWN = (
    "bert",
    "roberta",
    "distilbert",
    "gpt2",
    "opt",
    "opt-350m",
    "opt-no-affine",
    "llama",
    "llama-bias",
    "mistral",
    "qwen3",
    "gemma",
    "gemma3",
    "olmo2",
    "phi",
    "phi3",
    "gpt-neox",
    "gpt-neox-sequential",
    "glm4",
    "starcoder2",
    "stablelm",
    "stablelm-parallel",
    "modernbert",
    "mpnet",
    "codegen",
    "falcon-40b",
    "vit",
    "dinov2",
)
HALF = ("bert", "gpt2", "llama", "gemma3", "olmo2", "phi3", "gpt-neox")
NEW: dict[str, dict[str, Any]] = {
    "Helium": DECODER,
    "SeedOss": DECODER,
    "HunYuanDenseV1": DECODER,
    "Persimmon": {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")},
    "Exaone4": DECODER,
    "Jais2": DECODER,
}
"""Families of transformers without data of their own here."""


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


@pytest.mark.parametrize("name", KNOWN)
def test_known_families_are_found(name: str) -> None:
    """Every part is the very module that the family's data name."""
    model = build(name)
    expected = resolve(model)
    found = resolve(renamed(model))
    assert found.family == f"structure of {type(model).__name__}"
    assert_same_layers(found, expected)
    assert found.batch_first == expected.batch_first
    # OPT's table computes its own positions, from a mask.
    assert found.max_positions == (None if name.startswith("opt") else expected.max_positions)


@pytest.mark.parametrize("name", HALF)
def test_half_precision(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    expected = resolve(model)
    assert_same_layers(resolve(renamed(model)), expected)


@pytest.mark.parametrize("name", NEW)
def test_unknown_families_are_reproduced(name: str) -> None:
    model = transformers_model(name, **NEW[name])
    inputs = {"input_ids": tiny_models.ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    description, records, mask = run(name, model, inputs)
    assert description.family == f"structure of {name}Model"
    assert_recomputed(description, records, mask)
    single = transformers_model(name, torch.float32, **NEW[name])
    attr = ffattr.attribute(single, inputs)
    assert attr.arguments["model"] == f"structure of {name}Model"
    assert attr.error.max() < 1e-5


@pytest.mark.parametrize("own_softmax", [False, True])
def test_a_module_of_no_library(own_softmax: bool) -> None:
    model = mine(attention=lambda: Attention(own_softmax), ff=lambda: FeedForward(F.gelu))
    description, records, mask = run("", model, torch.arange(14).view(2, 7))
    assert_recomputed(description, records, mask)
    assert (description.family, description.max_positions, description.batch_first) == ("structure of Mine", 16, True)
    spec, block = description.layers[1], model.blocks[1]
    assert spec.attention is block.attention
    assert (spec.heads, spec.kv_heads, spec.parallel) == (4, 2, False)
    assert spec.value == Columns(block.attention.qkv, 36, 48)
    assert spec.gate == Columns(block.ff.both, 0, 1, groups=30)
    assert spec.up == Columns(block.ff.both, 1, 2, groups=30)
    assert spec.weights(torch.float64).branches[0].activation.name == "gelu"
    assert (spec.norm_before_attn, spec.norm_before_ff) == (block.norm1, block.norm2)


def test_multihead_attention() -> None:
    model = mine(attention=Torch, sequence_first=True)
    attention = model.blocks[0].attention.inner
    spec = resolve(model).layers[0]
    assert (spec.attention, spec.out, spec.value) == (attention, attention.out_proj, Columns(attention, 48, 72))


@pytest.mark.parametrize("attention", [Torch, lambda: Attention(sequence_first=True)])
def test_the_sequence_first(attention: Callable[[], nn.Module]) -> None:
    model = mine(attention=attention, sequence_first=True)
    description, records, mask = run("", model, torch.arange(14).view(2, 7))
    assert not description.batch_first
    assert records[0].input.shape == (2, 7, 24)
    assert_recomputed(description, records, mask)


def test_a_model_is_run_once(caplog: pytest.LogCaptureFixture) -> None:
    model = mine()
    runs: list[nn.Module] = []
    model.register_forward_hook(lambda module, args, output: runs.append(module))
    with caplog.at_level(logging.INFO, "ffattr"):
        first, second = resolve(model), resolve(model)
    assert len(runs) == len(caplog.records) == 1
    assert "structure of Mine: layers at 'blocks'" in caplog.text
    assert_same_layers(second, first)
    del first, second
    runs.clear()
    caplog.clear()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(resolve(mine().float()).layers) == 2


def test_known_models_are_not_run() -> None:
    model = build("bert")
    model.register_forward_pre_hook(lambda module, args: pytest.fail("ran"))
    resolve(model)


def test_a_layer_that_lacks_a_part_is_named() -> None:
    model = mine()
    found = detect.detect_layers(model)
    del model.blocks[0].norm2
    with pytest.raises(detect.Undetected, match="layer 0 of 'blocks' has no 'norm2'"):
        detect.make_specs(model, found)
