"""Integrated-Gradients factors against composite quadrature of PyTorch's own activations, and against mpmath."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from activation_cases import NAMES, OFFICIAL, VALUES, check, derivative, path_integrals

from ffattr.decomposition import integrated_gradients as ig


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-7)])
@pytest.mark.parametrize("name", NAMES)
def test_exact_from_zero(name: str, dtype: torch.dtype, tolerance: float) -> None:
    z = torch.tensor(VALUES, dtype=dtype)
    v = torch.linspace(-3, 3, len(z), dtype=dtype)
    activation, g = ig.ACTIVATIONS[name], OFFICIAL[name]
    c_u, c_v = ig.gated_slopes(z, v, activation)
    expected = [path_integrals(g, 0.0, u, 0.0, w) for u, w in zip(z.tolist(), v.tolist(), strict=True)]
    check(ig.slope(z, activation), [e[0] for e in expected], tolerance)
    check(c_u, [e[1] for e in expected], 4 * tolerance)
    check(c_v, [e[2] for e in expected], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_exact_from_a_base(name: str, dtype: torch.dtype, tolerance: float) -> None:
    starts = torch.tensor([0, 0.3, -2, 7.5, -20, 90], dtype=dtype)
    offsets = torch.tensor([0, 1e-6, -0.01, 0.9, -0.999, 1.001, 3, -30, 1e4], dtype=dtype)
    z = (starts[:, None] + offsets).flatten()
    b = starts[:, None].expand(-1, len(offsets)).flatten()
    v, v0 = torch.full_like(z, 1.25), torch.linspace(-2, 2, len(z), dtype=dtype)
    activation, g = ig.ACTIVATIONS[name], OFFICIAL[name]
    expected = [path_integrals(g, *p) for p in zip(b.tolist(), z.tolist(), v0.tolist(), v.tolist(), strict=True)]
    c_u, c_v = ig.gated_slopes(z, v, activation, base=(b, v0))
    check(ig.slope(z, activation, base=b), [e[0] for e in expected], tolerance)
    check(c_u, [e[1] for e in expected], 2 * tolerance)
    check(c_v, [e[2] for e in expected], tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_gated_factors_are_complete(name: str) -> None:
    g = OFFICIAL[name]
    u, v, u0, v0 = torch.randn(4, 50, 7, dtype=torch.float64, generator=torch.manual_seed(0)) * 5
    c_u, c_v = ig.gated_slopes(u, v, ig.ACTIVATIONS[name], base=(u0, v0))
    torch.testing.assert_close((u - u0) * c_u + (v - v0) * c_v, g(u) * v - g(u0) * v0, rtol=1e-12, atol=1e-12)


def test_left_tail_of_gelu_keeps_its_digits() -> None:
    mpmath = pytest.importorskip("mpmath")
    for dtype, values in ((torch.float64, (-5, -20, -36)), (torch.float32, (-3, -8, -12))):
        slopes = ig.slope(torch.tensor(values, dtype=dtype), ig.ACTIVATIONS["gelu"])
        for value, slope in zip(values, slopes.tolist(), strict=True):
            # an argument off by eps / 2 moves the tail by z^2 eps / 2
            assert abs(slope / float(mpmath.ncdf(value)) - 1) < (2 + value**2) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_types(name: str, dtype: torch.dtype) -> None:
    activation = ig.ACTIVATIONS[name]
    z = torch.tensor(VALUES, dtype=dtype)
    v = torch.linspace(-2, 2, len(z), dtype=dtype)
    base = torch.full_like(z, 0.75)
    rounding = torch.finfo(dtype).eps
    for low, high in (
        ((ig.slope(z, activation),), (ig.slope(z.double(), activation),)),
        ((ig.slope(z, activation, base=base),), (ig.slope(z.double(), activation, base=base.double()),)),
        (ig.gated_slopes(z, v, activation), ig.gated_slopes(z.double(), v.double(), activation)),
    ):
        for x, y in zip(low, high, strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(x.double(), y.to(dtype).double(), rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["exact", "right", "gauss-legendre"])
def test_nan_goes_through_and_harms_no_neighbour(name: str, rule: str) -> None:
    z = torch.tensor([0.5, math.nan, -2.0])
    zero = torch.zeros_like(z)
    steps = 0 if rule == "exact" else 5
    results = [
        ig.slope(z, ig.ACTIVATIONS[name], rule, steps),
        ig.slope(z, ig.ACTIVATIONS[name], rule, steps, base=zero),
        *ig.gated_slopes(z, z, ig.ACTIVATIONS[name], rule, steps),
        *ig.gated_slopes(z, z, ig.ACTIVATIONS[name], rule, steps, base=(zero, zero)),
    ]
    for result in results:
        assert result.isnan().tolist() == [False, True, False]


def test_relu_has_slope_zero_at_zero() -> None:
    assert ig.slope(torch.zeros(1), ig.ACTIVATIONS["relu"]).item() == 0


def test_base_is_broadcast_and_large_inputs_are_cut_into_blocks() -> None:
    z = torch.randn(300, 1000, generator=torch.manual_seed(0)) * 3
    base = torch.randn(1, 1000)
    gelu = ig.ACTIVATIONS["gelu"]
    whole = ig.slope(z, gelu, base=base)
    assert torch.equal(whole[250:260], ig.slope(z[250:260], gelu, base=base))
    assert torch.equal(whole, ig.slope(z, gelu, base=base.expand(300, -1)))
    assert torch.equal(ig.slope(z.T, gelu), ig.slope(z, gelu).T)
    for empty in (z[:0], z[:, :0]):
        assert ig.slope(empty, gelu).shape == empty.shape
    assert ig.slope(torch.tensor(0.0), gelu).item() == 0.5


# Quadrature rules.


@pytest.mark.parametrize("rule", ig.RULES[1:])
@pytest.mark.parametrize("steps", [2, 3, 8, 51])
def test_weights_sum_to_one(rule: str, steps: int) -> None:
    points, weights = ig.nodes(rule, steps)
    assert points.dtype == weights.dtype == torch.float64
    assert points.shape == weights.shape == (steps,)
    assert abs(weights.sum().item() - 1) < 1e-14
    assert points.min() >= 0
    assert points.max() <= 1


@pytest.mark.parametrize(("rule", "order"), [("right", 1), ("left", 1), ("midpoint", 2), ("trapezoid", 2)])
def test_riemann_rules_converge_at_their_order(rule: str, order: int) -> None:
    z, v = torch.tensor([3.0, -2.0], dtype=torch.float64), torch.tensor([1.5, 2.0], dtype=torch.float64)
    silu = ig.ACTIVATIONS["silu"]
    exact = torch.cat([ig.slope(z, silu), *ig.gated_slopes(z, v, silu)])
    errors = []
    for intervals in (200, 400):
        steps = intervals + (rule == "trapezoid")
        errors.append(torch.cat([ig.slope(z, silu, rule, steps), *ig.gated_slopes(z, v, silu, rule, steps)]) - exact)
    assert errors[1].abs().min() > 1e-9
    torch.testing.assert_close(errors[0] / errors[1], torch.full_like(exact, 2.0**order), rtol=0.02, atol=0)


def test_right_rule_is_the_papers_sum() -> None:
    z, b = torch.randn(2, 11, dtype=torch.float64, generator=torch.manual_seed(0))
    for base, start in ((None, torch.zeros_like(z)), (b, b)):
        expected = sum(derivative(F.gelu, start + k / 50 * (z - start)) for k in range(1, 51)) / 50
        torch.testing.assert_close(ig.slope(z, ig.ACTIVATIONS["gelu"], "right", 50, base=base), expected)


def test_gauss_legendre_is_exact_for_polynomials() -> None:
    for count in (1, 2, 7, 64):
        points, weights = ig.nodes("gauss-legendre", count)
        for degree in range(2 * count):
            assert abs((points**degree * weights).sum().item() - 1 / (degree + 1)) < 1e-14
        if count < 8:  # and for no higher degree
            assert abs((points ** (2 * count) * weights).sum().item() - 1 / (2 * count + 1)) > 1e-9


def test_rules_as_users_write_them() -> None:
    assert ig.rule_of("exact") == ("exact", 0)
    assert ig.rule_of(ig.Riemann(50)) == ("right", 50)
    assert ig.rule_of(ig.Riemann(7, "trapezoid")) == ("trapezoid", 7)
    assert ig.rule_of(ig.GaussLegendre(9)) == ("gauss-legendre", 9)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ig.Riemann(0), "0"),
        (lambda: ig.Riemann(1, "trapezoid"), "trapezoid.*1"),
        (lambda: ig.Riemann(2.5), "2.5"),
        (lambda: ig.Riemann(5, "simpson"), "simpson"),
        (lambda: ig.GaussLegendre(-3), "-3"),
        (lambda: ig.Riemann(10**9), "at most 65536 steps, got 1000000000; ig='exact' costs less"),
        (lambda: ig.GaussLegendre(2000), "at most 1024"),
        (lambda: ig.rule_of("exakt"), "exakt"),
        (lambda: ig.nodes("exact", 4), "exact"),
        (lambda: ig.slope(torch.ones(2), ig.ACTIVATIONS["gelu"], "rihgt", 4), "rihgt"),
        (lambda: ig.slope(torch.ones(2), ig.ACTIVATIONS["gelu"], "left", 0), "left.*0"),
        (lambda: ig.slope(torch.ones(2).long(), ig.ACTIVATIONS["gelu"]), "int64"),
        (lambda: ig.gated_slopes(torch.ones(2), torch.ones(3), ig.ACTIVATIONS["gelu"]), r"\[2\].*\[3\]"),
    ],
)
def test_bad_values_are_named(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
