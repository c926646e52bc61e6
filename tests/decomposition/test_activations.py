"""The table of activations against PyTorch's own, and its factors against what they are the mean of."""

from __future__ import annotations

import pytest
import torch
from activation_cases import NAMES, OFFICIAL, VALUES, check, derivative, path_integrals

from ffattr.decomposition import integrated_gradients as ig
from ffattr.decomposition.activations import ACTIVATIONS, Activation, make_swish


@pytest.mark.parametrize("name", NAMES)
def test_value_and_derivative(name: str) -> None:
    activation, g = ig.ACTIVATIONS[name], OFFICIAL[name]
    x = torch.tensor(VALUES, dtype=torch.float64)
    torch.testing.assert_close(activation.value(x), g(x), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(activation.derivative(x), derivative(g, x), rtol=1e-14, atol=1e-14)


def test_every_activation_is_known_by_its_name_and_complete() -> None:
    assert set(ACTIVATIONS) == set(NAMES)
    for name, activation in ACTIVATIONS.items():
        assert activation.name == name
        parts = (activation.slope, activation.gated, activation.rise, activation.path)
        assert all(part is not None for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_is_the_quotient_from_zero(name: str) -> None:
    z = torch.tensor([-30.0, -1.5, -0.25, 0.5, 2.0, 40.0], dtype=torch.float64)
    g, slope = OFFICIAL[name], ACTIVATIONS[name].slope
    assert slope is not None
    torch.testing.assert_close(slope(z), (g(z) - g(torch.zeros_like(z))) / z, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_factors_on_long_paths(name: str) -> None:
    """Of length one and more, where `rise` and `path` are used as they are."""
    starts = torch.tensor([-40.0, -2.0, -0.5, 0.0, 0.5, 3.0, 100.0], dtype=torch.float64)
    u = torch.cat([starts + length for length in (-200.0, -1.0, 1.0, 7.0)])
    u0 = starts.repeat(4)
    v, v0 = torch.linspace(-2, 2, len(u), dtype=torch.float64), torch.full_like(u, 0.75)
    given = ACTIVATIONS[name]
    assert given.rise is not None
    assert given.path is not None
    expected = [
        path_integrals(OFFICIAL[name], *ends)
        for ends in zip(u0.tolist(), u.tolist(), v0.tolist(), v.tolist(), strict=True)
    ]
    c_u, c_v = given.path(u, v, u0, v0)
    check(given.rise(u, u0), [e[0] for e in expected], 1e-12)
    check(c_u, [e[1] for e in expected], 1e-12)
    check(c_v, [e[2] for e in expected], 1e-12)


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_piecewise_polynomials_hold_on_short_paths_too(name: str) -> None:
    given = ACTIVATIONS[name]
    assert given.polynomial
    assert given.rise is not None
    z = torch.tensor([1e-9, 0.25, -0.25, 0.5], dtype=torch.float64)
    b = torch.tensor([-1e-9, 0.25, -0.25, -0.5], dtype=torch.float64)
    means = {"relu": [0.5, 1.0, 0.0, 0.5], "relu2": [5e-10, 0.5, 0.0, 0.25]}[name]
    torch.testing.assert_close(given.rise(z, b), torch.tensor(means, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_large_arguments_lose_no_digits(name: str) -> None:
    """Far from zero these are ReLU, whose mean between two numbers is that of its ends."""
    u, u0 = torch.tensor([1e6 + 8.0], dtype=torch.float32), torch.tensor([1e6], dtype=torch.float32)
    path = ACTIVATIONS[name].path
    assert path is not None
    c_u, c_v = path(u, torch.tensor([3.0]), u0, torch.tensor([1.0]))
    assert c_u.item() == 2.0
    assert c_v.item() == 1e6 + 4


def test_an_activation_without_closed_forms_is_integrated_by_quadrature() -> None:
    cubic = Activation("cubic", value=lambda z: z**3, derivative=lambda z: 3 * z**2)
    z, v = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 4.0], dtype=torch.float64)
    c_u, c_v = ig.gated_slopes(z, v, cubic)
    torch.testing.assert_close(ig.slope(z, cubic), z**2)
    torch.testing.assert_close(c_u, 3 * z**2 * v / 4)
    torch.testing.assert_close(c_v, z**3 / 4)


def test_swish_of_any_steepness() -> None:
    z = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    swish = make_swish(2.5)
    torch.testing.assert_close(swish.value(z), z * (1 + torch.exp(-2.5 * z)).reciprocal())
    (expected,) = torch.autograd.grad(swish.value(z).sum(), z)
    torch.testing.assert_close(swish.derivative(z), expected)
    assert make_swish(1.0) is ACTIVATIONS["silu"]
    assert make_swish(1.702) is ACTIVATIONS["quick_gelu"]
