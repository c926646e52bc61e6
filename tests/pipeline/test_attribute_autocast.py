"""Under autocast: the map of what the model computed there, by the engine in the dtypes of its operands."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build

import ffattr

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 2**-8  # of bfloat16, relative


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral", "deepseek-v3"])
def test_maps_are_those_of_float32_but_for_rounding(name: str) -> None:
    model, given = build(name, dtype=torch.float32), tiny_models.inputs(name)
    expected = ffattr.attribute(model, given, scopes="all")
    ways: list[dict[str, Any]] = [
        {"backend": "torch"},
        {"backend": "cpu", "method": "operator"},
        {"backend": "reference"},
    ]
    for options in ways:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ffattr.attribute(model, given, scopes="all", **options)
        assert 1e-4 < found.error.max() < 16 * ROUNDING  # a sum of some roundings
        for scope, tile in expected.maps.items():
            assert found[scope].dtype == torch.float32
            assert (found[scope] - tile).norm() < 8 * ROUNDING * tile.norm(), scope


def test_vectors_add_up() -> None:
    model, given = build("llama", dtype=torch.float32), tiny_models.inputs("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ffattr.vectors(model, given, scope="layer")
    torch.testing.assert_close(found.values.sum(-2) + found.bias, found.total, rtol=1e-4, atol=1e-4)


def test_a_wrong_description_is_still_noticed() -> None:
    model, given = build("llama", dtype=torch.float32), tiny_models.inputs("llama")
    layer = model.layers[1]
    run = layer.forward  # a hook would be taken for the user's own
    layer.forward = lambda *args, **kwargs: run(*args, **kwargs) * 1.5
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ffattr.ArchitectureMismatch):
        ffattr.attribute(model, given)
