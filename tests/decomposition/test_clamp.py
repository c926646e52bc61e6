"""Gate and up that are cut off before they meet, by numbers worked out by hand and by quadrature."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from random_layers import NEURONS
from torch import Tensor

from ffattr import GaussLegendre, Riemann
from ffattr.decomposition import integrated_gradients as ig
from ffattr.decomposition.activations import ACTIVATIONS
from ffattr.decomposition.clamp import Clamp

RELU = ACTIVATIONS["relu"]


def pair(gate: list[float], up: list[float]) -> Tensor:
    return torch.tensor([[gate], [up]], dtype=torch.float64)


@pytest.mark.parametrize("base", [False, True])
def test_clamped_factors(base: bool) -> None:
    """Against quadrature of so many points that kinks do not matter, and completeness to rounding."""
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(2, 50, NEURONS, generator=generator, dtype=torch.float64)
    start = 2 * torch.randn(2, 1, NEURONS, generator=generator, dtype=torch.float64) if base else None
    z[:, 0] = 0
    clamp, activation = Clamp(limit=1.1, offset=1.0), ACTIVATIONS["quick_gelu"]
    exact = clamp.slopes(z, activation, "exact", 0, start)
    fine = clamp.slopes(z, activation, "midpoint", 20_000, start)
    torch.testing.assert_close(exact, fine, rtol=0, atol=1e-3)
    away = z if start is None else z - start
    before = clamp.value(torch.zeros_like(z) if start is None else start.expand_as(z), activation)
    torch.testing.assert_close((away * exact).sum(0), clamp.value(z, activation) - before, rtol=0, atol=1e-12)
    unclamped = Clamp(limit=1e9, offset=0.0).slopes(z, activation, "exact", 0, start)
    torch.testing.assert_close(unclamped, ig.slopes(z, activation, "exact", 0, start), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [Riemann(3, "right"), Riemann(4, "trapezoid"), GaussLegendre(5)])
def test_clamped_rules(rule: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 6, NEURONS, generator=generator, dtype=torch.float64)
    name, steps = ig.rule_of(rule)
    found = Clamp(limit=1e9, offset=0.0).slopes(z, ACTIVATIONS["silu"], name, steps, None)
    torch.testing.assert_close(found, ig.slopes(z, ACTIVATIONS["silu"], name, steps), rtol=0, atol=1e-12)


def test_the_value_is_cut_above_for_the_gate_and_on_both_sides_for_up() -> None:
    z = pair([5.0, 1.0, -9.0, 3.0], [-3.0, 3.0, 1.0, 0.5])
    found = Clamp(limit=2.0, offset=1.0).value(z, RELU)
    assert found.tolist() == [[2 * -1.0, 1 * 3.0, 0.0, 2 * 1.5]]


def test_a_path_that_crosses_a_limit_half_way() -> None:
    """The gate goes from 0 to 2, cut off at 1, while up stays at 0: ``relu(min(2a, 1)) * (0 + 1)``."""
    factors = Clamp(limit=1.0, offset=1.0).slopes(pair([2.0], [0.0]), RELU, "exact", 0, None)
    torch.testing.assert_close(factors, pair([0.5], [0.25 + 0.5]), rtol=1e-14, atol=0)


def test_a_path_beyond_the_limits_has_no_factors() -> None:
    start, z = pair([3.0, 3.0], [3.0, -4.0]), pair([5.0, 4.0], [5.0, -3.0])
    for rule, steps in (("exact", 0), ("midpoint", 4)):
        assert not Clamp(limit=2.0, offset=1.0).slopes(z, RELU, rule, steps, start).any()


@pytest.mark.parametrize("rule", ["exact", "right"])
@pytest.mark.parametrize("stream", [0, 1])
def test_nan_stays_with_its_neuron(stream: int, rule: str) -> None:
    z = pair([0.5, 0.5, 3.0], [0.5, 0.5, -3.0])
    z[stream, 0, 1] = math.nan
    found = Clamp(limit=1.0, offset=1.0).slopes(z, ACTIVATIONS["silu"], rule, 0 if rule == "exact" else 5, None)
    assert found.isnan().any(0).tolist() == [[False, True, False]]


def test_no_tokens() -> None:
    assert Clamp(1.0, 1.0).slopes(torch.zeros(2, 0, 3), RELU, "exact", 0, None).shape == (2, 0, 3)
