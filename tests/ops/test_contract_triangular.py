"""The wide maps with a down matrix that is zero right of its diagonal: products are left out, and nothing changes."""

from __future__ import annotations

import pytest
import torch
from op_cases import OPERATORS, WIDE, batch, case, check, make_triangular, narrow, needs_binary

from ffattr.ops import availability, torch_kernels

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

FAR = 700
"""A column so far from the first row that every kernel leaves it out."""


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize(("width", "neurons"), [(1, 1), (40, 56), (56, 40), (257, 1), (72, 500), (400, 900), (500, 3)])
@pytest.mark.parametrize("operator", WIDE)
def test_against_all_products(operator: str, width: int, neurons: int, density: float) -> None:
    """Fewer neurons than columns and more of them, in one block of depth or several, all or few with a slope."""
    for dtype, streams in ((torch.float32, 2), (torch.float64, 1)):
        given = case(operator, 9, 20, width, neurons, 3, streams=streams, dtype=dtype, density=density)
        check(operator, make_triangular(given))


@pytest.mark.parametrize("operator", WIDE)
def test_plain_pytorch_gives_the_same(operator: str) -> None:
    given = make_triangular(case(operator, 9, 20, 300, 500, 3, streams=2, dtype=torch.float64))
    kernel = getattr(torch_kernels, operator)
    torch.testing.assert_close(kernel(*given.values()), kernel(*list(given.values())[:-1]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("operator", WIDE)
def test_several_sequences(operator: str) -> None:
    _, joined = batch(operator, [(3, 33), (0, 7), (5, 5), (2, 0)], width=72, neurons=200, heads=2)
    joined["alpha"] = joined["alpha"].nan_to_num(0)
    check(operator, make_triangular(joined))


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        pytest.param(OPERATORS.ff_norms, "ff_norms", marks=needs_binary, id="ff_norms"),
        pytest.param(OPERATORS.operator_norms, "operator_norms", marks=needs_binary, id="operator_norms"),
        pytest.param(torch_kernels.ff_norms, "ff_norms", id="ff_norms-torch"),
    ],
)
def test_products_are_left_out(kernel: object, operator: str, density: float, wide: torch.dtype) -> None:
    """A number that has no business there is not read."""
    given = make_triangular(case(operator, 5, 20, FAR + 4, FAR + 300, 3, density=density))
    given = given if wide == torch.float32 else narrow(given, ("down",))
    if wide != torch.float32 and (
        kernel is torch_kernels.ff_norms or not availability.describe_product("cpu", torch.bfloat16)
    ):
        pytest.skip("no product of bfloat16 numbers beside float32 ones")
    found = kernel(*given.values())  # type: ignore[operator]
    given["down"][0, FAR] = 1e6
    assert torch.equal(kernel(*given.values()), found)  # type: ignore[operator]
