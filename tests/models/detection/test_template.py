"""The description to complete that a refusal ends in, and the tree of modules above it."""

from __future__ import annotations

import pytest
from compare_results import assert_same_layers
from own_modules import Block, Experts, mine
from tiny_models import build
from torch import nn

import ffattr
import ffattr.models.registry as adapters
from ffattr.errors import UnsupportedModel
from ffattr.models.detection import detect
from ffattr.models.detection.template import draw_tree, write_template
from ffattr.models.registry import ModelDescription, resolve


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


def test_what_was_found_before_it_failed_is_filled_in() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        resolve(mine(residual=0.99))
    text = str(caught.value)
    for part in (
        "attention=layer.attention, heads=4, kv_heads=2,",
        "value=ffattr.Columns(layer.attention.qkv, 36, 48), out=layer.attention.out,",
        "up=ffattr.Columns(layer.ff.both, 1, 2, groups=30), down=layer.ff.down,",
        "activation=ffattr.decomposition.activations.ACTIVATIONS['silu'],",
        "norm_before_attn=layer.norm1,",
        "norm_before_ff=...,",
        "for layer in base.blocks",
        'ffattr.register_adapter("Mine", adapter)',
        "    attention: Attention\n",
        "qkv: Linear weight [48, 24]",
    ):
        assert part in text, part


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "olmo2", "dinov2"])
def test_a_description_that_was_found_works_as_an_adapter(name: str) -> None:
    model = build(name)
    found = detect.detect_layers(model)
    expected = ModelDescription(model, detect.make_specs(model, found), "")
    exec(write_template(model.config.model_type, found.layers, found.parts[0]), {"ffattr": ffattr})
    description = resolve(model)
    assert description.family == model.config.model_type
    assert_same_layers(description, expected)


def test_a_description_of_numbered_modules() -> None:
    found = detect.detect_layers(nn.Sequential(nn.Embedding(50, 24), mine().blocks).double().eval())
    code = write_template("Sequential", found.layers, {**found.parts[0], "activation": "ff.0.act"})
    assert "for layer in base[1]" in code
    assert "activation=layer.ff[0].act," in code


def test_the_tree_is_short() -> None:
    lines = draw_tree(nn.ModuleDict({f"m{i}": nn.Linear(2, 3) for i in range(40)})).splitlines()
    assert len(lines) == 25
    assert lines[:2] == ["ModuleDict", "  m0: Linear weight [3, 2]"]
    assert lines[-1] == "  ... and 17 more"
    assert "experts: ModuleList\n      0: FeedForward (and 2 more)\n" in draw_tree(Block(ff=lambda: Experts(False)))
