"""The way through a layer, with attention and feed-forward networks that are made up."""

from __future__ import annotations

import pytest
import torch
from random_layers import WIDTH, layer

from ffattr.decomposition.affine import Norm
from ffattr.decomposition.layer import LayerWeights
from ffattr.decomposition.scopes import Source
from ffattr.decomposition.walk import (
    Station,
    Stream,
    add_streams,
    join_streams,
    normalise_stream,
    scale_stream,
    select_rows,
    walk,
)

N = 2
STATIONS = {
    "pre": ["attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res"],
    "post": ["attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"],
    "of": ["attn", "atb", "atb_ff", "atb_ff_res"],
}


def stream(keys: int, seed: int = 0) -> Stream:
    """Random, of ``keys`` tokens for each query, that adds up."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(N, keys, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64)
    query = torch.arange(N).repeat_interleave(keys)
    return Stream.from_parts(vectors.flatten(0, 1), query, bias, vectors.sum(1) + bias)


def add_up(one: Stream) -> torch.Tensor:
    """The sum of each query's vectors, ``[N, d]``."""
    return torch.zeros_like(one.total).index_add_(0, one.query, one.vectors)


def stations(weights: LayerWeights, own: Stream) -> list[Station]:
    def attend(source: Source) -> Stream:
        return stream(4 if source == "cross" else 3, seed=1)

    def double(read: Stream) -> Stream:
        return read.with_rows(read.rows * 2)

    return list(walk(weights, own, attend, double))


@pytest.mark.parametrize("norms", STATIONS)
def test_stations_are_the_layers_summed_scopes_and_add_up(norms: str) -> None:
    found = stations(layer(norms=norms).weights, stream(3))
    assert [str(station.scope) for station in found] == STATIONS[norms]
    for station in found:
        one = station.stream
        torch.testing.assert_close(add_up(one) + one.bias, one.total, rtol=0, atol=1e-12)


def test_a_decoder_passes_a_point_without_a_name() -> None:
    weights = layer(norms="post", decoder=True).weights
    found = stations(weights, stream(3))
    names = [None if station.scope is None else str(station.scope) for station in found]
    assert names == ["attn", "attn_res", None, "cross.attn", "cross.attn_res", *STATIONS["post"][2:]]
    assert [station.norm_scale is not None for station in found] == [False, False, True] + [False] * 2 + [
        *(True, False, False, True)
    ]
    assert found[2].stream.pairs == N * 3
    assert found[4].stream.vectors.shape == (N * (3 + 4), WIDTH)  # the encoder's tokens behind the own ones
    assert torch.equal(found[4].stream.vectors[N * 3 :], found[3].stream.vectors)
    assert found[4].stream.query.tolist() == [0] * 3 + [1] * 3 + [0] * 4 + [1] * 4


def test_a_parallel_block_reads_the_layers_input() -> None:
    own = stream(3)
    before, after = (layer(norms="pre", parallel=parallel).weights for parallel in (True, False))
    assert before.norm_before_ff is not None
    found = {str(station.scope): station.stream for station in stations(before, own)}
    expected, _ = normalise_stream(before.norm_before_ff, own)
    assert torch.equal(found["atb_ln"].total, expected.total)
    torch.testing.assert_close(found["atb_ln_ff_res"].total, found["atb"].total + 2 * expected.total)
    other = {str(station.scope): station.stream for station in stations(after, own)}
    assert not torch.allclose(other["atb_ln"].total, expected.total)


def test_nothing_behind_the_last_station_asked_for_is_computed() -> None:
    def never(read: Stream) -> Stream:
        raise AssertionError("the feed-forward block ran")

    steps = walk(layer(norms="pre").weights, stream(3), lambda source: stream(3), never)
    assert [str(next(steps).scope) for _ in range(3)] == ["attn", "atb", "atb_ln"]
    with pytest.raises(AssertionError, match="the feed-forward block ran"):
        next(steps)


def test_a_stream_without_vectors() -> None:
    total = torch.ones(N, WIDTH)
    one = Stream.of_total(total)
    assert one.vectors.shape == (0, WIDTH)
    assert not one.bias.any()
    both = add_streams(one, one)
    assert torch.equal(both.total, 2 * total)
    assert join_streams(one, stream(3)).vectors.shape == (N * 3, WIDTH)


def test_other_totals_and_vectors() -> None:
    given = stream(3)
    one = given.with_total(torch.ones(N, WIDTH, dtype=torch.float64))
    assert (one.pairs, bool(one.vectors.any()), bool(one.bias.any()), bool(one.total.all())) == (
        N * 3,
        False,
        False,
        True,
    )
    other = given.with_vectors(given.total, torch.tensor([0, 1]))
    assert torch.equal(other.vectors, given.total)
    assert torch.equal(other.bias, given.bias)
    assert torch.equal(other.total, given.total)


def test_what_belongs_to_no_token_goes_to_bias_and_total() -> None:
    given, shift = stream(3), torch.ones(WIDTH, dtype=torch.float64)
    found = given.with_rows(given.rows * 2, shift)
    assert torch.equal(found.vectors, given.vectors * 2)
    assert torch.equal(found.bias, given.bias * 2 + 1)
    assert torch.equal(found.total, given.total * 2 + 1)


@pytest.mark.parametrize("keys", [0, 3])
def test_rows_of_some_queries_in_any_order(keys: int) -> None:
    given = stream(keys)
    some, index = select_rows(given, torch.tensor([1, 0]))
    assert torch.equal(some.total, given.total[[1, 0]])
    assert torch.equal(some.bias, given.bias[[1, 0]])
    assert torch.equal(some.rows, given.rows[index])
    torch.testing.assert_close(add_up(some), add_up(given)[[1, 0]])
    last, _ = select_rows(given, torch.tensor([1]))
    assert torch.equal(last.vectors, given.vectors[keys:])
    assert last.query.tolist() == [0] * keys


def test_a_number_of_each_query() -> None:
    given, factor = stream(3), torch.tensor([2.0, -1.0]).double()
    found = scale_stream(given, factor)
    assert torch.equal(found.total, given.total * factor[:, None])
    assert torch.equal(found.vectors, given.vectors * torch.tensor([2.0] * 3 + [-1.0] * 3)[:, None])
    assert scale_stream(given, None) is given


def test_a_norms_statistics_are_those_of_the_total() -> None:
    given = stream(3)
    gamma, beta = torch.linspace(1, 2, WIDTH).double(), torch.linspace(-1, 1, WIDTH).double()
    found, scale = normalise_stream(Norm("layer", gamma, beta, 1e-5), given)
    expected = torch.nn.functional.layer_norm(given.total, (WIDTH,), gamma, beta, 1e-5)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(add_up(found) + found.bias, expected)
    torch.testing.assert_close(scale, (given.total.var(-1, unbiased=False) + 1e-5) ** -0.5)
    same, none = normalise_stream(None, given)
    assert (same, none) == (given, None)
