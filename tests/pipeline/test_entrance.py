"""Weights that are NaN or infinite are named, whatever they make fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import nn

import ffattr
from ffattr.pipeline.entrance import name_broken_weights

Compute = Callable[[nn.Module, Any], Any]

COMPUTE: dict[str, Compute] = {
    "attribute": lambda model, given: ffattr.attribute(model, given),
    "vectors": lambda model, given: ffattr.vectors(model, given),
    "contributions": lambda model, given: ffattr.contributions(model, given, target=3),
}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE)
def test_a_broken_weight_is_named(name: str, value: float, compute: Compute) -> None:
    model, given = build("llama", head="ForCausalLM"), tiny_models.inputs("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[7] = value
    if name == "model.embed_tokens.weight":  # whose row 0 these inputs may not read
        with torch.no_grad():
            model.get_parameter(name)[given["input_ids"][0, 0]] = value
    with pytest.raises(ffattr.NonFiniteError, match=rf"NaN or infinite entries: [^(]*{name}"):
        compute(model, given)


def test_few_names_are_listed_and_the_error_that_they_caused() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))

    @name_broken_weights
    def fail(model: nn.Module) -> None:
        """Fails."""
        raise ffattr.UnsupportedModel("it is unknown")

    names = r"0\.weight, 0\.bias, 1\.weight, 1\.bias, 2\.weight, \.\.\.\. Load or repair"
    with pytest.raises(ffattr.NonFiniteError, match=rf"{names} them first\. \(it is unknown\)") as caught:
        fail(model)
    assert isinstance(caught.value.__cause__, ffattr.UnsupportedModel)
    assert fail.__doc__ == "Fails."
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ffattr.UnsupportedModel, match=r"^it is unknown$"):
        fail(model)
