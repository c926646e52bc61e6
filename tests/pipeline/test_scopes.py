"""Names of scopes that users give, taken apart once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from synthetic import POST_LN, PRE_LN
from tiny_models import build

from ffattr.models.registry import resolve
from ffattr.models.spec.layer import LayerSpec
from ffattr.pipeline.scopes import parse_scopes


@cache
def stacks(name: str) -> dict[str, tuple[LayerSpec, ...]]:
    description = resolve(build(name))
    ranges = description.stacks or {"": range(len(description.layers))}
    return {stack: tuple(description.layers[index] for index in numbers) for stack, numbers in ranges.items()}


def parsed(asked: Any, name: str) -> dict[str, list[str]]:
    return {stack: [str(scope) for scope in scopes] for stack, scopes in parse_scopes(asked, stacks(name)).items()}


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("bert", "all", list(POST_LN)),
        ("gpt2", "all", list(PRE_LN)),
        ("bert", "layer", ["atb_ff_res_ln"]),
        ("gpt2", "layer", ["atb_ln_ff_res"]),
        ("bert", "atb", ["atb"]),
        ("bert", ["layer", "attn", "atb_ff_res_ln"], ["attn", "atb_ff_res_ln"]),  # once, and as in the layer
        ("bert", ("all", "atb"), list(POST_LN)),
    ],
)
def test_one_stack(name: str, asked: Any, expected: list[str]) -> None:
    assert parsed(asked, name) == {"": expected}


def test_a_scope_per_expert_has_to_be_named() -> None:
    assert "atb_ln_ff_experts" not in parsed("all", "mixtral")[""]
    assert parsed("atb_ln_ff_experts", "mixtral") == {"": ["atb_ln_ff_experts"]}
    assert parsed(["all", "atb_ln_ff_experts"], "mixtral")[""][-1] == "atb_ln_ff_experts"
    (found,) = parse_scopes("atb_ln_ff_experts", stacks("mixtral"))[""]
    assert found.axis == "expert"
    with pytest.raises(ValueError, match=r"has: attn_heads, .*, atb_ln_ff_experts .*'all' for all but atb_ln_ff_exp"):
        parsed("experts", "mixtral")
    with pytest.raises(ValueError, match="unknown scope 'atb_ff_experts'"):
        parsed("atb_ff_experts", "bert")


def test_a_name_without_its_place_is_meant_everywhere() -> None:
    assert parsed("layer", "bart") == {
        "encoder": ["atb_ff_res_ln"],
        "decoder": ["atb_ff_res_ln", "cross.atb_ff_res_ln"],
    }
    whole = parsed("all", "bart")
    assert whole["encoder"] == list(POST_LN)
    assert whole["decoder"] == [*POST_LN, *(f"cross.{scope}" for scope in POST_LN)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("encoder.layer", {"encoder": ["atb_ff_res_ln"]}),
        ("cross.atb", {"decoder": ["cross.atb"]}),
        (["cross.atb", "decoder.attn"], {"decoder": ["attn", "cross.atb"]}),
        (["decoder.layer", "encoder.attn"], {"encoder": ["attn"], "decoder": ["atb_ff_res_ln"]}),
    ],
)
def test_a_place_before_a_name(asked: Any, expected: dict[str, list[str]]) -> None:
    assert parsed(asked, "bart") == expected


@pytest.mark.parametrize("asked", ["encoders.atb", "cross.", ".cross", "cross.atb_ln", "encoder.cross.atb", "", "ATB"])
def test_unknown_names_are_answered_with_the_known_ones(asked: str) -> None:
    expected = rf"^unknown scope '{asked}'; this .* encoder: attn_heads, .*; decoder: .*; cross: attn_heads, .*'layer'"
    with pytest.raises(ValueError, match=expected):
        parsed(["layer", asked], "bart")


@pytest.mark.parametrize("asked", [3, None, ["atb", None], {"atb": 1}])
def test_what_is_no_name(asked: Any) -> None:
    with pytest.raises(TypeError, match=r"scopes is .*, expected a scope's name or a sequence of names"):
        parsed(asked, "bert")


def test_no_names() -> None:
    with pytest.raises(ValueError, match=r"no scope given; this architecture has: attn_heads, .*'all' for all\)$"):
        parsed([], "bert")
    with pytest.raises(ValueError, match=r"unknown scope 'cross\.atb'"):
        parsed("cross.atb", "bert")
