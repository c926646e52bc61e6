"""The wide maps where most slopes are zero, as ReLU's are: neurons are skipped, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import OPERATORS, WIDE, batch, case, check, needs_binary
from torch import Tensor

from ffattr.ops import torch_kernels

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

SKIPPING = [
    pytest.param(OPERATORS.ff_norms, "ff_norms", marks=needs_binary, id="ff_norms"),
    pytest.param(OPERATORS.operator_norms, "operator_norms", marks=needs_binary, id="operator_norms"),
    pytest.param(torch_kernels.operator_norms, "operator_norms", id="operator_norms-torch"),
]


@pytest.fixture(autouse=True)
def expected_of_all_neurons(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Plain PyTorch is what others are compared with, and skips none itself, unless it is what is tested."""
    if "skips" not in request.node.name:
        monkeypatch.setattr(torch_kernels, "SPARSE", -1)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 0.49, 0.6])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 150), (7, 5), (13, 30)])
@pytest.mark.parametrize("operator", WIDE)
def test_against_all_neurons(operator: str, queries: int, keys: int, density: float) -> None:
    """Tiles of one to six queries; neurons of more than one block of depth."""
    for dtype, streams in ((torch.float32, 2), (torch.float64, 1)):
        check(operator, case(operator, queries, keys, 72, 500, 3, streams=streams, dtype=dtype, density=density))


@pytest.mark.parametrize("operator", WIDE)
def test_queries_of_different_density(operator: str) -> None:
    """None, few and all neurons, side by side."""
    given = case(operator, 9, 20, neurons=200, streams=2, density=0.2)
    given["slope"][:, 2] = 0
    given["slope"][:, 4] = 1
    given["slope"][0, 5] = 0  # of one stream alone: the other's neurons count
    given["slope"][1, 5] = torch.linspace(1, 2, 200)
    found = check(operator, given)
    assert (found[0, 2] == 0).all()
    assert (found[1, 2] != 0).all(), "the residual of a query without neurons"


@pytest.mark.parametrize("operator", WIDE)
def test_masks(operator: str) -> None:
    """Queries with fewer keys than their tile, and with none of them."""
    given = case(operator, 34, 34, heads=3, density=0.1)
    given["alpha"] = given["alpha"].tril() - given["alpha"].tril(-20)
    given["position"] = torch.arange(34)
    found = check(operator, given)
    assert torch.equal(found != 0, (torch.ones(34, 34).tril() - torch.ones(34, 34).tril(-20)).bool().expand_as(found))


@needs_binary
@pytest.mark.parametrize("operator", WIDE)
def test_several_sequences(operator: str) -> None:
    sizes = [(1, 1), (4, 33), (0, 7), (8, 30), (2, 0), (3, 40)]
    single, joined = batch(operator, sizes, neurons=200, streams=2, density=0.1)
    found = getattr(OPERATORS, operator)(*joined.values())
    for (start, _), (queries, keys), given in zip(joined["sequences"].tolist(), sizes, single, strict=False):
        assert torch.equal(found[:, start : start + queries, :keys], check(operator, given))


@pytest.mark.parametrize(("function", "operator"), SKIPPING)
def test_skips(function: Any, operator: str) -> None:
    """What belongs to a neuron without slope is not even read: NaN there is not seen."""
    given = case(operator, 7, 30, neurons=200, streams=2, density=0.05)
    given["position"] = torch.full((7,), -1)  # the query's own row is one for all its keys: plain PyTorch skips none
    idle = (given["slope"] == 0).all(1).all(0)
    assert 20 < idle.sum() < 180
    expected = function(*given.values())
    given["down"][idle] = torch.nan
    given["maps" if operator == "operator_norms" else "features"][..., idle] = torch.nan
    assert torch.equal(function(*given.values()), expected)


@pytest.mark.parametrize("name", ["slope", "alpha"])
@pytest.mark.parametrize("operator", WIDE)
def test_nan_is_not_zero(operator: str, name: str) -> None:
    given = case(operator, 7, 9, neurons=60, streams=2, density=0.1)
    given["position"] = torch.full((7,), -1)
    given[name][1, 3, 5] = torch.nan
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[3, slice(None) if name == "slope" else 5] = True
    found: Tensor = getattr(OPERATORS, operator)(*given.values())
    assert torch.equal(found.isnan(), expected.expand_as(found))
