"""Layers of a transformers model, by the data of `families`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from ..layer import LayerSpec
from ..parameters import Columns
from .families import FAMILIES, Family, Fused

__all__ = ["adapt"]


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
        width = (module.nf if hasattr(module, "nf") else module.out_features) // (where.count * where.groups)
        return Columns(module, where.index * width, (where.index + 1) * width, where.groups)

    def norm(where: str | None) -> Any:
        found = part(where)
        return None if isinstance(found, nn.Identity) else found

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
        norm_before_attn=norm(family.norm_before_attn),
        norm_of_attn=norm(family.norm_of_attn),
        norm_after_attn=norm(family.norm_after_attn),
        norm_before_ff=norm(family.norm_before_ff),
        norm_of_ff=norm(family.norm_of_ff),
        norm_after_ff=norm(family.norm_after_ff),
        parallel=family.parallel,
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
