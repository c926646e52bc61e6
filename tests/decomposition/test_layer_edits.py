"""Constants as biases of the parts that they are added to."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build

from ffattr.decomposition.layer import add_constants
from ffattr.models.registry import resolve


def test_constants_on_every_kind_of_part() -> None:
    weights = resolve(build("gpt2")).layers[0].weights(None)
    width, neurons = weights.width, weights.branches[0].width
    one = torch.ones(width, dtype=torch.float64)
    found = add_constants(weights, {"out": one, "norm_before_ff": 2 * one, "activation": torch.ones(neurons)})
    assert weights.out.bias is not None
    assert found.out.bias is not None
    torch.testing.assert_close(found.out.bias, weights.out.bias + 1)
    assert weights.norm_before_ff is not None
    assert found.norm_before_ff is not None
    torch.testing.assert_close(found.norm_before_ff.bias, weights.norm_before_ff.bias + 2)
    down = weights.branches[0].down
    torch.testing.assert_close(found.branches[0].down.bias, down.bias + down.weight.sum(0))
    assert found.value is weights.value
    assert add_constants(weights, {}) is weights


def test_parts_without_a_bias_and_of_cross_attention() -> None:
    weights = resolve(build("t5")).layers[-1].weights(None)
    assert weights.cross is not None
    assert weights.cross.out.bias is None
    found = add_constants(weights, {"cross.out": torch.ones(weights.width)})
    assert found.cross is not None
    assert found.cross.out.bias is not None
    assert found.cross.out.bias.dtype == torch.float64
    assert found.cross.value is weights.cross.value


def test_a_constant_that_is_multiplied() -> None:
    weights = resolve(build("llama")).layers[0].weights(None)
    with pytest.raises(ValueError, match="added to a gate"):
        add_constants(weights, {"activation": torch.ones(weights.branches[0].width)})
