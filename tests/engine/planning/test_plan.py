"""Which method is chosen, and how a plan is printed."""

from __future__ import annotations

import re

import pytest
import torch
from plan_cases import CPU, MiB, planned, shape

from ffattr.engine.planning.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread", "rates")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 256, 768])
def test_operator_overtakes_direct_near_its_break_even(width: int, causal: bool) -> None:
    """`ffattr.decomposition`: from about T > 4d/3, causal 8d/3. Mixing and features shift it by less than a third."""
    even = width * (8 if causal else 4) // 3
    assert planned(shape(even * 2 // 3, width, causal=causal)).method == "direct"
    assert planned(shape(even * 4 // 3, width, causal=causal)).method == "operator"


def test_far_from_break_even_counts_decide(rates: dict[str, tuple[float, float]]) -> None:
    for rates["both"] in ((1e12, 1e9), (1e9, 1e12)):
        assert planned(shape(16)).method == "direct"
        assert planned(shape(2000)).method == "operator"
    assert "fewer operations" in planned(shape(2000)).reason


@pytest.mark.parametrize(("speeds", "method"), [((3e9, 1e9), "direct"), ((1e9, 3e9), "operator")])
def test_near_break_even_speeds_decide(
    speeds: tuple[float, float], method: str, rates: dict[str, tuple[float, float]]
) -> None:
    rates["both"] = speeds
    chosen = planned(shape(64 * 4 // 3))
    assert chosen.method == method
    assert f"{speeds[0] / 1e9:.0f} direct, {speeds[1] / 1e9:.0f} operator GFLOP/s measured here" in chosen.reason


@pytest.mark.parametrize("tokens", [4, 2000])
@pytest.mark.parametrize("method", ["direct", "operator"])
def test_a_method_asked_for_is_taken(method: str, tokens: int) -> None:
    chosen = planned(shape(tokens), method)
    assert (chosen.method, chosen.reason) == (method, "asked for")


@pytest.mark.parametrize("method", ["Direct", "reference", "sketch", ""])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_unknown_method(method: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"unknown method '{method}', expected 'auto', 'direct', 'operator', "):
        planned(shape(4), method, backend=backend)


def test_the_reference_has_one_method() -> None:
    assert {planned(shape(9), method, backend="reference").method for method in ("auto", "direct")} == {"reference"}


@pytest.mark.parametrize("method", ["auto", "direct", "operator"])
def test_without_feed_forward_scopes_there_is_nothing_to_choose(method: str) -> None:
    chosen, direct = planned(shape(500), method, 3 * MiB, wide=False), planned(shape(500), "direct", 3 * MiB)
    assert chosen.method == "attention"
    assert chosen.flops < direct.flops / 10
    assert chosen.blocks.keys >= direct.blocks.ff_keys
    assert planned(shape(9), wide=False, backend="reference").method == "reference"


# ---- printing


def test_printing() -> None:
    plan = Plan("torch", torch.float32, CPU)
    assert (plan.flops, plan.bytes) == (0, 0)
    plan.layers += [planned(shape(2000)), *(planned(shape(16), layer=index) for index in (1, 2, 3))]
    assert plan.flops == sum(p.flops for p in plan.layers)
    assert plan.bytes == max(p.bytes for p in plan.layers)
    header, first, others, total = str(plan).splitlines()  # layers that run alike share a line
    assert header == "torch backend, float32 on cpu"
    assert re.search(r"layer 0\b.*operator.*\b2000 queries x 2000 tokens.*\b2000 x 2000\b.*fewer operations", first)
    assert re.search(r"layer 1-3\b.*direct.*\b16 queries x 16 tokens.*\b16 x 16\b.*fewer operations", others)
    assert f"{plan.layers[0].flops / 1e9:.2f} GFLOP" in first
    assert str(Plan("triton", torch.bfloat16, CPU)).startswith("triton backend, bfloat16 on cpu\n")
    assert re.search(rf"total.*{plan.flops / 1e9:.2f} GFLOP.*{plan.bytes / MiB:.1f} MiB", total)


def test_printing_names_no_layer_that_did_not_run() -> None:
    plan = Plan("torch", torch.float32, CPU, [planned(shape(8), layer=index) for index in (0, 2)])
    assert "0-2" not in str(plan)
