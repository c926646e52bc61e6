"""What is counted, chosen and cut into blocks."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ffattr.bench.run import run_dense
from ffattr.decomposition.affine import Linear, Norm
from ffattr.decomposition.attention import QueryKey
from ffattr.decomposition.integrated_gradients import ACTIVATIONS
from ffattr.decomposition.layer import Branch, LayerWeights
from ffattr.decomposition.reference import Rule
from ffattr.engine import plan as planning
from ffattr.engine.layer_maps import LayerTask
from ffattr.engine.machine_rates import Rates, keep, key_of
from ffattr.engine.pack import OneSequence
from ffattr.engine.plan import Blocks, EngineOptions, LayerPlan, LayerShape, Plan, plan_layer
from ffattr.ops.backends import BACKENDS

CPU = torch.device("cpu")
MiB = 1 << 20


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[float, float]]:
    """No test measures this machine or knows its rates: both methods run at one speed unless a test says otherwise."""
    monkeypatch.setenv("FFATTR_CACHE", str(tmp_path))
    speed = {"both": (1e9, 1e9)}
    monkeypatch.setattr(planning, "measured", lambda *key: speed["both"])
    return speed


def shape(
    tokens: int, width: int = 64, queries: int | None = None, causal: bool = False, streams: int = 1, forms: int = 0
) -> LayerShape:
    queries = tokens if queries is None else queries
    pairs = tokens * (tokens + 1) // 2 if causal else queries * tokens
    levels = min(forms, 2)
    return LayerShape(
        queries,
        tokens,
        pairs,
        width,
        4 * width,
        8,
        width // 8,
        streams,
        maps_per_pair=forms or 1,
        attention_scopes=forms,
        stages=levels,
    )


def planned(
    given: LayerShape,
    method: str = "auto",
    budget: int | None = 1 << 40,
    backend: str = "torch",
    layer: int = 0,
    wide: bool = True,
    dtype: torch.dtype = torch.float32,
) -> LayerPlan:
    return plan_layer(layer, given, wide, EngineOptions(BACKENDS[backend], method, dtype, CPU, budget))


# ---- counts


def layer(given: LayerShape) -> tuple[LayerWeights, Tensor, QueryKey]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    d, inner, f = given.width, given.inner, given.ff_width
    weights = LayerWeights(
        heads=given.heads,
        kv_heads=given.heads,
        value=Linear(random(d, inner)),
        out=Linear(random(inner, d)),
        branches=(
            Branch(
                up=Linear(random(d, f)),
                gate=Linear(random(d, f)) if given.streams == 2 else None,
                down=Linear(random(f, d)),
                activation=ACTIVATIONS["gelu"],
            ),
        ),
        norm_before_ff=Norm("rms", random(d), None, 1e-6),
    )
    query, key = random(2, given.heads, given.tokens, given.head_dim)
    return weights, random(given.tokens, d), QueryKey(query, key, given.head_dim**-0.5)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("method", ["direct", "operator", "pairs", "attention"])
@pytest.mark.parametrize(("tokens", "queries"), [(48, 48), (160, 12), (160, 1)])
def test_operations_are_those_of_the_matrix_products(tokens: int, queries: int, method: Any, streams: int) -> None:
    wide = method != "attention"
    given = shape(tokens, 256, queries=queries, streams=streams, forms=0 if wide else 3)
    weights, x, attention = layer(given)
    chosen = planned(given, method if wide else "auto", wide=wide)
    scopes = weights.pairwise_scopes if wide else weights.all_scopes[:-2]
    rows = torch.arange(queries)
    with FlopCounterMode(display=False) as counter:
        wanted = LayerTask(weights, scopes, Rule(), "token", BACKENDS["torch"], torch.float32)
        run_dense(wanted, OneSequence(x, attention, rows), chosen)
    assert (chosen.blocks.queries, chosen.blocks.keys) == (queries, tokens)
    assert chosen.flops == given.flops(method)
    assert chosen.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_causal_pairs_halve_the_direct_method() -> None:
    whole, causal = shape(4096), shape(4096, causal=True)
    assert causal.flops("direct") / whole.flops("direct") == pytest.approx(0.5, abs=0.01)


# ---- the choice


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 256, 768])
def test_operator_overtakes_direct_near_its_break_even(width: int, causal: bool) -> None:
    """`ffattr.decomposition`: from about T > 4d/3, causal 8d/3. Mixing and features shift it by less than a third."""
    even = width * (8 if causal else 4) // 3
    assert planned(shape(even * 2 // 3, width, causal=causal)).method == "direct"
    assert planned(shape(even * 4 // 3, width, causal=causal)).method == "operator"


def test_far_from_break_even_counts_decide(rates: dict[str, tuple[float, float]]) -> None:
    for rates["both"] in ((1e12, 1e9), (1e9, 1e12)):
        assert planned(shape(8)).method == "direct"
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


# ---- blocks


def least(given: LayerShape, method: str) -> int:
    with pytest.raises(ValueError, match=r"memory_budget=1 bytes is too small for layer 3 ") as caught:
        planned(given, method, 1, layer=3)
    found = re.search(r"at least (\d+)", str(caught.value))
    assert found, caught.value
    return int(found[1])


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("method", ["direct", "operator", "attention"])
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


@pytest.mark.parametrize("method", ["direct", "operator"])
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


NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@pytest.mark.parametrize("method", ["direct", "operator"])
def test_narrow_operands_take_less_memory(method: Any) -> None:
    given = shape(50)
    whole = Blocks(50, 50, 50)
    single = given.bytes(method, whole, torch.float32)
    assert given.bytes(method, whole, torch.float64) > 1.6 * single
    for dtype in NARROW:  # float8 is for one matrix, the operands beside it are 2 bytes wide
        assert given.bytes(method, whole, dtype) == given.bytes(method, whole, torch.bfloat16) < single
        assert given.key_bytes(method, dtype) == given.key_bytes(method, torch.float32) // 2
        assert given.fixed_bytes(method, dtype) < given.fixed_bytes(method, torch.float32)
        assert given.key_bytes("attention", dtype) == given.key_bytes("attention", torch.float32)
        assert given.pair_bytes(method, dtype) == given.pair_bytes(method, torch.float32)
        assert given.query_bytes(method, dtype) == given.query_bytes(method, torch.float32)
    assert (
        planned(given, "direct", 3 * MiB, dtype=torch.bfloat16).blocks.ff_keys
        >= planned(given, "direct", 3 * MiB).blocks.ff_keys
    )


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


def test_printing() -> None:
    plan = Plan("torch", torch.float32, CPU)
    assert (plan.flops, plan.bytes) == (0, 0)
    plan.layers += [planned(shape(2000)), *(planned(shape(8), layer=index) for index in (1, 2, 3))]
    assert plan.flops == sum(p.flops for p in plan.layers)
    assert plan.bytes == max(p.bytes for p in plan.layers)
    header, first, others, total = str(plan).splitlines()  # layers that run alike share a line
    assert header == "torch backend, float32 on cpu"
    assert re.search(r"layer 0\b.*operator.*\b2000 queries x 2000 tokens.*\b2000 x 2000\b.*fewer operations", first)
    assert re.search(r"layer 1-3\b.*direct.*\b8 queries x 8 tokens.*\b8 x 8\b.*fewer operations", others)
    assert f"{plan.layers[0].flops / 1e9:.2f} GFLOP" in first
    assert str(Plan("triton", torch.bfloat16, CPU)).startswith("triton backend, bfloat16 on cpu\n")
    assert re.search(rf"total.*{plan.flops / 1e9:.2f} GFLOP.*{plan.bytes / MiB:.1f} MiB", total)


def test_printing_names_no_layer_that_did_not_run() -> None:
    plan = Plan("torch", torch.float32, CPU, [planned(shape(8), layer=index) for index in (0, 2)])
    assert "0-2" not in str(plan)


# ---- time

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


@pytest.mark.parametrize("method", ["direct", "operator", "attention"])
def test_the_whole_of_the_work_has_a_rate(method: Any) -> None:
    for streams in (1, 2):
        counts = shape(30, streams=streams, forms=3).work(method)
        assert set(counts) <= {rate.name for rate in fields(Rates)}
        assert min(counts.values()) > 0


def test_features_are_made_for_every_block_of_queries() -> None:
    given = shape(64, forms=2)
    one, four = (given.work("direct", Blocks(queries, 64, 64)) for queries in (64, 16))
    kept = given.work("direct", Blocks(16, 64, 64, grams=True))
    assert four["features"] == 4 * one["features"]
    assert four["gram"] == 4 * one["gram"] == 4 * kept["gram"]
    assert one["features"] < kept["features"] < four["features"]
    for same in ("direct", "mixing", "form", "slope", "attention"):
        assert four[same] == one[same]
    assert four["blocks"] == 4 * one["blocks"]


@pytest.mark.parametrize(("rates_of", "method"), [({"operator": 3e8}, "direct"), ({"direct": 3e8}, "operator")])
def test_rates_kept_here_decide_near_break_even(rates_of: dict[str, float], method: str) -> None:
    known(**rates_of)
    chosen = planned(shape(64 * 4 // 3))
    assert chosen.method == method
    assert re.match(r"faster here: \S+ s direct, \S+ s operator", chosen.reason)
    assert planned(shape(8)).method == "direct"  # far from it counts decide
    assert planned(shape(2000)).method == "operator"


# ---- memory of a pack, of scopes


def test_pairs_of_a_pack_are_within_its_sequences() -> None:
    joined = LayerShape.join([shape(20)] * 8)
    whole = Blocks(160, 160, 160)
    alone = replace(joined, longest=160, sequences=1, pairs=160 * 160, group_pairs=160 * 160)
    assert joined.bytes("operator", whole, torch.float32) < alone.bytes("operator", whole, torch.float32)


def test_scopes_take_memory() -> None:
    few, many = shape(200), shape(200, forms=3)
    whole = Blocks(200, 200, 200)
    assert few.bytes("operator", whole, torch.float32) < many.bytes("operator", whole, torch.float32)
    kept = replace(whole, queries=50, grams=True)
    assert many.bytes("direct", kept, torch.float32) - many.gram_bytes == many.bytes(
        "direct", replace(kept, grams=False), torch.float32
    )
