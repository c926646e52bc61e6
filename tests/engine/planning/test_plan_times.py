"""What this machine's rates say of a plan: how long it takes, and which method is faster."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from plan_cases import CPU, planned, shape

from ffattr.engine.machine_rates import Rates, keep, key_of
from ffattr.engine.planning.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread", "rates")


EVEN = Rates(**{one.name: 1e9 for one in fields(Rates)})


def known(**different: float) -> Rates:
    """Rates that this machine then has: all alike but for some."""
    made = replace(EVEN, **different)
    keep(key_of("torch", torch.float32, CPU, 1), made)
    return made


def test_without_rates_no_time_is_predicted() -> None:
    plan = Plan("torch", torch.float32, CPU, [planned(shape(8))])
    assert plan.seconds is None
    assert " s beside" not in str(plan)
    known()
    assert planned(shape(9), backend="reference").seconds is None


def test_seconds_are_counts_by_rates() -> None:
    known(packs=4.0)
    plan = Plan("torch", torch.float32, CPU, [planned(shape(8), layer=layer) for layer in range(3)])
    one = plan.layers[0]
    assert one.seconds == pytest.approx(0.25 + (sum(one.work.values()) - 1) / 1e9)
    assert plan.seconds == pytest.approx(3 * one.seconds)
    assert f"about {plan.seconds:.2g} s beside the model's own run" in str(plan)
    assert set(one.work) <= {rate.name for rate in fields(Rates)}


@pytest.mark.parametrize(
    ("rates_of", "method", "by_query"),
    [
        ({"operator": 3e8, "calls": 1.0}, "direct", "operator"),
        ({"operator": 3e8}, "mixed", "mixed"),  # makes its matrices by the library's product
        ({"direct": 3e8}, "operator", "operator"),
    ],
)
def test_rates_kept_here_decide_near_break_even(rates_of: dict[str, float], method: str, by_query: str) -> None:
    known(**rates_of)
    chosen = planned(shape(64 * 4 // 3))
    assert chosen.method == method
    assert re.match(r"faster here: \S+ s direct, \S+ s (operator|mixed)", chosen.reason)
    assert planned(shape(8)).method == "direct"  # far from it counts decide
    assert planned(shape(2000)).method == by_query
