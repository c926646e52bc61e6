"""The families of transformers, as data: where in the module tree each part of a layer lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

__all__ = ["FAMILIES", "Family", "Fused"]


@dataclass(frozen=True)
class Fused:
    """Part ``index`` of ``count`` equal parts of the output of one projection, or of each of its ``groups``."""

    path: str
    index: int
    count: int
    groups: int = 1


@dataclass(frozen=True)
class Family:
    """Dotted paths: ``layers`` and ``positions`` (a learned position table) from the base model, the rest per layer."""

    layers: str
    attention: str
    value: str | Fused
    out: str
    up: str | Fused
    down: str
    activation: str
    gate: str | Fused | None = None
    norm_before_attn: str | None = None
    norm_of_attn: str | None = None
    norm_after_attn: str | None = None
    norm_before_ff: str | None = None
    norm_of_ff: str | None = None
    norm_after_ff: str | None = None
    positions: str | None = None
    parallel: bool = False


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


def _opt(config: Any) -> Family:
    return OPT if config.do_layer_norm_before else OPT_POST


def _phi3(config: Any) -> Family:
    """Queries, keys and values in one projection, in this order."""
    groups = config.num_attention_heads // config.num_key_value_heads
    return replace(GLM, value=Fused("self_attn.qkv_proj", index=groups + 1, count=groups + 2))


def _gpt_neox(config: Any) -> Family:
    """Query, key and value of a head side by side."""
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


def _stablelm(config: Any) -> Family:
    return replace(LLAMA, norm_before_ff="input_layernorm", parallel=True) if config.use_parallel_residual else LLAMA


#: ``config.model_type`` to its family, or to the choice of one by configuration.
FAMILIES: Mapping[str, Family | Callable[[Any], Family]] = MappingProxyType(
    {
        "arcee": ARCEE,
        "bert": BERT,
        "camembert": BERT,
        "data2vec-text": BERT,
        "distilbert": DISTILBERT,
        "electra": BERT,
        "ernie": BERT,
        "ernie4_5": LLAMA,
        "gemma": LLAMA,
        "gemma2": GEMMA2,
        "gemma3_text": GEMMA2,
        "glm": GLM,
        "glm4": GLM4,
        "gpt2": GPT2,
        "gpt_neox": _gpt_neox,
        "llama": LLAMA,
        "mistral": LLAMA,
        "modernbert": MODERNBERT,
        "olmo2": OLMO2,
        "olmo3": OLMO2,
        "opt": _opt,
        "phi": PHI,
        "phi3": _phi3,
        "qwen2": LLAMA,
        "qwen3": LLAMA,
        "roberta": BERT,
        "smollm3": LLAMA,
        "stablelm": _stablelm,
        "starcoder2": STARCODER2,
        "xlm-roberta": BERT,
    }
)
