"""Edits of every kind of part, against the parts as they are with what they read and return edited by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor

from ffattr.decomposition.layer import Edit, edit_weights
from ffattr.models.registry import resolve


def vector(width: int, seed: int = 0) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("part", ["value", "out", "up", "down", "norm_before_ff"])
@pytest.mark.parametrize("factor", [False, True])
def test_what_a_part_returns(part: str, factor: bool) -> None:
    weights = resolve(build("gpt2")).layers[0].weights(None)

    def find(owner: Any) -> Any:
        return getattr(owner if hasattr(owner, part) else owner.branches[0], part)

    before = find(weights)
    width = before.weight.shape[-1]
    by, constant = vector(width), vector(width, 1)
    after = find(edit_weights(weights, [Edit(part, constant, by if factor else None)]))
    x = torch.stack([vector(before.weight.shape[0], seed) for seed in (2, 3)])
    torch.testing.assert_close(after(x), before(x) * (by if factor else 1) + constant)


@pytest.mark.parametrize("part", ["out", "down", "activation"])
def test_what_a_part_reads(part: str) -> None:
    """What an activation returns, the next projection reads."""
    weights = resolve(build("gpt2")).layers[0].weights(None)
    before = weights.out if part == "out" else weights.branches[0].down
    by, constant = vector(len(before.weight)), vector(len(before.weight), 1)
    edited = edit_weights(weights, [Edit(part, constant, by, reads=part != "activation")])
    after = edited.out if part == "out" else edited.branches[0].down
    x = vector(len(before.weight), 2)
    torch.testing.assert_close(after(x), before(x * by + constant))


def test_parts_without_a_bias_and_of_cross_attention() -> None:
    weights = resolve(build("t5")).layers[-1].weights(None)
    assert weights.cross is not None
    assert weights.cross.out.bias is None
    found = edit_weights(weights, [Edit("cross.out", torch.ones(weights.width))])
    assert found.cross is not None
    assert found.cross.out.bias is not None
    assert found.cross.out.bias.dtype == torch.float64
    assert found.cross.value is weights.cross.value
    assert edit_weights(weights, []) is weights


def test_one_after_the_other() -> None:
    weights = resolve(build("gpt2")).layers[0].weights(None)
    one, two = vector(weights.width), vector(weights.width, 1)
    found = edit_weights(weights, [Edit("out", one), Edit("out", two, 2 * torch.ones_like(two))])
    assert found.out.bias is not None
    assert weights.out.bias is not None
    torch.testing.assert_close(found.out.bias, 2 * (weights.out.bias + one) + two)


def test_a_constant_that_is_multiplied() -> None:
    weights = resolve(build("llama")).layers[0].weights(None)
    none = torch.zeros(weights.branches[0].width)
    with pytest.raises(ValueError, match="added to a gate"):
        edit_weights(weights, [Edit("activation", none + 1)])
    found = edit_weights(weights, [Edit("activation", none, none)])
    assert not found.branches[0].down.weight.any()
