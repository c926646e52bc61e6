"""The layer description: the parameters it reads, their sizes, and the scopes that follow from its norms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_layers import FF, WIDTH, spec
from tiny_models import FAMILIES, build
from torch import nn

from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_take_the_dtype_and_carry_no_gradient() -> None:
    weights = spec(norm_after_ff=nn.LayerNorm(WIDTH), gate=nn.Linear(WIDTH, FF)).weights(torch.float64)
    tensors = dict(weights.tensors())
    names = {"value", "out", "up", "gate", "down", "norm_after_ff"}
    assert set(tensors) == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert all(tensor.dtype == torch.float64 and not tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes(name: str) -> None:
    weights = resolve(build(name)).layers[0].weights(torch.float32)
    llama = weights.branches[0].gate is not None
    heads = 6 if llama else 4 if name in ("torch-even-heads", "torch-layer") else 5
    head_dim = 10 if name == "llama-bias" else (48 if llama else 40) // heads
    assert (weights.width, weights.branches[0].width) == ((48, 76) if llama else (40, 52))
    assert (weights.heads, weights.head_dim) == (heads, head_dim)


@pytest.mark.parametrize(
    ("norms", "scopes"),
    [
        ((), ("atb", "atb_ff", "atb_ff_res")),
        (("norm_before_attn",), ("atb", "atb_ff", "atb_ff_res")),
        (("norm_before_attn", "norm_before_ff"), ("atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res")),
        (("norm_after_attn", "norm_after_ff"), ("attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln")),
        (("norm_before_ff", "norm_after_ff"), ("atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res", "atb_ln_ff_res_ln")),
    ],
)
def test_scopes_follow_the_norms(norms: tuple[str, ...], scopes: tuple[str, ...]) -> None:
    layer = spec(**{name: nn.LayerNorm(WIDTH) for name in norms})
    assert layer.scopes == ("attn_heads", "attn", *scopes)
    assert layer.weights(torch.float32).scopes == layer.scopes


def test_a_network_beside_the_experts_is_the_second_branch() -> None:
    (spec,) = resolve(build("qwen2-moe")).layers[1:]
    experts, shared = spec.weights(torch.float32).branches
    assert (experts.routed, shared.routed) == (True, False)
    assert (experts.weighed, shared.weighed) == (False, True)
    assert (experts.width, shared.width) == (20, 28)
    assert (spec.active, spec.networks_per_token) == (2, 3)
    assert resolve(build("mixtral")).layers[0].networks_per_token == 2


def test_experts_and_the_network_beside_them_are_of_one_kind() -> None:
    (spec,) = resolve(build("granitemoe-shared")).layers[1:]
    assert spec.shared is not None
    dense = replace(spec, shared=replace(spec.shared, gate=None))
    with pytest.raises(UnsupportedModel, match="experts are gated and the network beside them is not"):
        dense.weights(torch.float32)


def test_a_latent_has_its_norm_among_those_that_round() -> None:
    (spec,) = resolve(build("deepseek-v3", dtype=torch.float32)).layers[1:]
    norms = dict.fromkeys(("norm_before_attn", "norm_before_ff"))
    assert replace(spec, **norms).rounds_to_float32
    assert not replace(spec, latent=None, **norms).rounds_to_float32
