"""The families of transformers, as data: where in the module tree each part of a layer lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from ..layer import Columns, LayerSpec

__all__ = ["FAMILIES", "Family", "Fused", "adapt"]


@dataclass(frozen=True)
class Fused:
    """Part ``index`` of ``count`` equal parts of the output of one projection."""

    path: str
    index: int
    count: int


@dataclass(frozen=True)
class Family:
    """Dotted paths: ``layers`` and ``positions`` (a learned position table) from the base model, the rest per layer."""

    layers: str
    attention: str
    value: str | Fused
    out: str
    up: str
    down: str
    activation: str
    gate: str | None = None
    norm_before_attn: str | None = None
    norm_after_attn: str | None = None
    norm_before_ff: str | None = None
    norm_after_ff: str | None = None
    positions: str | None = None


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


def _opt(config: Any) -> Family:
    return OPT if config.do_layer_norm_before else OPT_POST


#: ``config.model_type`` to its family, or to the choice of one by configuration.
FAMILIES: Mapping[str, Family | Callable[[Any], Family]] = MappingProxyType(
    {
        "bert": BERT,
        "camembert": BERT,
        "distilbert": DISTILBERT,
        "electra": BERT,
        "gpt2": GPT2,
        "llama": LLAMA,
        "mistral": LLAMA,
        "opt": _opt,
        "qwen2": LLAMA,
        "roberta": BERT,
        "xlm-roberta": BERT,
    }
)


def adapt(base: nn.Module, model_type: str) -> tuple[tuple[LayerSpec, ...], int | None]:
    """The layers of a headless transformers model, and the size of its learned position table (None without one)."""
    config: Any = base.config
    for flag, what in (("add_cross_attention", "cross-attention"), ("is_encoder_decoder", "an encoder and a decoder")):
        if getattr(config, flag, False):
            raise UnsupportedModel(
                f"{type(base).__name__} has {what} (config.{flag} is True); the decomposition covers self-attention "
                "layers only"
            )
    entry = FAMILIES[model_type]
    family = entry(config) if callable(entry) else entry
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    layers = tuple(_layer(family, module, heads, kv_heads) for module in _at(base, family.layers))
    return layers, None if family.positions is None else _table_size(_at(base, family.positions))


def _layer(family: Family, layer: nn.Module, heads: int, kv_heads: int) -> LayerSpec:
    layer = getattr(layer, "_orig_mod", layer)

    def part(where: str | Fused | None) -> Any:
        if where is None:
            return None
        if isinstance(where, str):
            return _at(layer, where)
        module = _at(layer, where.path)
        width = (module.nf if hasattr(module, "nf") else module.out_features) // where.count
        return Columns(module, where.index * width, (where.index + 1) * width)

    return LayerSpec(
        module=layer,
        attention=part(family.attention),
        heads=heads,
        kv_heads=kv_heads,
        value=part(family.value),
        out=part(family.out),
        up=part(family.up),
        gate=part(family.gate),
        down=part(family.down),
        activation=part(family.activation),
        norm_before_attn=part(family.norm_before_attn),
        norm_after_attn=part(family.norm_after_attn),
        norm_before_ff=part(family.norm_before_ff),
        norm_after_ff=part(family.norm_after_ff),
    )


def _at(root: nn.Module, path: str) -> Any:
    found: Any = root
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise UnsupportedModel(
                f"{type(root).__name__} has no {path!r} (stopped at {name!r} of {type(found).__name__}), which its "
                "family is known to have: a variant or a version of the model that ffattr does not know. Describe "
                "its layers with ffattr.register_adapter."
            ) from None
        found = getattr(found, "_orig_mod", found)
    return found


def _table_size(table: nn.Embedding) -> int:
    """Usable positions: RoBERTa's table keeps the rows up to its padding index unused, OPT's the first two."""
    unused = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(unused)
