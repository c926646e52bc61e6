"""The operands of feed-forward maps that all packs of a layer share."""

from __future__ import annotations

import pytest
import random_layers
import torch
from random_layers import NEURONS, WIDTH, RandomLayer

from ffattr.engine.ff_operands import FFOperands
from ffattr.engine.key_tokens import attention_paths
from ffattr.ops.backends import BACKENDS


def operands(layer: RandomLayer, dtype: torch.dtype = torch.float64, backend: str = "torch") -> FFOperands:
    return FFOperands(layer.weights, list(attention_paths(layer.weights)), BACKENDS[backend], dtype)


def test_exact_norms_are_left_out_where_all_scopes_wanted_are_projected() -> None:
    layer = random_layers.layer(norms="post")
    ff, projection = operands(layer), torch.eye(WIDTH, 3, dtype=torch.float64)
    first, second, last = layer.weights.pairwise_scopes
    ff.set_projections({first: projection, last: projection}, [first, last])
    assert [target.scopes for target in ff.targets] == [(first,), (last,)]
    assert [target.first for target in ff.targets] == [0, 1]  # without and with the residual
    assert [len(down[0].T) for down in ff.down] == [3, 3]
    before = ff.down
    ff.set_projections({}, [first, second])
    assert [target.scopes for target in ff.targets] == [(first, second, last)]
    assert ff.down is not before
    kept = ff.down
    ff.set_projections({}, [last])  # nothing has changed
    assert ff.down is kept


def test_a_set_of_experts_is_prepared_once() -> None:
    layer = random_layers.layer(experts=4)
    ff = operands(layer)
    ff.load_experts((1, 3))
    maps, (branch,) = ff.maps, layer.weights.branches
    assert torch.equal(ff.down[0][0], torch.cat([branch.down.weight[1], branch.down.weight[3]]))
    assert [part.shape for part in ff.projections] == [(WIDTH, 2 * NEURONS)] * 2
    ff.load_experts((1, 3))
    assert ff.maps is maps
    ff.load_experts((0, 3))
    assert ff.maps is not maps


def test_scratch_memory_is_the_same_until_it_is_given_back() -> None:
    ff = operands(random_layers.layer())
    first = ff.scratch("features", 10)
    assert len(first) >= 10
    assert ff.scratch("features", 7) is first
    assert ff.scratch("residual 0", 7) is not first
    longer = ff.scratch("features", 11)
    assert len(longer) >= 11
    ff.free_scratch()
    assert ff.scratch("features", 11) is not longer


@pytest.mark.parametrize(
    ("backend", "asked", "operand", "scaled"),
    [
        ("torch", torch.float64, torch.float64, False),
        ("torch", torch.bfloat16, torch.bfloat16, False),
        ("torch", torch.float8_e4m3fn, torch.bfloat16, True),
        ("cpu", torch.float64, torch.float64, False),
        ("cpu", torch.bfloat16, torch.float32, False),
    ],
)
def test_operands_have_the_dtype_of_the_products(
    backend: str, asked: torch.dtype, operand: torch.dtype, scaled: bool
) -> None:
    """By the C++ kernels the down matrix alone is rounded before it is packed."""
    layer = random_layers.layer(norms="of")
    ff = operands(layer, asked, backend)
    assert {part.dtype for part in (*ff.projections, *ff.maps)} == {operand}
    ((down, scale),) = ff.down
    assert down.dtype == asked
    norm = layer.weights.norm_of_ff
    assert norm is not None
    expected = norm.linear(layer.weights.branches[0].down.weight)
    assert (scale is not None) == scaled
    stands_for = down.double() if scale is None else down.double() * scale.double()
    torch.testing.assert_close(stands_for, expected, rtol=0.07 if scaled else 0.01, atol=1e-2 if scaled else 0)
