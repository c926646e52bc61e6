"""A few layers one after the other: what they read and what comes from no token add up to what is read of the last."""

from __future__ import annotations

import math

import random_layers
import torch

from ffattr.decomposition import reference
from ffattr.decomposition.layer import LayerWeights
from ffattr.decomposition.reference import Rule
from ffattr.engine.pack import OneSequence
from ffattr.pipeline.toward.records import Recorded
from ffattr.pipeline.toward.walk_back import FlowAsked, Method, walk_back


def layers() -> list[tuple[LayerWeights, Recorded]]:
    """Three layers, each of which reads what the one before returns."""
    found, x = [], random_layers.layer().x
    for seed, options in enumerate(({}, {"norms": "post"}, {"experts": 3})):
        made = random_layers.layer(seed=seed, **options)
        rows = torch.arange(len(x))
        streams = reference.decompose(made.weights, x, made.attention, rows, Rule(), routing=made.routing)
        output = list(streams)[-1][1].total
        sequence = OneSequence(x, made.attention, rows, made.routing)
        found.append((made.weights, Recorded(sequence, output, 1e-9, {}, ())))
        x = output
    return found


def method() -> Method:
    return Method(Rule(), "token", lambda branch, path: reference.slopes(branch, path, Rule()))


def test_every_boundary_holds_all_of_the_number():
    recorded = layers()
    last = recorded[-1][1].output
    directions = torch.randn(2, *last.shape, generator=torch.Generator().manual_seed(1)).double()
    directions[:, 5] = 0
    value, constant = (directions * last).sum((1, 2)), torch.zeros(2).double()
    taken: list[tuple[int, int]] = []
    for number in (2, 1, 0):
        flow = FlowAsked("ff_res", False, lambda rows, found, n=number: taken.append((n, len(rows) if found else 0)))
        boundary = walk_back(*recorded[number], directions, method(), flow)
        directions, constant = boundary.directions, constant + boundary.constant
        assert torch.allclose(boundary.scores.sum(-1) + constant, value, rtol=0, atol=1e-10)
        assert boundary.error < 1e-12
        assert boundary.states is None
    assert taken == [(2, 8), (2, 0), (1, 9), (0, 9)]  # nothing reads one token of the last layer


def test_a_layer_that_returned_something_else_shows():
    weights, recorded = layers()[1]
    off = recorded._replace(output=recorded.output * 1.01)
    boundary = walk_back(weights, off, torch.ones(1, *off.output.shape).double(), method())
    assert 0.009 < boundary.error < 0.011


def test_an_output_that_is_nan_is_an_error_that_is_nan():
    """Python's max drops it."""
    weights, recorded = layers()[0]
    directions = torch.ones_like(recorded.output)[None]
    for broken in (0, len(directions[0]) - 1):
        output = recorded.output.clone()
        output[broken] = float("nan")
        assert math.isnan(walk_back(weights, recorded._replace(output=output), directions, method()).error)


def test_directions_of_nothing_give_nothing():
    boundary = walk_back(*layers()[0], torch.zeros(1, 9, 12).double(), method())
    assert not boundary.directions.any()
    assert not boundary.constant.any()
    assert boundary.error == 0
