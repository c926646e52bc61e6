"""A few layers one after the other: what they read and what comes from no token add up to what is read of the last."""

from __future__ import annotations

import random_layers
import torch

from ffattr.decomposition import reference
from ffattr.decomposition.reference import Rule
from ffattr.engine.pack import OneSequence
from ffattr.pipeline.toward.records import Recorded
from ffattr.pipeline.toward.walk_back import FlowAsked, Method, walk_back


def layers() -> list[Recorded]:
    """Three layers, each of which reads what the one before returns."""
    found, x = [], random_layers.layer().x
    for seed, options in enumerate(({}, {"norms": "post"}, {"experts": 3})):
        made = random_layers.layer(seed=seed, **options)
        rows = torch.arange(len(x))
        streams = reference.decompose(made.weights, x, made.attention, rows, Rule(), routing=made.routing)
        output = list(streams)[-1][1].total
        found.append(Recorded(made.weights, OneSequence(x, made.attention, rows, made.routing), output, 1e-9))
        x = output
    return found


def method() -> Method:
    return Method(Rule(), "token", lambda branch, path: reference.slopes(branch, path, Rule()))


def test_every_boundary_holds_all_of_the_number():
    recorded = layers()
    directions = torch.randn(2, *recorded[0].output.shape, generator=torch.Generator().manual_seed(1)).double()
    value = (directions * recorded[-1].output).sum((1, 2))
    taken: list[tuple[int, int]] = []
    directions[:, 5] = 0
    value = (directions * recorded[-1].output).sum((1, 2))
    flow = FlowAsked("ff_res", False, lambda layer, rows, found: taken.append((layer, len(rows) if found else 0)))
    boundaries = list(walk_back([2, 1, 0], recorded.__getitem__, directions, torch.ones(2).double(), method(), flow))
    assert [boundary.layer for boundary in boundaries] == [2, 1, 0]
    for boundary in boundaries:
        total = boundary.scores.sum(-1) + boundary.constant - 1
        assert torch.allclose(total, value, rtol=0, atol=1e-10)
        assert boundary.error < 1e-12
        assert boundary.states is None
    assert taken == [(2, 8), (2, 0), (1, 9), (0, 9)]  # nothing reads one token of the last layer


def test_a_layer_that_returned_something_else_shows():
    recorded = layers()
    off = recorded[1]._replace(output=recorded[1].output * 1.01)
    directions = torch.ones(1, *off.output.shape).double()
    (boundary,) = walk_back([1], lambda layer: off, directions, torch.zeros(1).double(), method())
    assert 0.009 < boundary.error < 0.011


def test_directions_of_nothing_give_nothing():
    recorded = layers()
    nothing = torch.zeros(1, 9, 12).double()
    (boundary,) = walk_back([0], recorded.__getitem__, nothing, torch.zeros(1).double(), method())
    assert not boundary.directions.any()
    assert not boundary.constant.any()
