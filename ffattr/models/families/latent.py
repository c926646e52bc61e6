"""Families with multi-head latent attention: keys and values are made of one narrow vector for each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from .decoders import LLAMA
from .schema import Family
from .shared_experts import LLAMA_LIKE

__all__ = ["LATENT"]


def _make_latent(family: Family) -> Family:
    """Returns the same layer with latent attention."""
    return replace(
        family,
        value="self_attn.kv_b_proj",
        latent="self_attn.kv_a_proj_with_mqa",
        norm_of_latent="self_attn.kv_a_layernorm",
        dense=None if family.dense is None else _make_latent(family.dense),
    )


DENSE = _make_latent(LLAMA)
DEEPSEEK = _make_latent(LLAMA_LIKE)
MINICPM3 = replace(DENSE, scale_of_attn="residual_scale", scale_of_ff="residual_scale")


#: ``config.model_type`` to its family, or to the choice of one by configuration.
LATENT: Mapping[str, Family | Callable[[Any], Family]] = MappingProxyType(
    {
        "deepseek_v2": DEEPSEEK,
        "deepseek_v3": DEEPSEEK,
        "glm4_moe_lite": DEEPSEEK,
        "minicpm3": MINICPM3,
        "youtu": DENSE,
    }
)
