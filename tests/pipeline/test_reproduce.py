"""How closely each layer of a model follows from its description."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from recording import state
from synthetic import POST_LN
from tiny_models import build, inputs
from torch import nn

import ffattr
from ffattr.errors import ArchitectureMismatch
from ffattr.models import huggingface, registry
from ffattr.pipeline.reproduce import Reproduced, reproduce

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["gemma2", "bart"])
def test_reproduce_is_what_attribute_checks(name: str) -> None:
    model, given = build(name), inputs(name, padding="right")
    before = state(model)
    found = reproduce(model, given)
    assert state(model) == before
    attr = ffattr.attribute(model, given, backend="torch")
    own = attr.stacks if isinstance(attr, ffattr.StackedAttribution) else {"": attr}
    expected = [(stack, layer) for stack in own if stack != "cross" for layer in own[stack].layers]
    assert [(layer.stack, layer.layer) for layer in found.layers] == expected
    for layer in found.layers:
        error = float(own[layer.stack].error[layer.layer].max())
        assert layer.error == pytest.approx(error, rel=1e-3, abs=1e-15)
        assert layer.tolerance == (1e-6 if name == "gemma2" else 1e-9)


def test_what_does_not_pass_is_what_attribute_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(base: nn.Module) -> list[Any]:
        layers = huggingface.describe_pretrained(base, "gpt2").layers
        return [layers[0], replace(layers[1], norm_before_ff=layers[0].norm_before_ff)]

    monkeypatch.setattr(registry, "_registered", {"gpt2": (wrong, True)})
    found = reproduce(build("gpt2"), inputs("gpt2"))
    assert [layer.passed for layer in found.layers] == [True, False]
    assert not replace(found.layers[0], error=float("nan")).passed
    with pytest.raises(ArchitectureMismatch, match="layer 1, batch row 0"):
        ffattr.attribute(build("gpt2"), inputs("gpt2"))


def test_the_largest_error_of_all_layers() -> None:
    found = reproduce(build("bert"), inputs("bert"))
    assert found.family == "bert"
    assert [layer.scopes for layer in found.layers] == [POST_LN] * 2
    assert found.error == max(layer.error for layer in found.layers) < 1e-14
    first, second = found.layers
    assert replace(found, layers=(first, replace(second, error=0.5))).error == 0.5


def test_scopes_per_expert_are_those_of_layers_with_experts() -> None:
    found = reproduce(build("qwen3-moe-mixed"), inputs("qwen3-moe-mixed"))
    experts = ["atb_ln_ff_experts" in layer.scopes for layer in found.layers]
    assert sorted(experts) == [False, True]


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (1e-9, True), (1.01e-9, False), (float("nan"), False)])
def test_an_error_up_to_the_tolerance_passes(error: float, passed: bool) -> None:
    assert Reproduced("", 0, (), error, 1e-9).passed == passed
