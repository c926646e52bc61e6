"""Mixtures of experts: the engine's way, one dense block for every set of experts, against the definition's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import random_layers
import torch
from random_layers import NEURONS, TOKENS, RandomLayer, layer

from ffattr.decomposition.activations import ACTIVATIONS
from ffattr.decomposition.affine import Linear
from ffattr.decomposition.clamp import Clamp
from ffattr.decomposition.layer import Branch
from ffattr.decomposition.reference import Rule
from ffattr.decomposition.routing import Routing
from ffattr.engine.planning.costs import LayerShape

ROWS = torch.arange(TOKENS)
RULES = [Rule(), Rule(baseline="bias"), Rule("midpoint", 5), Rule("gauss-legendre", 7, "bias")]
KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "dense": {"gated": False},
    "norm-of": {"norms": "of"},
    "post": {"norms": "post", "gated": False},
    "clamped": {"clamp": Clamp(limit=0.6, offset=1.0)},
    "scales-input": {},
}


def mixture(kind: str, experts: int = 5, active: int = 2, **more: Any) -> RandomLayer:
    given = layer(experts=experts, active=active, **KINDS[kind], **more)
    (branch,) = given.weights.branches
    branch = replace(branch, scales_input=kind == "scales-input")
    return replace(given, weights=replace(given.weights, branches=(branch,)))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_bias_add_up(kind: str, rule: Rule) -> None:
    """By sums that only hold where the activation's factors are complete: not for a rule of few nodes."""
    given = mixture(kind)
    for scope, stream in given.streams(ROWS, rule).items():
        if stream.bias.numel() and (rule.name == "exact" or "_ff" not in scope):
            torch.testing.assert_close(stream.vectors.sum(1) + stream.bias, stream.total, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_block_is_the_weighted_sum_of_its_experts(kind: str) -> None:
    """Written out token by token."""
    given = mixture(kind)
    streams = given.streams(ROWS, Rule())
    weights, routing = given.weights, given.routing
    assert routing is not None
    read = streams["atb" if weights.norm_before_ff is None else "atb_ln"].total
    for token in range(TOKENS):
        added = torch.zeros(random_layers.WIDTH, dtype=torch.float64)
        for number, share in zip(routing.index[token].tolist(), routing.weight[token], strict=True):
            inside = share if weights.branches[0].scales_input else 1
            up = inside * read[token] @ weights.branches[0].up.weight[number] + weights.branches[0].up.bias[number]
            hidden = up
            if weights.branches[0].gate is not None:
                gate = inside * read[token] @ weights.branches[0].gate.weight[number]
                gate = gate + weights.branches[0].gate.bias[number]
                if weights.branches[0].clamp is not None:
                    gate, up = gate.clamp(max=0.6), up.clamp(-0.6, 0.6) + 1
                hidden = torch.nn.functional.silu(gate) * up
            else:
                hidden = torch.nn.functional.silu(up)
            returned = hidden @ weights.branches[0].down.weight[number] + weights.branches[0].down.bias[number]
            added += returned if weights.branches[0].scales_input else share * returned
        expected = added if weights.norm_of_ff is None else weights.norm_of_ff(added)
        torch.testing.assert_close(streams[str(weights.scope_at("ff"))].total[token], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "method"),
    [("torch", "direct"), ("torch", "operator"), ("torch", "mixed"), ("cpu", "direct"), ("cpu", "operator")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_maps(kind: str, backend: str, method: str) -> None:
    given = mixture(kind)
    scopes = (*given.weights.scopes, str(given.weights.expert_scope))
    for rule in RULES[:3]:
        expected = given.maps(scopes, "reference", rule=rule)
        for small in (False, True):
            found = given.maps(scopes, backend, method, rule=rule, small=small)
            for scope in scopes:
                torch.testing.assert_close(found.maps[scope], expected.maps[scope], rtol=0, atol=1e-10, msg=scope)
                torch.testing.assert_close(found.bias[scope], expected.bias[scope], rtol=0, atol=1e-10, msg=scope)
            torch.testing.assert_close(found.output, expected.output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_one_scope_alone_and_some_queries(backend: str) -> None:
    given = mixture("gated")
    rows = torch.tensor([7, 2, 2])
    every = given.maps((*given.weights.scopes, str(given.weights.expert_scope)), "reference")
    for scope in every.maps:
        found = given.maps((scope,), backend, rows=rows)
        torch.testing.assert_close(found.maps[scope], every.maps[scope][..., rows, :], rtol=0, atol=1e-10)
        torch.testing.assert_close(found.output, every.output[rows], rtol=0, atol=1e-12)


def test_maps_by_expert_are_in_the_order_of_the_routing() -> None:
    """An expert without weight brings nothing, wherever it stands in a token's row."""
    given = mixture("gated", active=3)
    assert given.routing is not None
    given.routing.weight[2, 1] = 0
    scope = str(given.weights.expert_scope)
    found = given.maps((scope,)).maps[scope]
    silent = (found == 0).all(-1)
    assert silent.nonzero().tolist() == [[1, 2]]


def test_one_expert_of_weight_one_is_a_dense_layer() -> None:
    given = mixture("gated", experts=1, active=1)
    assert given.routing is not None
    given.routing.weight.fill_(1)
    branch = given.weights.branches[0].expert(0, torch.float64)
    single = replace(given.weights, branches=(branch,))
    dense = RandomLayer(single, given.x, given.attention, None, None)
    scopes = given.weights.scopes
    for scope, tile in dense.maps(scopes).maps.items():
        torch.testing.assert_close(given.maps(scopes).maps[scope], tile, rtol=0, atol=1e-12)


def test_sets_of_experts() -> None:
    routing = Routing(torch.tensor([[3, 1], [0, 2], [1, 3], [1, 3]]), torch.rand(4, 2))
    found = {experts: (tokens.tolist(), slots.tolist()) for experts, tokens, slots in routing.by_set()}
    assert found == {(0, 2): ([1], [[0, 1]]), (1, 3): ([0, 2, 3], [[1, 0], [0, 1], [0, 1]])}
    of_one = {number: (tokens.tolist(), slots.tolist()) for number, tokens, slots in routing.by_expert()}
    assert of_one == {0: ([1], [0]), 1: ([0, 2, 3], [1, 0, 0]), 2: ([1], [1]), 3: ([0, 2, 3], [0, 1, 1])}


@pytest.mark.parametrize("method", ["direct", "operator", "mixed"])
def test_each_set_of_experts_is_prepared_for_every_source(method: Any) -> None:
    """The features of all keys, and the maps from values to pre-activations; the mixed method has neither."""
    weights = layer(decoder=True, experts=4).weights
    one, three = (LayerShape.from_weights(weights, 9, 20, 100, experts=2, expert_sets=sets) for sets in (1, 3))
    wide = 2 * NEURONS
    maps = 2.0 * 2 * one.inner * one.width * wide * 2  # gate and up, own tokens and the encoder's
    features = 2.0 * 2 * 20 * (one.inner + one.width) * wide
    expected = {"direct": maps + features, "operator": maps, "mixed": 0}[method]
    assert three.flops(method) - one.flops(method) == pytest.approx(2 * expected)
    alone = replace(one, sources=1)
    assert one.flops("direct") - alone.flops("direct") == pytest.approx(maps / 2)


# ---- several branches: a network that all tokens go through beside the experts


def shared_expert(kind: str, seed: int = 3, weighed: bool = False, **more: Any) -> RandomLayer:
    """A mixture with a dense network beside it, wider than an expert."""
    given = mixture(kind, **more)
    generator = torch.Generator().manual_seed(seed)

    def linear(inputs: int, outputs: int) -> Linear:
        weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64) / inputs**0.5
        return Linear(weight, torch.randn(outputs, generator=generator, dtype=torch.float64))

    (experts,) = given.weights.branches
    width, neurons = random_layers.WIDTH, NEURONS + 4
    gate = None if experts.gate is None else linear(width, neurons)
    beside = Branch(linear(width, neurons), gate, linear(neurons, width), ACTIVATIONS["gelu"], weighed=weighed)
    if weighed:
        assert given.routing is not None
        gain = torch.linspace(-1, 2, len(given.routing.index), dtype=torch.float64)
        given = replace(given, routing=replace(given.routing, gain=gain))
    return replace(given, weights=replace(given.weights, branches=(beside, experts)))


def test_what_a_shared_expert_returns_is_multiplied_by_a_number_of_each_token() -> None:
    plain, weighed = shared_expert("gated"), shared_expert("gated", weighed=True)
    assert weighed.routing is not None
    assert weighed.routing.gain is not None
    gain, ff = weighed.routing.gain, str(weighed.weights.expert_scope)
    before, after = (given.streams(ROWS, Rule()) for given in (plain, weighed))
    torch.testing.assert_close(after[ff].vectors[:2], before[ff].vectors[:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[ff].vectors[2], before[ff].vectors[2] * gain[:, None, None], rtol=0, atol=1e-12)
    beside, read = weighed.weights.branches[0], before["atb_ln"].total
    assert beside.gate is not None
    returned = beside.down(torch.nn.functional.gelu(beside.gate(read)) * beside.up(read))
    block = str(weighed.weights.scope_at("ff"))
    added = after[block].total - before[block].total
    torch.testing.assert_close(added, returned * (gain - 1)[:, None], rtol=0, atol=1e-11)


def test_a_routing_keeps_the_gain_of_its_tokens() -> None:
    routing = Routing(torch.tensor([[3, 1], [0, 2]]), torch.rand(2, 2), torch.tensor([0.25, 0.5]))
    one, both = routing.of(torch.tensor([1])), Routing.join([routing, routing])
    assert both.index.tolist() == [[3, 1], [0, 2], [3, 1], [0, 2]]
    assert one.gain is not None
    assert both.gain is not None
    assert one.gain.tolist() == [0.5]
    assert both.gain.tolist() == [0.25, 0.5, 0.25, 0.5]
    wide = routing.to(routing.index.device, torch.float64)
    assert wide.gain is not None
    assert wide.gain.dtype == wide.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", ["gated", "post"])
def test_a_shared_expert_is_added_to_the_mixture(kind: str) -> None:
    """Vectors add up, and are those of the two networks alone, whose sum is normed as one."""
    given = shared_expert(kind)
    streams, ff = given.streams(ROWS, Rule()), str(given.weights.scope_at("ff"))
    parts = [
        replace(given, weights=replace(given.weights, branches=(branch,))).streams(ROWS, Rule())[ff]
        for branch in given.weights.branches
    ]
    torch.testing.assert_close(streams[ff].vectors, parts[0].vectors + parts[1].vectors, rtol=0, atol=1e-12)
    torch.testing.assert_close(streams[ff].total, parts[0].total + parts[1].total, rtol=0, atol=1e-12)
    for stream in streams.values():
        if stream.bias.numel():
            torch.testing.assert_close(stream.vectors.sum(1) + stream.bias, stream.total, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("backend", "method"), [("torch", "direct"), ("torch", "operator"), ("torch", "pairs"), ("cpu", "direct")]
)
@pytest.mark.parametrize("kind", ["gated", "post", "weighed", "scales-input"])
def test_maps_with_a_shared_expert(kind: str, backend: str, method: str) -> None:
    given = shared_expert("gated", weighed=True) if kind == "weighed" else shared_expert(kind)
    by_expert = () if method == "pairs" else (str(given.weights.expert_scope),)
    scopes = (*given.weights.scopes, *by_expert)
    expected = given.maps(scopes, "reference")
    for small in (False, True):
        found = given.maps(scopes, backend, method, small=small)
        for scope in scopes:
            torch.testing.assert_close(found.maps[scope], expected.maps[scope], rtol=0, atol=1e-10, msg=scope)
            torch.testing.assert_close(found.bias[scope], expected.bias[scope], rtol=0, atol=1e-10, msg=scope)
        torch.testing.assert_close(found.output, expected.output, rtol=0, atol=1e-12)


def test_two_dense_branches_are_one_wider_network() -> None:
    given = shared_expert("gated", experts=1, active=1)
    dense, experts = given.weights.branches
    second = experts.expert(0, torch.float64)
    both = replace(given.weights, branches=(dense, replace(second, activation=dense.activation)))
    assert second.gate is not None
    assert dense.gate is not None

    def side_by_side(one: Linear, other: Linear) -> Linear:
        assert one.bias is not None
        assert other.bias is not None
        return Linear(torch.cat([one.weight, other.weight], 1), torch.cat([one.bias, other.bias]))

    assert dense.down.bias is not None
    assert second.down.bias is not None
    down = Linear(torch.cat([dense.down.weight, second.down.weight]), dense.down.bias + second.down.bias)
    wide = Branch(side_by_side(dense.up, second.up), side_by_side(dense.gate, second.gate), down, dense.activation)
    given = replace(given, routing=None)
    scopes = given.weights.scopes
    for backend in ("reference", "torch", "cpu"):
        found = replace(given, weights=both).maps(scopes, backend).maps
        expected = replace(given, weights=replace(both, branches=(wide,))).maps(scopes, backend).maps
        for scope in scopes:
            torch.testing.assert_close(found[scope], expected[scope], rtol=0, atol=1e-10, msg=scope)
