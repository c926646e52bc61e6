"""Which module plays which part, told from what one run of a layer read and returned."""

from __future__ import annotations

import pytest
from own_modules import mine
from tiny_models import build
from torch import nn

from ffattr.models.detection.match import match_parts
from ffattr.models.detection.observe import observe_layers
from ffattr.models.detection.parts import Cut, Part, Product
from ffattr.models.detection.probe import Undetected

pytestmark = pytest.mark.usefixtures("one_thread")


def parts_of(model: nn.Module) -> tuple[bool, dict[str, Part]]:
    found: dict[str, Part] = {}
    return match_parts(observe_layers(model).runs[-1], found), found


def test_parts_of_a_gated_block_with_fused_projections() -> None:
    batch_first, found = parts_of(mine())
    assert batch_first
    assert (found["attention"], found["heads"], found["kv_heads"]) == ("attention", 4, 2)
    assert (found["value"], found["out"]) == (Cut("attention.qkv", 36, 48), "attention.out")
    assert (found["gate"], found["up"]) == (Cut("ff.both", 0, 1, groups=30), Cut("ff.both", 1, 2, groups=30))
    assert (found["down"], found["parallel"]) == ("ff.down", False)
    norms = {name: path for name, path in found.items() if name.startswith("norm_") and path is not None}
    assert norms == {"norm_before_attn": "norm1", "norm_before_ff": "norm2"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-neox", {"value": Cut("attention.query_key_value", 16, 24, groups=5), "parallel": True, "gate": None}),
        ("olmo2", {"norm_of_attn": "post_attention_layernorm", "norm_before_attn": None}),
        ("dinov2", {"down": Product("mlp.fc2", "layer_scale2.lambda1")}),
    ],
)
def test_parts_of_families(name: str, expected: dict[str, Part]) -> None:
    _, found = parts_of(build(name))
    assert {part: found[part] for part in expected} == expected


def test_what_was_matched_before_it_failed() -> None:
    found: dict[str, Part] = {}
    with pytest.raises(Undetected, match="not the sum of its input, attention and feed-forward"):
        match_parts(observe_layers(mine(residual=0.99)).runs[-1], found)
    assert (found["out"], found["down"]) == ("attention.out", "ff.down")
    assert "norm_before_ff" not in found
