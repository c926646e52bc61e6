"""The families of transformers whose feed-forward blocks are mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ...decomposition.activations import make_swish
from ...decomposition.clamp import Clamp
from .decoders import LLAMA
from .schema import Family, PerExpert

__all__ = ["MIXTURES"]

MIXTRAL = replace(
    LLAMA,
    gate=PerExpert("gate_up_proj", index=0, count=2),
    up=PerExpert("gate_up_proj", index=1, count=2),
    down=PerExpert("down_proj"),
    activation="mlp.experts.act_fn",
    experts="mlp.experts",
)
QWEN3_MOE = replace(MIXTRAL, dense=LLAMA)
FLEX_OLMO = replace(
    MIXTRAL,
    norm_before_attn=None,
    norm_of_attn="post_attention_layernorm",
    norm_before_ff=None,
    norm_of_ff="post_feedforward_layernorm",
)


def _gpt_oss(config: Any) -> Family:
    """Adds biases; gate and up lie side by side, both cut off, one added to up. The gate's activation is no module."""
    alpha = float(getattr(config, "swiglu_alpha", 1.702))
    both = PerExpert("gate_up_proj", "gate_up_proj_bias", count=2, alternating=True, out_last=True)
    return replace(
        MIXTRAL,
        gate=both,
        up=replace(both, index=1),
        down=PerExpert("down_proj", "down_proj_bias", out_last=True),
        activation=make_swish(alpha),
        clamp=Clamp(limit=float(getattr(config, "swiglu_limit", 7.0)), offset=1.0),
    )


#: ``config.model_type`` to its family, or to the choice of one by configuration.
MIXTURES: Mapping[str, Family | Callable[[Any], Family]] = MappingProxyType(
    {
        "flex_olmo": FLEX_OLMO,
        "gpt_oss": _gpt_oss,
        "minimax_m2": MIXTRAL,
        "mixtral": MIXTRAL,
        "olmoe": MIXTRAL,
        "phimoe": MIXTRAL,
        "qwen3_moe": QWEN3_MOE,
    }
)
