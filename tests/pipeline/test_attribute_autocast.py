"""Under autocast: the map of what the model computed there, by the engine in the dtypes of its operands."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from own_modules import Attention, mine
from tiny_models import build
from torch import Tensor

import ffattr

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative
DTYPES = tuple(ROUNDING)


def inputs(name: str) -> dict[str, Tensor]:
    found = tiny_models.inputs(name)
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "llama", "mixtral", "deepseek-v3", "bart", "vit"])
def test_maps_are_those_of_float32_but_for_rounding(name: str, dtype: torch.dtype) -> None:
    model, given = build(name, dtype=torch.float32), inputs(name)
    expected = ffattr.attribute(model, given, scopes="all")
    ways: list[dict[str, Any]] = [
        {"backend": "torch"},
        {"backend": "cpu", "method": "operator"},
        {"backend": "reference"},
    ]
    for options in ways:
        with torch.autocast("cpu", dtype=dtype):
            found = ffattr.attribute(model, given, scopes="all", **options)
        assert ROUNDING[dtype] / 32 < found.error.max() < 16 * ROUNDING[dtype]  # a sum of some roundings
        for scope, tile in expected.maps.items():
            assert found[scope].dtype == torch.float32
            assert (found[scope] - tile).norm() < 8 * ROUNDING[dtype] * tile.norm(), scope


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_vectors_add_up(name: str, dtype: torch.dtype) -> None:
    """As in float32: they are computed in it, and their total with them."""
    model, given = build(name, dtype=torch.float32), inputs(name)
    with torch.autocast("cpu", dtype=dtype):
        found = ffattr.vectors(model, given, scope="layer")
    expected = ffattr.vectors(model, given, scope="layer")
    assert (found.values.sum(-2) + found.bias - found.total).norm() < 1e-6 * found.total.norm()
    assert (found.values - expected.values).norm() < 8 * ROUNDING[dtype] * expected.values.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "head"), [("gpt2", "LMHeadModel"), ("llama", "ForCausalLM")])
def test_contributions_are_those_of_float32_but_for_rounding(name: str, head: str, dtype: torch.dtype) -> None:
    model, given = build(name, dtype=torch.float32, head=head), inputs(name)
    for target in (3, 7, 11):
        expected = ffattr.contributions(model, given, target=target)
        with torch.autocast("cpu", dtype=dtype):
            found = ffattr.contributions(model, given, target=target)
        assert (found.scores - expected.scores).norm() < 16 * ROUNDING[dtype] * expected.scores.norm()  # of all layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_softmax", [True, False])
def test_a_model_that_nothing_knows(own_softmax: bool, dtype: torch.dtype) -> None:
    """Its structure is searched without autocast, and its maps are of what ran with it."""
    model, ids = mine(attention=lambda: Attention(own_softmax=own_softmax)).float(), tiny_models.ids() % 50
    with torch.autocast("cpu", dtype=dtype):
        found = ffattr.attribute(model, ids, scopes="all")
    for scope, tile in ffattr.attribute(model, ids, scopes="all").maps.items():
        assert (found[scope] - tile).norm() < 8 * ROUNDING[dtype] * tile.norm(), scope


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_in_a_part_of_the_layer_alone(part: str, dtype: torch.dtype) -> None:
    """The dtype that projections return says how they round; where none does so, nothing is tolerated."""
    model, given = build("llama", dtype=torch.float32), inputs("llama")
    expected = ffattr.attribute(model, given)
    for layer in model.layers:
        module = getattr(layer, part)
        module.forward = torch.autocast("cpu", dtype=dtype)(module.forward)
    found = ffattr.attribute(model, given)
    assert (found["layer"] - expected["layer"]).norm() < 8 * ROUNDING[dtype] * expected["layer"].norm()
    run = model.layers[1].mlp.forward
    model.layers[1].mlp.forward = lambda x: run(x) * 1.5
    with pytest.raises(ffattr.ArchitectureMismatch):
        ffattr.attribute(model, given)


def test_a_wrong_description_is_still_noticed() -> None:
    model, given = build("llama", dtype=torch.float32), tiny_models.inputs("llama")
    layer = model.layers[1]
    run = layer.forward  # a hook would be taken for the user's own
    layer.forward = lambda *args, **kwargs: run(*args, **kwargs) * 1.5
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ffattr.ArchitectureMismatch):
        ffattr.attribute(model, given)
