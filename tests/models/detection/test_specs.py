"""Layers described by what was found of them."""

from __future__ import annotations

import pytest
import torch
from own_modules import Block
from tiny_models import build

from ffattr.decomposition.activations import ACTIVATIONS
from ffattr.models.detection.parts import Cut, Part, Product, StackedPart
from ffattr.models.detection.probe import Undetected
from ffattr.models.detection.specs import make_spec, resolve_path
from ffattr.models.spec.experts import Stacked
from ffattr.models.spec.weights import Columns, ParameterRef, Scaled

PARTS: dict[str, Part] = {
    "attention": "attention",
    "heads": 4,
    "kv_heads": 2,
    "value": Cut("attention.qkv", 36, 48),
    "out": "attention.out",
    "up": Cut("ff.both", 1, 2, groups=30),
    "gate": Cut("ff.both", 0, 1, groups=30),
    "down": Product("ff.down", "norm1.weight"),
    "activation": ACTIVATIONS["silu"],
    "norm_before_attn": "norm1",
}


def test_paths_become_modules() -> None:
    block = Block()
    spec = make_spec(block, PARTS, "layer 0")
    assert spec.value == Columns(block.attention.qkv, 36, 48)
    assert spec.norm_before_attn is block.norm1
    assert spec.activation == ACTIVATIONS["silu"]
    assert spec.down == Scaled(block.ff.down, ParameterRef(block.norm1, "weight"))
    assert (spec.shared, spec.latent, spec.experts) == (None, None, None)
    assert resolve_path(block, "") is block


def test_numbers_parts_beside_experts_and_latents() -> None:
    block = Block()
    block.strength = 0.5
    stacked = StackedPart("ff", "weights", factor=2.0)
    more: dict[str, Part] = {
        "out": Product("attention.out", "strength", is_number=True),
        "down": stacked,
        "shared_up": "ff.both",
        "shared_down": "ff.down",
        "shared_activation": ACTIVATIONS["gelu"],
        "latent": Cut("attention.qkv", 0, 3),
        "norm_of_latent": "norm2",
    }
    spec = make_spec(block, {**PARTS, **more}, "layer 0")
    assert isinstance(spec.out, Scaled)
    assert torch.equal(torch.as_tensor(spec.out.factor), torch.tensor(0.5, dtype=torch.float64))
    assert spec.down == Stacked(block.ff, "weights", factor=2.0)
    assert spec.shared is not None
    assert spec.shared.down is block.ff.down
    assert spec.latent is not None
    assert spec.latent.norm is block.norm2


def test_a_part_that_is_not_there() -> None:
    with pytest.raises(Undetected, match="layer 7 has no 'mlp', which others have"):
        make_spec(Block(), {**PARTS, "down": "mlp"}, "layer 7")
    assert resolve_path(build("bert"), "encoder.layer.1.output").dense is not None
