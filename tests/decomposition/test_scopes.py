"""The names of a layer's points, by which norms and attentions it has."""

from __future__ import annotations

import pytest
from random_layers import layer

from ffattr.decomposition.scopes import Scope

NAMES = {
    "pre": ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res"),
    "post": ("attn_heads", "attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"),
    "of": ("attn_heads", "attn", "atb", "atb_ff", "atb_ff_res"),  # norms of what blocks return are no points
}


@pytest.mark.parametrize("norms", NAMES)
def test_scopes_of_a_layer_are_in_its_order(norms: str) -> None:
    assert layer(norms=norms).weights.scopes == NAMES[norms]


def test_cross_attention_has_every_scope_once_more() -> None:
    weights = layer(norms="post", decoder=True).weights
    assert weights.scopes == (*NAMES["post"], *(f"cross.{name}" for name in NAMES["post"]))
    assert [scope.source for scope in weights.all_scopes] == ["own"] * 7 + ["cross"] * 7
    assert [scope.name for scope in weights.all_scopes] == [*NAMES["post"]] * 2
    assert {scope.source for scope in weights.own_scopes} == {"own"}


def test_wide_work_is_behind_the_feed_forward_block() -> None:
    weights = layer(norms="post").weights
    assert [str(scope) for scope in weights.pairwise_scopes] == ["atb_ff", "atb_ff_res", "atb_ff_res_ln"]
    assert [scope.needs_ff for scope in weights.own_scopes] == [False] * 4 + [True] * 3
    assert layer(norms="pre", parallel=True).weights.pairwise_scopes == ()


def test_scopes_are_picked_in_order_whatever_the_names_are_in() -> None:
    weights = layer(norms="pre", experts=3, decoder=True).weights
    names = ["cross.atb_ln_ff_experts", "atb_ln_ff_experts", "cross.atb", "attn", "unheard of"]
    assert [str(scope) for scope in weights.pick_scopes(names)] == [
        *("attn", "cross.atb", "atb_ln_ff_experts", "cross.atb_ln_ff_experts")
    ]
    alone = layer(norms="pre").weights
    assert [str(scope) for scope in alone.pick_scopes(names)] == ["attn", "atb_ln_ff_experts"]


def test_the_scope_at_a_point_is_summed() -> None:
    weights = layer(norms="post", decoder=True).weights
    assert weights.scope_at("attn") == Scope("attn", "attn")
    assert str(weights.scope_at("ff_res", "cross")) == "cross.atb_ff_res"
    with pytest.raises(KeyError, match="ff_input"):
        weights.scope_at("ff_input")
    with pytest.raises(KeyError, match="attn_res"):
        layer(norms="pre").weights.scope_at("attn_res")


def test_a_scope_seen_from_its_own_source_is_itself() -> None:
    scope = Scope("atb", "atb")
    assert scope.seen_from("own") is scope
    assert scope.seen_from("cross") == Scope("atb", "atb", "cross")
    assert scope.seen_from("cross").seen_from("own") == scope
