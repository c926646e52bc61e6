"""Vectors of single pairs, against the definition's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import random_layers
import torch
from made_packs import PassedPack, cut, define_vectors, pass_pack, sequences
from random_layers import TOKENS, WIDTH

from ffattr.decomposition.reference import Rule
from ffattr.decomposition.scopes import Scope
from ffattr.decomposition.walk import Stream
from ffattr.engine.pack import Pack
from ffattr.engine.pair_vectors import PairRows, _draw_pairs, nonzero_pairs, sample_pair_vectors
from ffattr.engine.query_pass import Pairs, Slopes, pass_queries
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
    """Those of all pairs, in an order of no meaning, behind another sequence."""
    layer = random_layers.layer(**KINDS[kind])
    one = cut(layer, list(range(6)), [4, 0, 5])
    given = pass_pack(layer, Pack((cut(layer, [7, 8], [1]), one)))
    pairs = []
    for source in given.sources:
        every = torch.cartesian_prod(torch.arange(3), torch.arange(source.starts[2] - source.starts[1]))
        query, key = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))].T
        pairs.append((query + 1, key))
    found = carry_pairs(layer, given, pairs)
    assert {*layer.weights.pairwise_scopes} < {*found}
    for scope in layer.weights.pairwise_scopes:
        first = 0
        for source, (query, key) in zip(given.sources, pairs, strict=True):
            vectors = found[scope].vectors[first : first + len(query)]
            expected = define_vectors(layer, one, scope.seen_from(source.path.source))
            torch.testing.assert_close(vectors, expected[query - 1, key], rtol=0, atol=1e-12, msg=str(scope))
            first += len(query)


def carry_pairs(layer: random_layers.RandomLayer, given: PassedPack, pairs: list[Pairs]) -> dict[Scope, Stream]:
    """The streams at the scopes that are seen from the own tokens, with these vectors."""
    found: dict[Scope, Stream] = {}

    def take(scope: Scope, stream: Stream) -> None:
        found[scope] = stream

    slopes, alpha = Slopes(Rule(), torch_kernels), [source.alpha(given.queries) for source in given.sources]
    pass_queries(layer.weights, given.sources, given.queries, given.routing, slopes, take, alpha=alpha, pairs=pairs)
    return found


def test_no_pairs() -> None:
    layer = random_layers.layer()
    given = pass_pack(layer, Pack((cut(layer, [0, 1], [1]),)))
    none = torch.empty(0, dtype=torch.int64)
    found = carry_pairs(layer, given, [(none, none)])
    assert {stream.vectors.shape for stream in found.values()} == {(0, WIDTH)}


def test_a_key_brings_something_by_attention_or_as_itself() -> None:
    layer = random_layers.layer()
    layer = replace(layer, attention=replace(layer.attention, causal=True))
    given = pass_pack(layer, Pack((cut(layer, list(range(4)), [2, 0]),)))
    alpha, (source,) = given.passed.alpha[0], given.sources
    assert nonzero_pairs(source, alpha, given.queries).long().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    silent = torch.zeros_like(alpha)
    assert nonzero_pairs(source, silent, given.queries).long().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("at_once", [100, 4, 1])
@pytest.mark.parametrize("decoder", [False, True])
def test_rows_are_filled_with_norms_and_keys_without_a_column_left_out(at_once: int, decoder: bool) -> None:
    layer = random_layers.layer(norms="post", decoder=decoder)
    one = cut(layer, list(range(5)), [3, 1])
    pack = Pack((replace(one, groups=torch.tensor([1, -1, 2, -1, 0])),))
    given = pass_pack(layer, pack)
    to = {scope: torch.zeros(2, 3, dtype=torch.float64) for scope in layer.weights.pairwise_scopes[1:]}
    if decoder:
        across = [scope.seen_from("cross") for scope in layer.weights.pairwise_scopes]
        to |= {scope: torch.zeros(2, given.sources[1].starts[1], dtype=torch.float64) for scope in across}
    rows = PairRows(given.sources, given.passed.alpha, given.queries, to, "l2")
    parts = list(rows.cut_pairs(at_once))
    assert max(len(query) for part in parts for query, _ in part) <= at_once
    for part in parts:
        for scope, stream in carry_pairs(layer, given, part).items():
            for source in given.sources:
                rows.take_stream(scope.seen_from(source.path.source), stream, part)
    for scope, found in to.items():
        norms = define_vectors(layer, one, scope).norm(dim=-1)
        torch.testing.assert_close(found, norms if scope.source == "cross" else norms[:, [4, 0, 2]], rtol=0, atol=1e-12)


def test_nothing_to_fill_is_one_part_all_the_same() -> None:
    layer = random_layers.layer()
    one = cut(layer, list(range(3)), [1])
    given = pass_pack(layer, Pack((replace(one, groups=torch.tensor([-1, -1, -1])),)))
    rows = PairRows(given.sources, given.passed.alpha, given.queries, {}, "l2")
    (part,) = rows.cut_pairs(10)
    assert [len(query) for query, _ in part] == [0]


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
