"""Every kind of work of a layer is measured, each by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from ffattr.bench.calibrate import _compute_rate, measure_rates
from ffattr.engine.machine_rates import Rates

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_calibration_runs_every_kind_of_work(dtype: torch.dtype) -> None:
    runs = 0

    def once(run: Callable[[], object]) -> float:
        nonlocal runs
        run()
        runs += 1
        return 0.5 * runs  # every time is another one

    found = asdict(measure_rates("torch", dtype, CPU, once))
    assert all(0 < rate < math.inf for rate in found.values())
    assert len(set(found.values())) == len(found)
    assert runs >= len(found)


@pytest.mark.parametrize(
    ("seconds", "known", "rate"),
    [(2.0, 0.5, 4.0), (2.0, 0.0, 3.0), (2.0, 1.9, 30.0), (2.0, 5.0, 30.0), (0.0, 1.0, 6e9)],
)
def test_a_rate_is_of_the_seconds_that_are_left(seconds: float, known: float, rate: float) -> None:
    """At least a tenth of what was measured, so that no difference of two measurements is nothing or less."""
    assert _compute_rate(seconds, 6.0, known) == pytest.approx(rate)


def test_work_that_takes_twice_as_long_has_half_the_rate() -> None:
    def time_all_as(seconds: float) -> Rates:
        def count(run: Callable[[], object]) -> float:
            run()
            return seconds

        return measure_rates("torch", torch.float32, CPU, count)

    fast, slow = time_all_as(0.5), time_all_as(1.0)
    for name in ("product", "features", "gram", "form", "slope", "gated_slope"):
        assert getattr(fast, name) == 2 * getattr(slow, name)
    assert fast.slope * 0.5 == 512 * 2 * 1536  # pre-activations of 512 tokens
    assert fast.gated_slope == 2 * fast.slope
