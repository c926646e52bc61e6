"""Decoders whose family depends on a setting of the configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ffattr.errors import UnsupportedModel
from ffattr.models.families.decoders import DECODERS
from ffattr.models.families.schema import Family, Fused


def choose(name: str, **settings: Any) -> Family:
    family = DECODERS[name]
    assert callable(family)
    return family(SimpleNamespace(**settings))


def test_norms_of_opt() -> None:
    before, after = (choose("opt", do_layer_norm_before=order) for order in (True, False))
    assert (before.norm_before_attn, before.norm_after_attn) == ("self_attn_layer_norm", None)
    assert (after.norm_before_attn, after.norm_after_attn) == (None, "self_attn_layer_norm")


@pytest.mark.parametrize("name", ["gpt_neox", "stablelm"])
@pytest.mark.parametrize("parallel", [False, True])
def test_parallel_blocks(name: str, parallel: bool) -> None:
    assert choose(name, use_parallel_residual=parallel, num_attention_heads=4).parallel == parallel


def test_values_of_fused_projections() -> None:
    phi3 = choose("phi3", num_attention_heads=6, num_key_value_heads=2)
    assert phi3.value == Fused("self_attn.qkv_proj", index=4, count=5)  # three parts of queries, one of keys
    shared = choose("gpt_bigcode", num_attention_heads=6, multi_query=True)
    assert (shared.value, shared.kv_heads) == (Fused("attn.c_attn", index=7, count=8), 1)
    own = choose("gpt_bigcode", num_attention_heads=6, multi_query=False)
    assert (own.value, own.kv_heads) == (Fused("attn.c_attn", index=2, count=3, groups=6), None)


def test_values_of_olmo_that_are_clipped() -> None:
    assert choose("olmo", clip_qkv=None).norm_before_ff == "post_attention_layernorm"
    with pytest.raises(UnsupportedModel, match=r"values are clipped \(config.clip_qkv is 8.0\)"):
        choose("olmo", clip_qkv=8.0)
