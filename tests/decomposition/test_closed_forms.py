"""Path integrals by formula against quadrature, known numbers, and the relations that they keep."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ffattr.decomposition import closed_forms as forms

POINTS = [0.0, 1e-8, 0.3, 0.999, 1.001, 2.5, 6.99, 7.01, 20.0, 300.0]
POINTS += [-x for x in POINTS[1:]]
GATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (forms.gelu_moment, lambda z: torch.erfc(-z / math.sqrt(2)) / 2),
    "silu": (forms.silu_moment, torch.sigmoid),
    "gelu_tanh": (
        forms.gelu_tanh_moment,
        lambda z: (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    ),
}


def panels(f: Callable[[Tensor], Tensor], end: float) -> float:
    """``integral_0^end f(t) dt`` by Simpson's rule on panels short enough for every gate."""
    t = torch.linspace(0, end, 2 * 20_000 + 1, dtype=torch.float64)
    y = f(t)
    return float((y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum()) * end / 120_000)


@pytest.mark.parametrize("name", GATES)
def test_moments_are_integrals_of_their_gates(name: str) -> None:
    moment, gate = GATES[name]
    found = moment(torch.tensor(POINTS, dtype=torch.float64))
    expected = [0.25 if u == 0 else panels(lambda t: t * gate(t), u) / u**2 for u in POINTS]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GATES)
def test_moments_of_opposite_numbers_add_up_to_a_half(name: str, dtype: torch.dtype) -> None:
    moment, _ = GATES[name]
    u = torch.tensor(POINTS, dtype=dtype)
    total = moment(u) + moment(-u)
    torch.testing.assert_close(total, torch.full_like(u, 0.5), rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_gauss_legendre_of_few_nodes() -> None:
    assert [part.tolist() for part in forms.gauss_legendre(1)] == [[0.5], [1.0]]
    points, weights = forms.gauss_legendre(2)
    assert points.tolist() == pytest.approx([0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12)], abs=1e-15)
    assert weights.tolist() == pytest.approx([0.5, 0.5], abs=1e-15)
    points, weights = forms.gauss_legendre(3)
    assert points.tolist() == pytest.approx([0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15)], abs=1e-15)
    assert weights.tolist() == pytest.approx([5 / 18, 8 / 18, 5 / 18], abs=1e-15)


def test_the_share_of_a_path_that_is_positive() -> None:
    z = torch.tensor([3.0, -1.0, 2.0, -2.0, 0.0, 4.0, math.nan])
    b = torch.tensor([-1.0, 3.0, 2.0, -2.0, 0.0, 1.0, 1.0])
    found = forms.relu_rise(z, b)
    assert found[:-1].tolist() == [0.75, 0.75, 1.0, 0.0, 0.0, 1.0]
    assert found[-1].isnan()


def test_paths_through_relu_by_hand() -> None:
    """Gate from -1 to 1 beside up from 2 to 4: positive on the second half, where up goes from 3 to 4."""
    ends = [torch.tensor([x], dtype=torch.float64) for x in (1.0, 4.0, -1.0, 2.0)]
    c_u, c_v = forms.relu_path(*ends)
    assert (c_u.item(), c_v.item()) == pytest.approx((0.5 * 3.5, 0.5 * 0.5))
    c_u, c_v = forms.relu2_path(*ends)  # 2 t (3 + t) over t = 0..1, halved; t^2, halved
    assert (c_u.item(), c_v.item()) == pytest.approx(((3 + 2 / 3) / 2, 1 / 6))
    for path in (forms.relu_path, forms.relu2_path):  # no positive part: the crossing is at infinity
        gone = path(*(torch.tensor([x]) for x in (-2.0, 1.0, -2.0, 0.0)))
        assert [part.item() for part in gone] == [0.0, 0.0]


def test_tanh_where_plain_formulas_cancel_or_overflow() -> None:
    z = torch.tensor([1e-9, 1e-3, 2.0, 20.0, 400.0], dtype=torch.float64)
    x = z.tolist()
    squared = [1 / math.cosh(v) ** 2 for v in x[:4]] + [4 * math.exp(-800)]
    torch.testing.assert_close(forms.tanh_derivative(z), torch.tensor(squared, dtype=torch.float64), rtol=1e-13, atol=0)
    logs = [
        x[0] ** 2 / 2,
        x[1] ** 2 / 2 - x[1] ** 4 / 12,
        math.log(math.cosh(2.0)),
        20 - math.log(2),
        400 - math.log(2),
    ]
    torch.testing.assert_close(forms.log_cosh(z), torch.tensor(logs, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(forms.log_cosh(-z), forms.log_cosh(z), rtol=0, atol=0)
    assert forms.tanh_slope(torch.zeros(1)).item() == 1
    assert [part.item() for part in forms.tanh_gated(torch.zeros(1))] == [0.0, 0.5]


def test_huge_arguments_do_not_overflow() -> None:
    z = torch.tensor([1e30, -1e30])
    assert forms.gelu_tanh_slope(z).tolist() == [1.0, 0.0]
    assert forms.gelu_tanh_slope_derivative(z).tolist() == [0.0, 0.0]
    assert forms.quick_slope(z).tolist() == [1.0, 0.0]
    assert forms.normal(z).tolist() == [1.0, 0.0]


def test_a_step_does_not_hide_a_nan() -> None:
    found = forms.step(torch.tensor([2.0, 0.0, -1.0, math.nan]))
    assert found[:3].tolist() == [1.0, 0.0, 0.0]
    assert found[3].isnan()
