"""Vectors of single pairs, against the definition's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import random_layers
import torch
from made_packs import cut, define_vectors, pass_pack, sequences
from random_layers import TOKENS, WIDTH

from ffattr.decomposition.reference import Rule
from ffattr.engine.pack import Pack
from ffattr.engine.pair_vectors import _draw_pairs, fill_pairs, nonzero_pairs, pair_vectors, sample_pair_vectors
from ffattr.engine.planning.costs import Blocks
from ffattr.engine.query_pass import Slopes
from ffattr.ops import torch_kernels

KINDS: dict[str, dict[str, Any]] = {
    "pre": {"norms": "pre"},
    "post": {"norms": "post", "gated": False},
    "of": {"norms": "of"},
    "mixture": {"norms": "of", "experts": 4},
    "decoder": {"norms": "post", "decoder": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_the_definitions(kind: str) -> None:
    """Of all pairs, in an order of no meaning, behind another sequence."""
    layer = random_layers.layer(**KINDS[kind])
    one = cut(layer, list(range(6)), [4, 0, 5])
    pack = Pack((cut(layer, [7, 8], [1]), one))
    given = pass_pack(layer, pack)
    for number, source in enumerate(given.sources):
        keys = source.starts[2] - source.starts[1]
        pairs = torch.cartesian_prod(torch.arange(3), torch.arange(keys))
        query, key = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))].T
        found = pair_vectors(layer.weights, source, number, given.passed, given.routing, query + 1, key)
        assert tuple(found) == layer.weights.pairwise_scopes
        for scope, vectors in found.items():
            expected = define_vectors(layer, one, scope.seen_from(source.path.source))
            torch.testing.assert_close(vectors, expected[query, key], rtol=0, atol=1e-12, msg=str(scope))


def test_no_pairs() -> None:
    layer = random_layers.layer()
    given = pass_pack(layer, Pack((cut(layer, [0, 1], [1]),)))
    none = torch.empty(0, dtype=torch.int64)
    found = pair_vectors(layer.weights, given.sources[0], 0, given.passed, None, none, none)
    assert {vectors.shape for vectors in found.values()} == {(0, WIDTH)}


def test_a_key_brings_something_by_attention_or_as_itself() -> None:
    layer = random_layers.layer()
    layer = replace(layer, attention=replace(layer.attention, causal=True))
    given = pass_pack(layer, Pack((cut(layer, list(range(4)), [2, 0]),)))
    assert nonzero_pairs(given.sources[0], 0, given.passed).long().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    silent = replace(given.passed, alpha=[torch.zeros_like(given.passed.alpha[0])])
    assert nonzero_pairs(given.sources[0], 0, silent).long().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("within", [Blocks(100, 100, 100), Blocks(1, 1, 2)])
def test_rows_are_filled_with_norms_and_keys_without_a_column_left_out(within: Blocks) -> None:
    layer = random_layers.layer(norms="post")
    one = cut(layer, list(range(5)), [3, 1])
    pack = Pack((replace(one, groups=torch.tensor([1, -1, 2, -1, 0])),))
    given = pass_pack(layer, pack)
    to = {scope: torch.zeros(2, 3, dtype=torch.float64) for scope in layer.weights.pairwise_scopes[1:]}
    fill_pairs(layer.weights, given.sources, given.passed, None, within, to)
    for scope, rows in to.items():
        norms = define_vectors(layer, one, scope).norm(dim=-1)
        torch.testing.assert_close(rows, norms[:, [4, 0, 2]], rtol=0, atol=1e-12)


def test_a_sample_is_of_vectors_of_the_pack() -> None:
    layer = random_layers.layer(norms="post", decoder=True)
    pack = Pack(tuple(sequences(layer)))
    given = pass_pack(layer, pack)
    slopes = Slopes(Rule(), torch_kernels)

    def sample(seed: int) -> dict[Any, torch.Tensor]:
        return sample_pair_vectors(layer.weights, pack, given.sources, slopes, 20, torch.Generator().manual_seed(seed))

    found = sample(0)
    assert tuple(found) == layer.weights.pairwise_scopes
    for scope, vectors in found.items():
        assert vectors.shape == (2 * 20, WIDTH)  # of each source of keys
        every = torch.cat(
            [
                define_vectors(layer, one, scope.seen_from(source)).flatten(0, 1)
                for source in ("own", "cross")
                for one in pack.sequences
                if len(one.query_tokens)
            ]
        )
        apart = (vectors[:, None] - every).abs().amax(-1)
        assert apart.amin(1).max() < 1e-12
        assert (vectors.norm(dim=-1) > 0).all()
        assert torch.equal(vectors, sample(0)[scope])
        assert not torch.equal(vectors, sample(1)[scope])


def test_pairs_are_drawn_among_those_with_weight_alone_and_alike() -> None:
    nonzero = torch.zeros(4, TOKENS, dtype=torch.bool)
    nonzero[0, 2] = nonzero[2, [0, 3, 8]] = True
    row, column = _draw_pairs(nonzero, 4000, torch.Generator().manual_seed(0))
    assert len(row) == len(column) == 4000
    assert row.diff().min() >= 0
    counts = torch.zeros(4, TOKENS).index_put_((row, column), torch.ones(4000), accumulate=True)
    assert not counts[~nonzero].any()
    assert (counts[nonzero] - 1000).abs().max() < 150  # five standard deviations


def test_nothing_is_drawn_where_there_is_nothing() -> None:
    row, column = _draw_pairs(torch.zeros(3, 5, dtype=torch.bool), 7, torch.Generator())
    assert (len(row), len(column)) == (0, 0)
