"""Activations and their path integrals in float32, by one tiny kernel, against PyTorch's own in float64."""

from __future__ import annotations

import math

import pytest
import torch
from activation_cases import NAMES, OFFICIAL, VALUES, derivative, path_integrals
from guards import DEVICE
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
activations = pytest.importorskip("ffattr.ops.triton.activations")
value, slope, gated = activations.value, activations.slope, activations.gated
rise, path = activations.rise, activations.path
g_derivative = activations.derivative

# A lane that is not selected may well divide by zero or overflow: the interpreter's NumPy warns.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned")]

SIZE = 32


@triton.jit
def point_kernel(z, out, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(z + at)
    mean, rest = gated(x, ACTIVATION)
    tl.store(out + at, value(x, ACTIVATION))
    tl.store(out + SIZE + at, g_derivative(x, ACTIVATION))
    tl.store(out + 2 * SIZE + at, slope(x, ACTIVATION))
    tl.store(out + 3 * SIZE + at, mean)
    tl.store(out + 4 * SIZE + at, rest)


@triton.jit
def path_kernel(u, v, u0, v0, out, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, SIZE)
    gate, start = tl.load(u + at), tl.load(u0 + at)
    c_u, c_v = path(gate, tl.load(v + at), start, tl.load(v0 + at), ACTIVATION)
    tl.store(out + at, rise(gate, start, ACTIVATION))
    tl.store(out + SIZE + at, c_u)
    tl.store(out + 2 * SIZE + at, c_v)


def padded(values: Tensor, fill: float) -> Tensor:
    rest = torch.full((SIZE - len(values),), fill)
    return torch.cat([values.float(), rest]).to(DEVICE)


def at_points(name: str, values: list[float]) -> Tensor:
    """Value, derivative, slope and both factors of a gated block from zero, ``[5, n]``."""
    out = torch.empty(5, SIZE, device=DEVICE)
    point_kernel[(1,)](padded(torch.tensor(values), 0.5), out, SIZE, name)
    return out[:, : len(values)].double().cpu()


def on_paths(name: str, u: Tensor, v: Tensor, u0: Tensor, v0: Tensor) -> Tensor:
    """Rise and both factors, ``[3, n]``."""
    out = torch.empty(3, SIZE, device=DEVICE)
    path_kernel[(1,)](padded(u, 5), padded(v, 1), padded(u0, 3), padded(v0, 0), out, SIZE, name)
    return out[:, : len(u)].double().cpu()


def check(found: Tensor, expected: Tensor, limit: float = 1e-6) -> None:
    error = (found - expected).abs() / expected.abs().clamp_min(1)
    assert error.max() <= limit, (error.argmax().item(), error.max().item())  # a NaN fails too


@pytest.mark.parametrize("name", NAMES)
def test_value_and_derivative(name: str) -> None:
    z = torch.tensor(VALUES).double()
    found = at_points(name, VALUES)
    check(found[0], OFFICIAL[name](z))
    check(found[1], derivative(OFFICIAL[name], z))


@pytest.mark.parametrize("name", NAMES)
def test_factors_from_zero(name: str) -> None:
    z = torch.tensor(VALUES).double()
    ones = [path_integrals(OFFICIAL[name], 0.0, u, 0.0, 1.0) for u in z.tolist()]
    found = at_points(name, VALUES)
    expected = torch.tensor(ones, dtype=torch.float64).T
    check(found[2], expected[0])
    check(found[3], expected[2])
    check(found[4], expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_factors_of_long_paths(name: str) -> None:
    starts = torch.tensor([-40.0, -2.0, -0.5, 0.0, 0.5, 3.0, 100.0])
    u, u0 = torch.cat([starts + length for length in (-200.0, -1.25, 1.25, 7.0)]), starts.repeat(4)
    v, v0 = torch.linspace(-1, 1, len(u)), torch.full_like(u, 0.75)
    ends = zip(u0.tolist(), u.tolist(), v0.tolist(), v.tolist(), strict=True)
    expected = torch.tensor([path_integrals(OFFICIAL[name], *one) for one in ends], dtype=torch.float64).T
    check(on_paths(name, u, v, u0, v0), expected, 3e-6)


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_kinks_are_exact_on_short_paths_too(name: str) -> None:
    """From -1/1024 to three times as far on the other side; and where a path has no length."""
    end = 3 / 1024
    u, u0 = torch.tensor([end, 0.25, -0.25]), torch.tensor([-1 / 1024, 0.25, -0.25])
    found = on_paths(name, u, torch.full_like(u, 2.0), u0, torch.full_like(u, 2.0))
    means = {
        "relu": [[0.75, 1, 0], [1.5, 2, 0], [0.75 * end / 2, 0.25, 0]],
        "relu2": [[0.75 * end, 0.5, 0], [1.5 * end, 1, 0], [0.25 * end**2, 0.0625, 0]],
    }[name]
    torch.testing.assert_close(found, torch.tensor(means, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_nan_goes_through_and_harms_no_neighbour(name: str) -> None:
    """Of a gate everywhere; of up in its own factor of the gate."""
    assert at_points(name, [0.5, math.nan, -2.0]).isnan().tolist() == [[False, True, False]] * 5
    u, v = torch.tensor([3.0, math.nan, -2.0]), torch.ones(3)
    assert on_paths(name, u, v, torch.zeros(3), v).isnan().tolist() == [[False, True, False]] * 3
    up = torch.tensor([1.0, math.nan, 1.0])
    assert on_paths(name, torch.full((3,), 3.0), up, torch.zeros(3), v)[1].isnan().tolist() == [False, True, False]
