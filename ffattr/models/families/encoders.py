"""Encoders of text, images and sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ...decomposition.activations import ACTIVATIONS
from ...errors import UnsupportedModel
from .schema import Family, Fused

__all__ = ["ENCODERS"]

BERT = Family(
    layers="encoder.layer",
    attention="attention.self",
    value="attention.self.value",
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    norm_after_attn="attention.output.LayerNorm",
    norm_after_ff="output.LayerNorm",
    positions="embeddings.position_embeddings",
)
DISTILBERT = Family(
    layers="transformer.layer",
    attention="attention",
    value="attention.v_lin",
    out="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    activation="ffn.activation",
    norm_after_attn="sa_layer_norm",
    norm_after_ff="output_layer_norm",
    positions="embeddings.position_embeddings",
)
MODERNBERT = Family(
    layers="layers",
    attention="attn",
    value=Fused("attn.Wqkv", index=2, count=3),
    out="attn.Wo",
    gate=Fused("mlp.Wi", index=0, count=2),
    up=Fused("mlp.Wi", index=1, count=2),
    down="mlp.Wo",
    activation="mlp.act",
    norm_before_attn="attn_norm",
    norm_before_ff="mlp_norm",
)
VIT = Family(
    layers="layers",
    attention="attention",
    value="attention.v_proj",
    out="attention.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
    norm_before_attn="layernorm_before",
    norm_before_ff="layernorm_after",
    special_tokens=("[CLS]",),
)
DEIT = replace(VIT, special_tokens=("[CLS]", "[DIST]"))
DINOV2 = replace(
    VIT,
    layers="encoder.layer",
    norm_before_attn="norm1",
    norm_before_ff="norm2",
    scale_of_attn="layer_scale1.lambda1",
    scale_of_ff="layer_scale2.lambda1",
)
DINOV2_OLDER = replace(  # before transformers 5.18
    DINOV2,
    attention="attention.attention",
    value="attention.attention.value",
    out="attention.output.dense",
    activation="mlp.activation",
)
CLIP_TEXT = Family(
    layers="encoder.layers",
    attention="self_attn",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
    norm_before_attn="layer_norm1",
    norm_before_ff="layer_norm2",
    positions="embeddings.position_embedding",
)
SIGLIP_VISION = replace(CLIP_TEXT, positions=None)
CLIP_VISION = replace(SIGLIP_VISION, special_tokens=("[CLS]",))
WAV2VEC2 = Family(
    layers="encoder.layers",
    attention="attention",
    value="attention.v_proj",
    out="attention.out_proj",
    up="feed_forward.intermediate_dense",
    down="feed_forward.output_dense",
    activation="feed_forward.intermediate_act_fn",
    norm_after_attn="layer_norm",
    norm_after_ff="final_layer_norm",
)
WAV2VEC2_STABLE = replace(
    WAV2VEC2,
    norm_before_attn="layer_norm",
    norm_after_attn=None,
    norm_before_ff="final_layer_norm",
    norm_after_ff=None,
)


def _choose_albert(config: Any) -> Family:
    """Lists a few layers, each of which runs many times."""
    groups = (int(i / (config.num_hidden_layers / config.num_hidden_groups)) for i in range(config.num_hidden_layers))
    layer = "encoder.albert_layer_groups.{}.albert_layers.{}"
    return Family(
        layers=tuple(layer.format(group, inner) for group in groups for inner in range(config.inner_group_num)),
        attention="attention",
        value="attention.value",
        out="attention.dense",
        up="ffn",
        down="ffn_output",
        activation="activation",
        norm_after_attn="attention.LayerNorm",
        norm_after_ff="full_layer_layer_norm",
        positions="embeddings.position_embeddings",
    )


def _choose_beit(config: Any) -> Family:
    return replace(VIT, scale_of_attn="lambda_1", scale_of_ff="lambda_2") if config.layer_scale_init_value > 0 else VIT


def _choose_dinov2(config: Any) -> Family:
    family, older = DINOV2, DINOV2_OLDER
    if config.use_swiglu_ffn:
        both = Fused("mlp.weights_in", index=0, count=2)
        older = replace(
            older, gate=both, up=replace(both, index=1), down="mlp.weights_out", activation=ACTIVATIONS["silu"]
        )
        family = replace(family, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", activation="mlp.act_fn")
    tokens = ("[CLS]", *["[REG]"] * getattr(config, "num_register_tokens", 0))
    return replace(family, special_tokens=tokens, older=older)


def _choose_wav2vec2(config: Any) -> Family:
    if not config.do_stable_layer_norm:
        return WAV2VEC2
    if getattr(config, "adapter_attn_dim", None) is not None:
        raise UnsupportedModel(
            f"the model has language adapters (config.adapter_attn_dim is {config.adapter_attn_dim}): a second "
            "feed-forward block in each layer, which no formula here covers"
        )
    return WAV2VEC2_STABLE


#: ``config.model_type`` to its family, or to the choice of one by configuration.
ENCODERS: Mapping[str, Family | Callable[[Any], Family]] = MappingProxyType(
    {
        "albert": _choose_albert,
        "beit": _choose_beit,
        "bert": BERT,
        "camembert": BERT,
        "clip_text_model": CLIP_TEXT,
        "clip_vision_model": CLIP_VISION,
        "data2vec-text": BERT,
        "deit": DEIT,
        "dinov2": _choose_dinov2,
        "dinov2_with_registers": _choose_dinov2,
        "distilbert": DISTILBERT,
        "electra": BERT,
        "ernie": BERT,
        "hubert": _choose_wav2vec2,
        "modernbert": MODERNBERT,
        "roberta": BERT,
        "siglip_text_model": CLIP_TEXT,
        "siglip_vision_model": SIGLIP_VISION,
        "vit": VIT,
        "wav2vec2": _choose_wav2vec2,
        "wavlm": _choose_wav2vec2,
        "xlm-roberta": BERT,
    }
)
