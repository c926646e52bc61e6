"""Rows of tokens of one run: which of its calls are projections and norms, and what is equal to what."""

from __future__ import annotations

import pytest
import torch
from own_modules import HiddenEps, mine
from torch import nn

from ffattr.models.detection.observe import observe_layers
from ffattr.models.detection.rows import LayerRows

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(model: nn.Module) -> LayerRows:
    return LayerRows(observe_layers(model).runs[-1])


def test_calls_are_sorted_into_projections_and_norms() -> None:
    for norm in (nn.LayerNorm, HiddenEps):
        rows = rows_of(mine(norm=norm))
        assert {call.path for call in rows.norms} == {"norm1", "norm2"}
        assert {call.path for call in rows.linears} == {"attention.qkv", "attention.out", "ff.both", "ff.down"}


def test_differences_are_relative_and_of_rows_that_attend() -> None:
    rows = rows_of(mine())
    assert rows.measure_error(rows.x * 1.5, rows.x) == pytest.approx(0.5)
    assert rows.measure_error(rows.x[:, :3], rows.x) == float("inf")
    spoiled = rows.x.clone()
    spoiled[3] = torch.nan
    assert not rows.are_equal(spoiled, rows.x)
    rows.kept[0, 3] = False
    assert rows.are_equal(spoiled, rows.x)


def test_numbers_that_something_may_be_multiplied_by() -> None:
    model = mine()
    for block in model.blocks:
        block.ff.out_multiplier, block.ff.eps, block.scale = 0.25, 1e-5, 1.0
    assert rows_of(model).numbers == [("ff.out_multiplier", 0.25)]
