"""Language models whose feed-forward blocks are dense or gated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ...errors import UnsupportedModel
from .schema import Family, Fused

__all__ = ["DECODERS", "LLAMA"]

GPT2 = Family(
    layers="h",
    attention="attn",
    value=Fused("attn.c_attn", index=2, count=3),
    out="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    activation="mlp.act",
    norm_before_attn="ln_1",
    norm_before_ff="ln_2",
    positions="wpe",
)
OPT = Family(
    layers="decoder.layers",
    attention="self_attn",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
    activation="activation_fn",
    norm_before_attn="self_attn_layer_norm",
    norm_before_ff="final_layer_norm",
    positions="decoder.embed_positions",
)
OPT_POST = replace(  # OPT-350m
    OPT,
    norm_before_attn=None,
    norm_after_attn="self_attn_layer_norm",
    norm_before_ff=None,
    norm_after_ff="final_layer_norm",
)
LLAMA = Family(
    layers="layers",
    attention="self_attn",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
    norm_before_attn="input_layernorm",
    norm_before_ff="post_attention_layernorm",
)
COHERE = replace(LLAMA, norm_before_ff="input_layernorm", parallel=True)
GRANITE = replace(LLAMA, scale_of_attn="residual_multiplier", scale_of_ff="residual_multiplier")
STARCODER2 = replace(LLAMA, gate=None, up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act")
ARCEE = replace(LLAMA, gate=None)
GEMMA2 = replace(
    LLAMA,
    norm_of_attn="post_attention_layernorm",
    norm_before_ff="pre_feedforward_layernorm",
    norm_of_ff="post_feedforward_layernorm",
)
OLMO2 = replace(GEMMA2, norm_before_attn=None, norm_before_ff=None)
GLM = replace(
    LLAMA,
    gate=Fused("mlp.gate_up_proj", index=0, count=2),
    up=Fused("mlp.gate_up_proj", index=1, count=2),
    activation="mlp.activation_fn",
)
GLM4 = replace(GLM, norm_of_attn="post_self_attn_layernorm", norm_of_ff="post_mlp_layernorm")
PHI = Family(
    layers="layers",
    attention="self_attn",
    value="self_attn.v_proj",
    out="self_attn.dense",
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
    norm_before_attn="input_layernorm",
    norm_before_ff="input_layernorm",
    parallel=True,
)


def _choose_opt(config: Any) -> Family:
    return OPT if config.do_layer_norm_before else OPT_POST


def _choose_phi3(config: Any) -> Family:
    """Reads queries, keys and values from one projection, in this order."""
    groups = config.num_attention_heads // config.num_key_value_heads
    return replace(GLM, value=Fused("self_attn.qkv_proj", index=groups + 1, count=groups + 2))


def _gpt_neox(config: Any) -> Family:
    """Reads query, key and value of a head side by side."""
    return Family(
        layers="layers",
        attention="attention",
        value=Fused("attention.query_key_value", index=2, count=3, groups=config.num_attention_heads),
        out="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        activation="mlp.act",
        norm_before_attn="input_layernorm",
        norm_before_ff="post_attention_layernorm",
        parallel=config.use_parallel_residual,
    )


def _gpt_bigcode(config: Any) -> Family:
    """Reads one key and value for all heads, or query, key and value of a head side by side."""
    heads = config.num_attention_heads
    if config.multi_query:
        return replace(GPT2, value=Fused("attn.c_attn", index=heads + 1, count=heads + 2), kv_heads=1)
    return replace(GPT2, value=Fused("attn.c_attn", index=2, count=3, groups=heads))


def _choose_stablelm(config: Any) -> Family:
    return COHERE if config.use_parallel_residual else LLAMA


def _choose_olmo(config: Any) -> Family:
    if config.clip_qkv is not None:
        raise UnsupportedModel(
            f"values are clipped (config.clip_qkv is {config.clip_qkv}), expected None: no linear map gives them"
        )
    return LLAMA


#: ``config.model_type`` to its family, or to the choice of one by configuration.
DECODERS: Mapping[str, Family | Callable[[Any], Family]] = MappingProxyType(
    {
        "arcee": ARCEE,
        "cohere": COHERE,
        "cohere2": COHERE,
        "ernie4_5": LLAMA,
        "gemma": LLAMA,
        "gemma2": GEMMA2,
        "gemma3_text": GEMMA2,
        "glm": GLM,
        "glm4": GLM4,
        "gpt2": GPT2,
        "gpt_bigcode": _gpt_bigcode,
        "gpt_neox": _gpt_neox,
        "granite": GRANITE,
        "llama": LLAMA,
        "mistral": LLAMA,
        "nemotron": ARCEE,
        "olmo": _choose_olmo,
        "olmo2": OLMO2,
        "olmo3": OLMO2,
        "opt": _choose_opt,
        "phi": PHI,
        "phi3": _choose_phi3,
        "qwen2": LLAMA,
        "qwen3": LLAMA,
        "smollm3": LLAMA,
        "stablelm": _choose_stablelm,
        "starcoder2": STARCODER2,
    }
)
