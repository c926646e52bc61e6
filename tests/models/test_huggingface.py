"""Layers of transformers models by the data of their families, and what a family is not."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build

from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve


def test_grouped_heads() -> None:
    spec = resolve(build("llama")).layers[0]
    assert (spec.heads, spec.kv_heads, spec.weights(torch.float32).head_dim) == (6, 2, 8)


@pytest.mark.parametrize(
    ("name", "positions"),
    [("bert", 32), ("roberta", 32), ("distilbert", 32), ("electra", 32), ("gpt2", 32), ("opt", 32), ("llama", None)],
)
def test_positions(name: str, positions: int | None) -> None:
    assert resolve(build(name)).max_positions == positions


def test_missing_part_is_named() -> None:
    model = build("bert")
    del model.encoder.layer[1].intermediate.dense
    with pytest.raises(UnsupportedModel, match=r"BertLayer has no 'intermediate.dense' .stopped at 'dense'"):
        resolve(model)
