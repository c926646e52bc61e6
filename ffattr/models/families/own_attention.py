"""Families that compute attention by themselves, without transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ...errors import UnsupportedModel
from .encoders import BERT
from .schema import Family, Fused

__all__ = ["OWN_ATTENTION"]

GPTJ = Family(
    layers="h",
    attention="attn",
    value="attn.v_proj",
    out="attn.out_proj",
    up="mlp.fc_in",
    down="mlp.fc_out",
    activation="mlp.act",
    norm_before_attn="ln_1",
    norm_before_ff="ln_1",
    parallel=True,
)
# Query, value and key of a quarter of the heads side by side.
CODEGEN = replace(GPTJ, value=Fused("attn.qkv_proj", index=1, count=3, groups=4))
GPT_NEO = Family(
    layers="h",
    attention="attn.attention",
    value="attn.attention.v_proj",
    out="attn.attention.out_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    activation="mlp.act",
    norm_before_attn="ln_1",
    norm_before_ff="ln_2",
    positions="wpe",
)
MPT = Family(
    layers="blocks",
    attention="attn",
    value=Fused("attn.Wqkv", index=2, count=3),
    out="attn.out_proj",
    up="ffn.up_proj",
    down="ffn.down_proj",
    activation="ffn.act",
    norm_before_attn="norm_1",
    norm_before_ff="norm_2",
)
MPNET = replace(
    BERT,
    attention="attention.attn",
    value="attention.attn.v",
    out="attention.attn.o",
    norm_after_attn="attention.LayerNorm",
)
MEGATRON_BERT = replace(
    BERT, norm_before_attn="attention.ln", norm_after_attn=None, norm_before_ff="ln", norm_after_ff=None
)
DEBERTA_V2 = replace(BERT, value="attention.self.value_proj")


def _choose_bloom(config: Any) -> Family:
    """Reads query, key and value of a head side by side."""
    if config.apply_residual_connection_post_layernorm:
        raise UnsupportedModel(
            "the residual connections start behind the norms (config.apply_residual_connection_post_layernorm is "
            "True), expected ahead of them: no formula here covers that"
        )
    return Family(
        layers="h",
        attention="self_attention",
        value=Fused("self_attention.query_key_value", index=2, count=3, groups=config.num_attention_heads),
        out="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        activation="mlp.gelu_impl",
        norm_before_attn="input_layernorm",
        norm_before_ff="post_attention_layernorm",
    )


def _choose_falcon(config: Any) -> Family:
    """Has BLOOM's module tree, mostly parallel; heads may share keys and values, one of all or one of each group."""
    heads = config.num_attention_heads
    kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    share = heads // kv_heads
    names = ("input_layernorm", "input_layernorm" if config.parallel_attn else "post_attention_layernorm")
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2:
        names = ("ln_attn", "ln_mlp")
    return Family(
        layers="h",
        attention="self_attention",
        value=Fused("self_attention.query_key_value", index=share + 1, count=share + 2, groups=kv_heads),
        out="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        activation="mlp.act",
        norm_before_attn=names[0],
        norm_before_ff=names[1],
        parallel=config.parallel_attn,
        kv_heads=kv_heads,
    )


def _choose_deberta(config: Any) -> Family:
    """Reads query, key and value of a head side by side, the value's bias apart."""
    value = Fused(
        "attention.self.in_proj", index=2, count=3, groups=config.num_attention_heads, bias="attention.self.v_bias"
    )
    return replace(_deberta_v2(config), value=value)


def _deberta_v2(config: Any) -> Family:
    return DEBERTA_V2 if config.position_biased_input else replace(DEBERTA_V2, positions=None)


def _choose_roformer(config: Any) -> Family:
    if config.rotary_value:
        raise UnsupportedModel(
            "values are rotated by their positions (config.rotary_value is True), so that no single linear map gives "
            "them, expected False"
        )
    return replace(BERT, positions=None)


def _choose_mpt(config: Any) -> Family:
    if config.attn_config.clip_qkv:
        raise UnsupportedModel(
            f"values are clipped (config.attn_config.clip_qkv is {config.attn_config.clip_qkv}), so that no linear map "
            "gives them, expected None"
        )
    return MPT


#: ``config.model_type`` to its family, or to the choice of one by configuration.
OWN_ATTENTION: Mapping[str, Family | Callable[[Any], Family]] = MappingProxyType(
    {
        "bloom": _choose_bloom,
        "codegen": CODEGEN,
        "deberta": _choose_deberta,
        "deberta-v2": _deberta_v2,
        "falcon": _choose_falcon,
        "gpt_neo": GPT_NEO,
        "gptj": GPTJ,
        "megatron-bert": MEGATRON_BERT,
        "mpnet": MPNET,
        "mpt": _choose_mpt,
        "rembert": BERT,
        "roformer": _choose_roformer,
    }
)
