"""In which blocks a layer is worked on, by the memory that there is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from plan_cases import MiB, planned, shape

from ffattr.engine.planning import plan as planning
from ffattr.engine.planning.costs import Blocks, LayerShape

pytestmark = pytest.mark.usefixtures("one_thread", "rates")


def least(given: LayerShape, method: str) -> int:
    with pytest.raises(ValueError, match=r"memory_budget=1 bytes is too small for layer 3 ") as caught:
        planned(given, method, 1, layer=3)
    found = re.search(r"at least (\d+)", str(caught.value))
    assert found, caught.value
    return int(found[1])


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("method", ["direct", "operator", "mixed", "attention"])
@pytest.mark.parametrize(("tokens", "queries"), [(1, 1), (7, 3), (200, 200), (500, 1), (500, 500)])
def test_blocks_grow_with_the_budget(tokens: int, queries: int, method: Any, streams: int) -> None:
    given = shape(tokens, queries=queries, streams=streams)
    asked, wide = ("auto", False) if method == "attention" else (method, True)
    whole = planned(given, asked, wide=wide)
    assert whole.blocks == Blocks(queries, tokens, whole.blocks.ff_keys)
    assert whole.blocks.ff_keys == tokens or method == "attention"
    before = 0
    for budget in (200_000, MiB, 3 * MiB, 10 * MiB, 100 * MiB):
        try:
            chosen = planned(given, asked, budget, wide=wide)
        except ValueError:
            assert before == 0  # what fits once fits from there on
            continue
        n, m, k = chosen.blocks.queries, chosen.blocks.keys, chosen.blocks.ff_keys
        assert 1 <= n <= queries
        assert 1 <= m <= tokens
        assert 1 <= k <= tokens
        assert chosen.method == method
        assert before <= chosen.bytes <= budget + given.fixed_bytes(method, torch.float32)
        assert ("features made" in chosen.reason) == (n < queries)
        before = chosen.bytes
    assert chosen.bytes <= whole.bytes


@pytest.mark.parametrize("method", ["direct", "operator", "mixed"])
def test_the_smallest_budget(method: Any) -> None:
    given = shape(50)
    smallest = least(given, method)
    assert planned(given, method, smallest).blocks.queries == 1
    assert least(shape(50, streams=2), method) > smallest
    with pytest.raises(ValueError, match=f"memory_budget={smallest - 1} bytes is too small"):
        planned(given, method, smallest - 1)


def test_reference_blocks_of_queries() -> None:
    given = shape(50)
    one = planned(given, budget=1, backend="reference")
    assert one.blocks.queries == 1
    assert planned(given, budget=7 * one.bytes, backend="reference").blocks.queries == 7
    assert planned(given, backend="reference").blocks.queries == 50


def test_without_a_budget_memory_in_use_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 20 * MiB

    monkeypatch.setattr(planning.psutil, "virtual_memory", Memory)
    given = shape(3000)
    tight = planned(given, "direct", None)
    assert tight.bytes - given.fixed_bytes("direct", torch.float32) <= Memory.available // 4
    Memory.available = 1 << 50
    loose = planned(given, "direct", None)
    assert tight.bytes < loose.bytes < 128 * MiB


def test_memory_that_torch_holds_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    device = torch.device("cuda", 0)
    assert planning.free_bytes(device) == 800
    assert planning.default_budget(device) == (200, 200)


@pytest.mark.parametrize(
    ("method", "backend", "wide"),
    [
        ("direct", "torch", True),
        ("operator", "torch", True),
        ("mixed", "torch", True),
        ("auto", "torch", False),
        ("auto", "reference", True),
    ],
)
def test_halving(method: str, backend: str, wide: bool) -> None:
    given = shape(37, queries=11, forms=0 if wide else 3)
    first = step = planned(given, method, backend=backend, wide=wide)
    seen = [first]
    while (smaller := step.halve_blocks()) is not None:
        one, other = smaller.blocks, step.blocks
        assert (one.queries, one.keys) in ((other.queries // 2, other.keys), (1, max(1, other.keys // 2)))
        assert smaller.bytes < step.bytes or (one.queries == other.queries and smaller.bytes == step.bytes)
        assert replace(smaller, blocks=first.blocks, halvings=0) == first
        step = smaller
        seen.append(step)
    assert [plan.halvings for plan in seen] == list(range(len(seen)))
    keys = 37 if backend == "reference" else 1
    assert step.blocks == Blocks(1, keys, keys)
    assert "halved" not in first.reason
    assert seen[1].reason.endswith("halved 1 time after running out of memory")
    assert seen[2].reason.endswith("halved 2 times after running out of memory")
    assert ("features made 6 times, halved" in seen[2].reason) == (backend != "reference")


def test_what_would_not_fit_the_memory_is_left_for_what_does() -> None:
    """Mixed, a key brings what the block reads beside its residual, and direct takes keys in turns."""
    given = shape(500, 512, queries=1)
    needed = {method: least(given, method) for method in ("mixed", "operator", "direct")}
    assert needed["mixed"] > needed["operator"] > needed["direct"]
    for method, budget in needed.items():
        assert planned(given, "auto", budget).method == method
    assert planned(given, "auto", needed["mixed"] - 1).reason.startswith("mixed would not fit the memory")
