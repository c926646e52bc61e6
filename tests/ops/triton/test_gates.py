"""Elementary functions and gates in float32, by one tiny kernel, against PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from guards import DEVICE
from torch import Tensor

from ffattr.decomposition import closed_forms as forms

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gates = pytest.importorskip("ffattr.ops.triton.gates")
clenshaw, log1p_unit, polynomial, sinh_unit = gates.clenshaw, gates.log1p_unit, gates.polynomial, gates.sinh_unit
logistic, logistic_derivative, tanh_of = gates.logistic, gates.logistic_derivative, gates.tanh_of
gate, gate_derivative, moment = gates.gate, gates.gate_derivative, gates.moment
positive, step = gates.positive, gates.step

# A lane that is not selected may well divide by zero or overflow: the interpreter's NumPy warns.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned")]

SIZE = 64
TABLE = tl.constexpr((1.0, -2.0, 3.0, 0.5))
NAMES = ("gelu", "gelu_tanh", "quick_gelu", "silu")
OFFICIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda z: torch.erfc(-z / math.sqrt(2)) / 2,
    "gelu_tanh": lambda z: torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)),
    "quick_gelu": lambda z: torch.sigmoid(1.702 * z),
    "silu": torch.sigmoid,
}
MOMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": forms.gelu_moment,
    "gelu_tanh": forms.gelu_tanh_moment,
    "quick_gelu": lambda u: forms.silu_moment(1.702 * u),
    "silu": forms.silu_moment,
}


@triton.jit
def element_kernel(source, out, SIZE: tl.constexpr, FUNCTION: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.arange(0, SIZE)
    z = tl.load(source + at)
    if FUNCTION == "gate":
        y = gate(z, ACTIVATION)
    elif FUNCTION == "gate_derivative":
        y = gate_derivative(z, ACTIVATION)
    elif FUNCTION == "moment":
        y = moment(z, ACTIVATION)
    elif FUNCTION == "log1p_unit":
        y = log1p_unit(z)
    elif FUNCTION == "sinh_unit":
        y = sinh_unit(z)
    elif FUNCTION == "tanh_of":
        y = tanh_of(z)
    elif FUNCTION == "logistic":
        y = logistic(z)
    elif FUNCTION == "logistic_derivative":
        y = logistic_derivative(z)
    elif FUNCTION == "positive":
        y = positive(z)
    elif FUNCTION == "step":
        y = step(z)
    elif FUNCTION == "polynomial":
        y = polynomial(z, TABLE, 4)
    else:
        y = clenshaw(z, TABLE, 4)
    tl.store(out + at, y)


def run(function: str, values: Tensor, activation: str = "silu") -> Tensor:
    """In float32, as float64; a few numbers are padded with zeros."""
    source = torch.zeros(SIZE, device=DEVICE)
    source[: len(values)] = values.float()
    out = torch.empty(SIZE, device=DEVICE)
    element_kernel[(1,)](source, out, SIZE, function, activation)
    return out[: len(values)].double().cpu()


def grid(low: float, high: float) -> Tensor:
    """Numbers of float32, as float64."""
    return torch.linspace(low, high, SIZE).double()


@pytest.mark.parametrize(
    ("function", "low", "high", "official"),
    [
        ("log1p_unit", 0, 1, torch.log1p),
        ("log1p_unit", 0, 1e-6, torch.log1p),
        ("sinh_unit", -0.5, 0.5, torch.sinh),
        ("tanh_of", -1.3, 1.3, torch.tanh),
        ("tanh_of", -100, 100, torch.tanh),
        ("logistic", -80, 80, torch.sigmoid),
        ("logistic", -1, 1, torch.sigmoid),
        ("logistic_derivative", -80, 80, lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
    ],
)
def test_elementary_functions_keep_their_relative_error(
    function: str, low: float, high: float, official: Callable[[Tensor], Tensor]
) -> None:
    z = grid(low, high)
    torch.testing.assert_close(run(function, z), official(z), rtol=1e-6, atol=0)


def test_sums_of_powers_and_of_chebyshev_polynomials() -> None:
    t = grid(-1, 1)
    torch.testing.assert_close(run("polynomial", t), 1 - 2 * t + 3 * t**2 + t**3 / 2, rtol=0, atol=1e-6)
    expected = 1 - 2 * t + 3 * torch.cos(2 * torch.acos(t)) + torch.cos(3 * torch.acos(t)) / 2
    torch.testing.assert_close(run("clenshaw", t), expected, rtol=0, atol=2e-6)


def test_numbers_that_are_positive() -> None:
    z = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0, math.inf, -math.inf])
    assert run("positive", z).tolist() == [0.0, 0.0, 0.0, pytest.approx(1e-30), 3.0, math.inf, 0.0]
    assert run("step", z).tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_gates(name: str) -> None:
    for low, high in ((-3, 3), (-40, 40)):
        z = grid(low, high)
        torch.testing.assert_close(run("gate", z, name), OFFICIAL[name](z), rtol=0, atol=5e-7)
    left = grid(-5, 0)  # where 1 - s would lose the digits
    torch.testing.assert_close(run("gate", left, name), OFFICIAL[name](left), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_gates(name: str) -> None:
    for low, high in ((-3, 3), (-40, 40)):
        z = grid(low, high).requires_grad_()
        (expected,) = torch.autograd.grad(OFFICIAL[name](z).sum(), z)
        torch.testing.assert_close(run("gate_derivative", z.detach(), name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_moments(name: str) -> None:
    """Series and closed form, which meet at one; and for `gelu_tanh` at seven."""
    for u in (grid(-1.05, 1.05), grid(-8, 8), grid(-3000, 3000)):
        torch.testing.assert_close(run("moment", u, name), MOMENTS[name](u), rtol=0, atol=3e-7)
    assert run("moment", torch.zeros(1), name).item() == 0.25


@pytest.mark.parametrize("name", NAMES)
def test_huge_numbers_are_saturated(name: str) -> None:
    z = torch.tensor([1e30, -1e30])
    assert run("gate", z, name).tolist() == [1.0, 0.0]
    assert run("gate_derivative", z, name).tolist() == [0.0, 0.0]
    assert run("moment", z, name).tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        *((function, name) for function in ("gate", "gate_derivative", "moment") for name in NAMES),
        *((function, "silu") for function in ("log1p_unit", "sinh_unit", "tanh_of", "logistic")),
        *((function, "silu") for function in ("logistic_derivative", "positive", "step", "polynomial", "clenshaw")),
    ],
)
def test_nan_goes_through_and_harms_no_neighbour(function: str, name: str) -> None:
    found = run(function, torch.tensor([0.5, math.nan, 0.25]), name)
    assert found.isnan().tolist() == [False, True, False]
