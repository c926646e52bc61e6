"""Directions pulled back through a layer: they read its input as the definition's vectors are read at its output."""

from __future__ import annotations

from typing import Any

import pytest
import random_layers
import torch
from random_layers import RandomLayer
from torch import Tensor

from ffattr.decomposition.adjoint.layer import Flow, LayerAdjoint, paths_of_point
from ffattr.decomposition.adjoint.pieces import transpose_norm
from ffattr.decomposition.clamp import Clamp
from ffattr.decomposition.reference import Rule
from ffattr.decomposition.scopes import Point, Source

KINDS: dict[str, dict[str, Any]] = {
    "post-LN": {"norms": "post", "gated": False},
    "pre-LN, gated": {},
    "norms of what blocks return": {"norms": "of"},
    "parallel": {"parallel": True, "gated": False},
    "mixture": {"experts": 4},
    "mixture, clamped": {"experts": 3, "clamp": Clamp(0.5, 1.0)},
    "cross-attention": {"decoder": True},
    "cross-attention, post-LN": {"decoder": True, "norms": "post"},
}
KIND = pytest.mark.parametrize("kind", KINDS)
BASELINES = ("zero", "bias", torch.linspace(-1, 1, random_layers.NEURONS, dtype=torch.float64))


def directions(layer: RandomLayer, count: int = 3, seed: int = 5) -> Tensor:
    drawn = torch.randn(count, *layer.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[:, 4] = 0  # nothing reads this token
    return drawn


def pulled(
    layer: RandomLayer,
    rule: Rule,
    value_bias: str = "token",
    point: Point = "ff_res",
    by_head: bool = False,
    blocks: tuple[int, ...] = (4, 5),
) -> tuple[LayerAdjoint, list[tuple[Tensor, Flow]], Tensor]:
    """Block of queries by block; the second block comes first."""
    wanted = directions(layer)
    adjoint = LayerAdjoint(
        layer.weights, layer.x, layer.attention, len(wanted), rule, value_bias, layer.routing, layer.encoder
    )
    flows, output = [], torch.zeros_like(layer.x)
    for rows in reversed(torch.arange(len(layer.x)).split(list(blocks))):
        output[rows], frozen = adjoint.pull_back(rows, wanted[:, rows])
        flows.append((rows, adjoint.trace_flow(rows, wanted[:, rows], frozen, *paths_of_point(point), by_head)))
    adjoint.join_blocks()
    return adjoint, flows, output


def joined(flows: list[tuple[Tensor, Flow]], source: Source) -> Tensor:
    rows = torch.cat([rows for rows, _ in flows])
    return torch.cat([flow.tiles[source] for _, flow in flows], -2)[..., rows.argsort(), :]


@KIND
@pytest.mark.parametrize("baseline", BASELINES, ids=("zero", "bias", "given"))
@pytest.mark.parametrize("value_bias", ["token", "separate"])
def test_flow_is_the_direction_times_the_vectors_of_the_definition(kind, baseline, value_bias):
    layer, rule = random_layers.layer(**KINDS[kind]), Rule(baseline=baseline)
    if layer.routing is not None and isinstance(baseline, Tensor):
        rule = Rule()
    last = list(layer.streams(torch.arange(len(layer.x)), rule, value_bias).values())[-1]
    _, flows, output = pulled(layer, rule, value_bias)
    expected = torch.einsum("kid,ijd->kij", directions(layer), last.vectors)
    own = len(layer.x)
    assert torch.allclose(joined(flows, "own"), expected[..., :own], rtol=0, atol=1e-11)
    if layer.encoder is not None:
        assert torch.allclose(joined(flows, "cross"), expected[..., own:], rtol=0, atol=1e-11)
    assert torch.allclose(output, last.total, rtol=0, atol=1e-11)


@KIND
@pytest.mark.parametrize("baseline", BASELINES[:2], ids=("zero", "bias"))
@pytest.mark.parametrize("value_bias", ["token", "separate"])
def test_scores_and_the_constant_are_all_there_is(kind, baseline, value_bias):
    """What tokens give is the sum of their columns where no bias is theirs; with the constant it is all of y."""
    layer, rule = random_layers.layer(**KINDS[kind]), Rule(baseline=baseline)
    adjoint, flows, output = pulled(layer, rule, value_bias)
    scores = (adjoint.own * layer.x).sum(-1)
    parts = [scores]
    if layer.encoder is not None:
        assert adjoint.encoder is not None
        parts.append((adjoint.encoder * layer.encoder.states).sum(-1))
    value = (directions(layer) * output).sum((1, 2))
    assert torch.allclose(sum(part.sum(-1) for part in parts) + adjoint.constant, value, rtol=0, atol=1e-10)
    if value_bias == "separate":
        for part, source in zip(parts, ("own", "cross"), strict=False):
            assert torch.allclose(joined(flows, source).sum(1), part, rtol=0, atol=1e-11)


@KIND
def test_heads_and_the_residual_add_up_to_the_flow(kind):
    layer = random_layers.layer(**KINDS[kind])
    _, whole, _ = pulled(layer, Rule())
    _, apart, _ = pulled(layer, Rule(), by_head=True)
    heads = joined(apart, "own")
    assert heads.shape == (3, random_layers.HEADS, len(layer.x), len(layer.x))
    residual = torch.cat([flow.residual for _, flow in apart], 1)[:, torch.cat([r for r, _ in apart]).argsort()]
    assert torch.allclose(heads.sum(1) + torch.diag_embed(residual), joined(whole, "own"), rtol=0, atol=1e-11)


@KIND
def test_what_bypasses_the_feed_forward_block_and_what_goes_through_it_add_up(kind):
    layer = random_layers.layer(**KINDS[kind])
    both, bypass, through = (joined(pulled(layer, Rule(), point=point)[1], "own") for point in ("ff_res", "atb", "ff"))
    assert torch.allclose(bypass + through, both, rtol=0, atol=1e-11)
    assert through.abs().max() > 1e-3


@KIND
def test_a_flow_before_the_block_reads_the_vectors_that_are_there(kind):
    """Behind the block is a norm at most, which reads the sum of what bypassed the block and what it returned."""
    layer = random_layers.layer(**KINDS[kind])
    weights = layer.weights
    streams = layer.streams(torch.arange(len(layer.x)), Rule())
    wanted = directions(layer)
    if weights.norm_after_ff is not None:
        total = streams[str(weights.scope_at("ff_res"))].total
        wanted = transpose_norm(weights.norm_after_ff, weights.norm_after_ff.scale(total), wanted)
    for point in ("atb", "ff"):
        vectors = streams[str(weights.scope_at(point))].vectors[:, : len(layer.x)]
        expected = torch.einsum("kid,ijd->kij", wanted, vectors)
        found = joined(pulled(layer, Rule(), point=point)[1], "own")
        assert torch.allclose(found, expected, rtol=0, atol=1e-11), point
    if weights.norm_after_attn is None and weights.cross is None:
        vectors = streams["attn"].vectors
        found = joined(pulled(layer, Rule(), point="attn")[1], "own")
        assert torch.allclose(found, torch.einsum("kid,ijd->kij", wanted, vectors), rtol=0, atol=1e-11)


def test_blocks_do_not_change_what_is_found():
    layer = random_layers.layer(experts=4)
    one, flows, _ = pulled(layer, Rule(), blocks=(9,))
    many, others, _ = pulled(layer, Rule(), blocks=(1, 1, 3, 2, 2))
    assert torch.allclose(one.own, many.own, rtol=0, atol=1e-12)
    assert torch.allclose(one.constant, many.constant, rtol=0, atol=1e-12)
    assert torch.allclose(joined(flows, "own"), joined(others, "own"), rtol=0, atol=1e-12)


def test_blocks_of_queries_are_bounded_and_complete(monkeypatch):
    """What is largest of a query: the weights of all heads, or each direction at all neurons or keys."""
    layer, rows = random_layers.layer(), torch.arange(9)
    adjoint = LayerAdjoint(layer.weights, layer.x, layer.attention, 2, Rule())
    largest = max(random_layers.HEADS * 9, 2 * max(2 * random_layers.NEURONS, 9))
    monkeypatch.setattr("ffattr.decomposition.adjoint.layer._AT_ONCE", 4 * largest)
    blocks = list(adjoint.cut_rows(rows))
    assert torch.equal(torch.cat(blocks), rows)
    assert max(map(len, blocks)) * largest <= 4 * largest
    assert len(blocks) == 3
    monkeypatch.setattr("ffattr.decomposition.adjoint.layer._AT_ONCE", 1)
    assert [len(block) for block in adjoint.cut_rows(rows[:2])] == [1, 1]


@KIND
def test_projections_are_those_of_the_vectors_of_every_scope(kind):
    layer, rows = random_layers.layer(**KINDS[kind]), torch.tensor([1, 4, 8])
    direction = torch.randn(random_layers.WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    adjoint = LayerAdjoint(layer.weights, layer.x, layer.attention, 1, Rule(), "token", layer.routing, layer.encoder)
    frozen, _ = adjoint.freeze_queries(rows)
    streams, own = layer.streams(rows, Rule()), len(layer.x)
    for scope in layer.weights.all_scopes:
        stream = (
            streams[str(scope.seen_from("own"))] if scope.point not in ("attn", "attn_res") else streams[str(scope)]
        )
        flow, bias = adjoint.project_vectors(rows, direction, frozen, scope)
        vectors = stream.vectors @ direction
        if scope.source == "cross" and scope.point not in ("attn", "attn_res"):
            vectors = vectors[..., own:]
        elif scope.source == "own":
            vectors = vectors[..., :own]
        assert torch.allclose(flow.tiles[scope.source][0], vectors, rtol=0, atol=1e-11), scope
        if scope.axis is None:
            assert torch.allclose(bias, stream.bias @ direction, rtol=0, atol=1e-11), scope
