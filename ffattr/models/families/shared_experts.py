"""Mixtures of experts with a network beside them that all tokens go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from .decoders import GRANITE, LLAMA
from .mixtures import MIXTRAL
from .schema import Family, Fused, PerExpert, Shared

__all__ = ["LLAMA_LIKE", "SHARED_EXPERTS", "share_network"]


def share_network(path: str, weigher: str | None = None) -> Shared:
    """Returns a gated network at ``path`` whose projections are called as in Llama."""
    return Shared(f"{path}.gate_proj", f"{path}.up_proj", f"{path}.down_proj", f"{path}.act_fn", weigher)


LLAMA_LIKE = replace(MIXTRAL, dense=LLAMA, shared=share_network("mlp.shared_experts"))
QWEN2_MOE = replace(LLAMA_LIKE, shared=share_network("mlp.shared_expert", "mlp.shared_expert_gate"))
HUNYUAN_MOE = replace(MIXTRAL, shared=share_network("mlp.shared_mlp"), active="moe_topk")
GRANITE_MOE = replace(
    GRANITE,
    gate=PerExpert("gate_up_proj", index=0, count=2),
    up=PerExpert("gate_up_proj", index=1, count=2),
    down=PerExpert("down_proj"),
    activation="block_sparse_moe.experts.act_fn",
    experts="block_sparse_moe.experts",
    shared=Shared(
        gate=Fused("shared_mlp.input_linear", index=0, count=2),
        up=Fused("shared_mlp.input_linear", index=1, count=2),
        down="shared_mlp.output_linear",
        activation="shared_mlp.activation",
    ),
)
LLAMA4_DENSE = replace(
    LLAMA,
    gate="feed_forward.gate_proj",
    up="feed_forward.up_proj",
    down="feed_forward.down_proj",
    activation="feed_forward.activation_fn",
)
# The router's scores multiply what experts read. Beside the experts, which see none of the routing, lies a network.
LLAMA4 = replace(
    LLAMA4_DENSE,
    gate=PerExpert("gate_up_proj", index=0, count=2, out_last=True),
    up=PerExpert("gate_up_proj", index=1, count=2, out_last=True),
    down=PerExpert("down_proj", out_last=True),
    activation="feed_forward.experts.act_fn",
    experts="feed_forward.experts",
    router="feed_forward.router",
    scales_input=True,
    shared=replace(share_network("feed_forward.shared_expert"), activation="feed_forward.shared_expert.activation_fn"),
    dense=LLAMA4_DENSE,
)


#: ``config.model_type`` to its family, or to the choice of one by configuration.
SHARED_EXPERTS: Mapping[str, Family | Callable[[Any], Family]] = MappingProxyType(
    {
        "dots1": LLAMA_LIKE,
        "ernie4_5_moe": LLAMA_LIKE,
        "exaone_moe": LLAMA_LIKE,
        "glm4_moe": LLAMA_LIKE,
        "granitemoe": GRANITE_MOE,
        "granitemoeshared": GRANITE_MOE,
        "hunyuan_v1_moe": HUNYUAN_MOE,
        "hy_v3": LLAMA_LIKE,
        "llama4_text": LLAMA4,
        "qwen2_moe": QWEN2_MOE,
        "solar_open": LLAMA_LIKE,
    }
)
