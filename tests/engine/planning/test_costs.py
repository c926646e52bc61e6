"""What a layer's maps cost: operations, and bytes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from plan_cases import MiB, planned, shape
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ffattr.bench.run import run_dense
from ffattr.decomposition.affine import Linear, Norm
from ffattr.decomposition.attention import QueryKey
from ffattr.decomposition.integrated_gradients import ACTIVATIONS
from ffattr.decomposition.layer import Branch, LayerWeights
from ffattr.decomposition.reference import Rule
from ffattr.engine.layer_maps import LayerTask
from ffattr.engine.machine_rates import Rates
from ffattr.engine.pack import OneSequence
from ffattr.engine.planning.costs import Blocks, LayerShape
from ffattr.ops.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread", "rates")


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
@pytest.mark.parametrize("method", ["direct", "operator", "mixed", "pairs", "attention"])
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


NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@pytest.mark.parametrize("method", ["direct", "operator", "mixed"])
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
        as_given = replace(given, rounded=False)
        assert as_given.bytes(method, whole, dtype) == single
    assert (
        planned(given, "direct", 3 * MiB, dtype=torch.bfloat16).blocks.ff_keys
        >= planned(given, "direct", 3 * MiB).blocks.ff_keys
    )


@pytest.mark.parametrize("method", ["direct", "operator", "mixed", "attention"])
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
