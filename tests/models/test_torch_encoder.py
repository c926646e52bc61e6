"""PyTorch's own encoders."""

from __future__ import annotations

import pytest
from tiny_models import build
from torch import nn

from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve
from ffattr.models.torch_encoder import describe_encoder


def test_torch_encoder_of_other_layers() -> None:
    model = build("torch-post")
    model.layers[1] = nn.Identity()
    with pytest.raises(UnsupportedModel, match=r"is a Identity, expected nn.TransformerEncoderLayer"):
        resolve(model)
    model.layers[1] = build("torch-layer")
    model.layers[1].self_attn = nn.MultiheadAttention(40, 5, add_bias_kv=True)
    with pytest.raises(UnsupportedModel, match="add_bias_kv"):
        resolve(model)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_norms_and_layout(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    specs, first = describe_encoder(encoder)
    assert (len(specs), first) == (3, batch_first)
    for spec, module in zip(specs, encoder.layers, strict=True):
        assert (spec.norm_before_attn is module.norm1) == (spec.norm_before_ff is module.norm2) == norm_first
        assert (spec.norm_after_attn is module.norm1) == (spec.norm_after_ff is module.norm2) == (not norm_first)
    (alone,), _ = describe_encoder(layer)
    assert (alone.module, alone.heads, alone.kv_heads) == (layer, 2, 2)


def test_an_encoder_without_layers() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    encoder.layers = nn.ModuleList()
    with pytest.raises(UnsupportedModel, match="has no layers"):
        resolve(encoder)
