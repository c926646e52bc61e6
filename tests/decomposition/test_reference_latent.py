"""Latent attention: values that are made in two steps, with a norm between them, against the formula written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_layers import HEAD_DIM, HEADS, TOKENS, WIDTH, RandomLayer, layer

from ffattr.decomposition.affine import Linear, Norm
from ffattr.decomposition.layer import Latent
from ffattr.decomposition.reference import Rule, own_values

RANK = 4
ROWS = torch.arange(TOKENS)


def latent_layer(norms: str = "pre", kind: str = "rms") -> RandomLayer:
    given, generator = layer(norms=norms), torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    norm = Norm("layer", random(RANK), random(RANK), 1e-6) if kind == "layer" else Norm("rms", random(RANK), None, 1e-6)
    value = Linear(random(RANK, HEADS * HEAD_DIM), random(HEADS * HEAD_DIM))
    latent = Latent(Linear(random(WIDTH, RANK), random(RANK)), norm)
    return replace(given, weights=replace(given.weights, value=value, latent=latent))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("norms", ["pre", "post"])
def test_values_are_those_of_both_projections(norms: str, kind: str) -> None:
    given = latent_layer(norms, kind)
    weights, latent = given.weights, given.weights.latent
    assert latent is not None
    read = given.x
    if weights.norm_before_attn is not None:
        read = torch.nn.functional.rms_norm(read, (WIDTH,), weights.norm_before_attn.weight, 1e-6)
    read = read @ latent.down.weight + latent.down.bias
    norm = latent.norm
    if kind == "rms":
        read = torch.nn.functional.rms_norm(read, (RANK,), norm.weight, 1e-6)
    else:
        read = torch.nn.functional.layer_norm(read, (RANK,), norm.weight, norm.bias, 1e-6)
    expected = (read @ weights.value.weight + weights.value.bias).view(TOKENS, HEADS, HEAD_DIM)
    for value_bias in ("token", "separate"):
        values, constant = own_values(weights, given.x, value_bias)
        assert (constant is None) == (value_bias == "token")
        torch.testing.assert_close(values if constant is None else values + constant, expected, rtol=0, atol=1e-12)


def test_the_latent_is_linear_in_a_token_while_its_statistics_are_held_fixed() -> None:
    """Without biases, twice a token's latent direction is twice its value, whatever the norm would say."""
    given = latent_layer()
    assert given.weights.latent is not None
    bare = replace(given.weights, latent=replace(given.weights.latent, down=Linear(given.weights.latent.down.weight)))
    values, _ = own_values(bare, given.x, "separate")
    norm, before = bare.latent, bare.norm_before_attn
    assert norm is not None
    assert before is not None
    scale = norm.norm.scale(norm.down(before(given.x))) * before.scale(given.x)
    whole = torch.diag(before.weight) @ norm.down.weight @ torch.diag(norm.norm.weight) @ bare.value.weight
    torch.testing.assert_close(values.flatten(1), scale[:, None] * (given.x @ whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value_bias", ["token", "separate"])
@pytest.mark.parametrize("norms", ["pre", "post", "of"])
def test_maps_and_sums(norms: str, value_bias: str) -> None:
    given = latent_layer(norms, "layer")
    for stream in given.streams(ROWS, Rule(), value_bias).values():
        if stream.bias.numel():
            torch.testing.assert_close(stream.vectors.sum(1) + stream.bias, stream.total, rtol=0, atol=1e-10)
    expected = given.maps(given.weights.scopes, "reference", value_bias=value_bias)
    for backend, method in (("torch", "direct"), ("torch", "operator"), ("torch", "pairs"), ("cpu", "direct")):
        found = given.maps(given.weights.scopes, backend, method, value_bias=value_bias)
        for scope, tile in expected.maps.items():
            torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)
            torch.testing.assert_close(found.bias[scope], expected.bias[scope], rtol=0, atol=1e-10, msg=scope)


def test_its_parameters_have_names_and_are_converted() -> None:
    weights = latent_layer(kind="layer").weights
    names = {"latent.down.weight", "latent.down.bias", "latent.norm.weight", "latent.norm.bias"}
    assert names <= dict(weights.tensors()).keys()
    narrow = weights.map_parameters(
        lambda part: replace(
            part,
            weight=None if part.weight is None else part.weight.float(),
            bias=None if part.bias is None else part.bias.float(),
        )
    )
    assert {tensor.dtype for _, tensor in narrow.tensors()} == {torch.float32}
