"""Encoders of images and recordings: heads, towers and the variants of their layers."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from recording import assert_recomputed, run
from tiny_models import build
from torch import Tensor

from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve
from ffattr.models.spec.weights import Scaled


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "prefix", "head"),
    [
        ("vit", "ViT", "ForImageClassification"),
        ("clip-vision", "CLIPVision", "ModelWithProjection"),
        ("clip-text", "CLIPText", "ModelWithProjection"),
        ("wav2vec2", "Wav2Vec2", "ForCTC"),
    ],
)
def test_heads_are_left_out(name: str, prefix: str, head: str) -> None:
    model = build(name, head=head)
    assert type(resolve(model).base).__name__ == f"{prefix}Model"
    assert_recomputed(*run(name, model))


def towers(model_type: str) -> tuple[str, Any]:
    prefix = {"clip": "CLIP", "siglip": "Siglip"}[model_type]
    settings = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 52}
    text = {**settings, "vocab_size": tiny_models.VOCABULARY, "max_position_embeddings": tiny_models.POSITIONS}
    vision = {**settings, "image_size": 12, "patch_size": 4}
    return prefix, getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=vision)


@pytest.mark.parametrize("model_type", ["clip", "siglip"])
def test_two_towers(model_type: str) -> None:
    prefix, config = towers(model_type)
    model = getattr(transformers, f"{prefix}Model")(config).double().eval()
    with pytest.raises(
        UnsupportedModel,
        match=rf"no adapter knows {prefix}Model .*not tried.*: model\.text_model \(.*or model\.vision_model",
    ):
        resolve(model)
    assert_recomputed(*run("", model.text_model, tiny_models.ids()))
    assert_recomputed(*run("", model.vision_model, images(1, 3, 12, 12)))
    classifier = getattr(transformers, f"{prefix}ForImageClassification")(config).double().eval()
    assert resolve(classifier).base is classifier.vision_model
    assert_recomputed(*run("", classifier, images(1, 3, 12, 12)))


# ---- layers


def test_layer_scale_is_part_of_the_projections() -> None:
    for name, scales in (("dinov2-swiglu", ("layer_scale1.lambda1", "layer_scale2.lambda1")), ("beit", ("lambda_1",))):
        model = build(name)
        spec = resolve(model).layers[1]
        weights = spec.weights(torch.float64)
        assert isinstance(spec.down, Scaled)
        assert isinstance(spec.out, Scaled)
        scale = spec.module.get_parameter(scales[0])
        torch.testing.assert_close(weights.out.weight, (scale[:, None] * spec.out.module.weight).T)
        torch.testing.assert_close(weights.out.bias, scale * spec.out.module.bias)
    assert not isinstance(resolve(build("beit", layer_scale_init_value=0.0)).layers[0].out, Scaled)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        {"use_relative_position_bias": False, "use_absolute_position_embeddings": True},
        {"layer_scale_init_value": 0.0},
    ],
    ids=str,
)
def test_variants_of_beit(settings: dict[str, Any]) -> None:
    assert_recomputed(*run("beit", build("beit", **settings)))


@pytest.mark.parametrize("name", ["clip-text", "siglip-text"])
def test_text_as_long_as_the_positions_allow(name: str) -> None:
    model = build(name)
    assert_recomputed(*run(name, model, tiny_models.ids(1, 32)))
    with pytest.raises(ValueError, match=r"33 tokens, but .*TextModel has 32 learned positions"):
        run(name, model, tiny_models.ids(1, 33))


def test_language_adapters_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"language adapters \(config.adapter_attn_dim is 4\)"):
        resolve(build("wav2vec2-stable", adapter_attn_dim=4))
    assert_recomputed(*run("wav2vec2", build("wav2vec2", adapter_attn_dim=4, add_adapter=True)))  # has none
