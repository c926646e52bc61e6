"""The way through a layer, with attention and feed-forward networks that are made up."""

from __future__ import annotations

import pytest
import torch
from random_layers import WIDTH, layer

from ffattr.decomposition.affine import Norm
from ffattr.decomposition.layer import LayerWeights
from ffattr.decomposition.scopes import Source
from ffattr.decomposition.walk import Station, Stream, add_streams, join_streams, normalise_stream, walk

N = 2
STATIONS = {
    "pre": ["attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res"],
    "post": ["attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"],
    "of": ["attn", "atb", "atb_ff", "atb_ff_res"],
}


def stream(keys: int, seed: int = 0) -> Stream:
    """Random, of ``keys`` tokens, that adds up."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(N, keys, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64)
    return Stream(vectors, bias, vectors.sum(1) + bias)


def stations(weights: LayerWeights, own: Stream) -> list[Station]:
    def attend(source: Source) -> Stream:
        return stream(4 if source == "cross" else 3, seed=1)

    def double(read: Stream) -> Stream:
        return Stream(read.vectors * 2, read.bias * 2, read.total * 2)

    return list(walk(weights, own, attend, double))


@pytest.mark.parametrize("norms", STATIONS)
def test_stations_are_the_layers_summed_scopes_and_add_up(norms: str) -> None:
    found = stations(layer(norms=norms).weights, stream(3))
    assert [str(station.scope) for station in found] == STATIONS[norms]
    for station in found:
        one = station.stream
        torch.testing.assert_close(one.vectors.sum(1) + one.bias, one.total, rtol=0, atol=1e-12)


def test_a_decoder_passes_a_point_without_a_name() -> None:
    weights = layer(norms="post", decoder=True).weights
    found = stations(weights, stream(3))
    names = [None if station.scope is None else str(station.scope) for station in found]
    assert names == ["attn", "attn_res", None, "cross.attn", "cross.attn_res", *STATIONS["post"][2:]]
    assert [station.norm_scale is not None for station in found] == [False, False, True] + [False] * 2 + [
        *(True, False, False, True)
    ]
    assert found[2].stream.vectors.shape == (N, 3, WIDTH)
    assert found[4].stream.vectors.shape == (N, 3 + 4, WIDTH)  # the encoder's tokens behind the own ones
    assert torch.equal(found[4].stream.vectors[:, 3:], found[3].stream.vectors)


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
    assert one.vectors.shape == (N, 0, WIDTH)
    assert not one.bias.any()
    both = add_streams(one, one)
    assert torch.equal(both.total, 2 * total)
    assert join_streams(one, stream(3)).vectors.shape == (N, 3, WIDTH)


def test_a_norms_statistics_are_those_of_the_total() -> None:
    given = stream(3)
    gamma, beta = torch.linspace(1, 2, WIDTH).double(), torch.linspace(-1, 1, WIDTH).double()
    found, scale = normalise_stream(Norm("layer", gamma, beta, 1e-5), given)
    expected = torch.nn.functional.layer_norm(given.total, (WIDTH,), gamma, beta, 1e-5)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.vectors.sum(1) + found.bias, expected)
    torch.testing.assert_close(scale, (given.total.var(-1, unbiased=False) + 1e-5) ** -0.5)
    same, none = normalise_stream(None, given)
    assert (same, none) == (given, None)
