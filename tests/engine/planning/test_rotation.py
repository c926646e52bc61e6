"""Maps with the width rotated: the same norms with fewer products."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from op_cases import needs_binary
from plan_cases import planned
from random_layers import layer

from ffattr.engine.planning.costs import LayerShape
from ffattr.engine.planning.rotation import PAYS, choose_vectors, count_operations, count_zeros, rotate_down

BACKENDS = ["torch", pytest.param("cpu", marks=needs_binary)]


@pytest.mark.parametrize(("neurons", "width"), [(7, 12), (12, 12), (40, 12), (1, 5), (5, 1)])
def test_rotate_down(neurons: int, width: int) -> None:
    down = torch.randn(neurons, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn, rotated = rotate_down(down)
    torch.testing.assert_close(turn @ turn.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(rotated, down @ turn, rtol=0, atol=1e-14)
    assert torch.equal(rotated, rotated.tril())
    assert int((rotated == 0).sum()) == count_zeros(neurons, width)


def test_rotate_down_in_float32() -> None:
    """Norms as precise as the numbers."""
    down = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(50, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn, rotated = rotate_down(down)
    assert turn.dtype == rotated.dtype == torch.float32
    plain, found = (vectors @ down.double()).norm(dim=-1), (vectors @ rotated.double()).norm(dim=-1)
    assert float((found / plain - 1).abs().max()) < 1e-7


@pytest.mark.parametrize("method", ["direct", "operator"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("norms", "which"),
    [
        *itertools.product(["pre", "post", "of"], [(0,), (1,), (0, 1)]),
        ("post", (2,)),
    ],  # the last is the norm behind all
)
def test_maps_are_the_same(norms: str, which: tuple[int, ...], backend: str, method: str) -> None:
    """Of the scopes behind the feed-forward block that have these places."""
    for options in ({"gated": False}, {"gated": True}, {"decoder": True}):
        one = layer(norms=norms, **options)
        wanted = [one.weights.pairwise_scopes[place] for place in which]
        assert choose_vectors(one.weights, wanted)
        scopes = tuple(map(str, wanted))
        plain = one.maps(scopes, backend, method)
        for small in (False, True):
            found = one.maps(scopes, backend, method, rotated=True, small=small)
            assert found.maps.keys() == plain.maps.keys()
            for scope, expected in plain.maps.items():
                torch.testing.assert_close(found.maps[scope], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scopes_of_other_vectors_are_computed_as_they_are(backend: str) -> None:
    """A norm lies between them: also where a plan asks for it, nothing is rotated."""
    one = layer(norms="post")
    scopes = tuple(map(str, one.weights.pairwise_scopes[1:]))
    assert choose_vectors(one.weights, one.weights.pick_scopes(scopes)) == ()
    plain, found = one.maps(scopes, backend), one.maps(scopes, backend, rotated=True)
    assert all(torch.equal(found.maps[scope], expected) for scope, expected in plain.maps.items())


def test_mixtures_are_computed_as_they_are() -> None:
    one = layer(experts=4)
    scopes = tuple(map(str, one.weights.pairwise_scopes))
    assert choose_vectors(one.weights, one.weights.pick_scopes(scopes)) == ()
    plain, found = one.maps(scopes), one.maps(scopes, rotated=True)
    assert all(torch.equal(found.maps[scope], expected) for scope, expected in plain.maps.items())


SHAPE = LayerShape(512, 512, 512 * 512, 768, 3072, 12, 64, 1, rotatable=True)


def test_plan() -> None:
    """It is rotated where enough pairs share what it costs, and says so."""
    chosen = planned(SHAPE, method="direct")
    assert chosen.shape.rotated
    assert "rotated: 12% of the product is zero" in chosen.reason
    apart = planned(replace(SHAPE, rotatable=False), method="direct")
    assert apart.flops - chosen.flops == 2 * SHAPE.pairs * count_zeros(3072, 768)
    few = int(PAYS * count_operations(3072, 768) / (2 * count_zeros(3072, 768)))
    assert not planned(replace(SHAPE, pairs=few, group_pairs=few), method="direct").shape.rotated
    assert planned(replace(SHAPE, pairs=few + 1, group_pairs=few + 1), method="direct").shape.rotated


@pytest.mark.parametrize("method", ["mixed", "pairs"])
def test_plan_of_other_methods(method: str) -> None:
    assert not planned(SHAPE, method=method).shape.rotated
