"""Decoder layers that also attend to an encoder: two sets of keys, one stream."""

from __future__ import annotations

import pytest
import torch
from random_layers import TOKENS, layer

from ffattr.decomposition.reference import Rule
from ffattr.decomposition.scopes import CROSS

ROWS = torch.arange(TOKENS)
MASKED = 4  # a token of the encoder that is padding


@pytest.mark.parametrize("value_bias", ["token", "separate"])
@pytest.mark.parametrize("norms", ["pre", "post", "of"])
def test_completeness_over_both_sets_of_keys(norms: str, value_bias: str) -> None:
    given = layer(norms=norms, decoder=True)
    streams = given.streams(ROWS, Rule(), value_bias)
    own = [scope.name for scope in given.weights.own_scopes]
    apart = {"attn_heads", "attn", "attn_res"}
    names = {*own, *(CROSS + name for name in own if name in apart and (name != "attn_res" or norms == "post"))}
    assert set(streams) == names
    for name in own[own.index("atb") :]:
        stream = streams[name]
        assert stream.vectors.shape[1] == 2 * TOKENS + 2
        torch.testing.assert_close(stream.vectors.sum(1) + stream.bias, stream.total, rtol=0, atol=1e-10)
        assert (stream.vectors[:, TOKENS + MASKED] == 0).all()
        assert (stream.vectors[:, TOKENS].norm(dim=-1) > 0).all()
    for name in ("attn", f"{CROSS}attn"):
        stream = streams[name]
        torch.testing.assert_close(stream.vectors.sum(1) + stream.bias, stream.total, rtol=0, atol=1e-10)
        torch.testing.assert_close(streams[f"{name}_heads"].vectors.sum(0), stream.vectors, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norms", ["pre", "post"])
def test_the_stream_is_the_layers(norms: str) -> None:
    """Written out with PyTorch's functions."""
    given = layer(norms=norms, decoder=True)
    weights, encoder = given.weights, given.encoder
    assert encoder is not None
    assert weights.cross is not None

    def attend(part, keys, attention):
        value = (keys @ part.value.weight + part.value.bias).unflatten(-1, (part.heads, -1)).transpose(0, 1)
        mixed = (attention.attention_weights(ROWS) @ value).transpose(0, 1).flatten(1)
        return mixed @ part.out.weight + part.out.bias

    def identity(x):
        return x

    x = given.x
    x = x + attend(weights, (weights.norm_before_attn or identity)(x), given.attention)
    x = (weights.norm_after_attn or identity)(x)
    x = (weights.cross.norm_after_attn or identity)(x + attend(weights.cross, encoder.states, encoder.attention))
    streams = given.streams(ROWS, Rule())
    torch.testing.assert_close(streams["atb"].total, x, rtol=0, atol=1e-12)
    t = (weights.norm_before_ff or identity)(x)
    hidden = torch.nn.functional.silu(weights.branches[0].gate(t)) * weights.branches[0].up(t)
    x = (weights.norm_after_ff or identity)(x + weights.branches[0].down(hidden))
    torch.testing.assert_close(streams[str(weights.own_scopes[-1])].total, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("norms", ["pre", "post"])
@pytest.mark.parametrize(
    ("backend", "method"),
    [("torch", "direct"), ("torch", "operator"), ("cpu", "direct"), ("cpu", "operator"), ("cpu", "mixed")],
)
def test_maps(norms: str, backend: str, method: str, experts: int) -> None:
    given = layer(norms=norms, decoder=True, experts=experts)
    scopes = given.weights.scopes
    if experts:
        by_expert = str(given.weights.expert_scope)
        scopes += (by_expert, CROSS + by_expert)
    for rule in (Rule(), Rule("midpoint", 5, "bias")):
        expected = given.maps(scopes, "reference", rule=rule)
        assert expected.maps[f"{CROSS}atb"].shape == (TOKENS, TOKENS + 2)
        for small in (False, True):
            found = given.maps(scopes, backend, method, rule=rule, small=small)
            for scope in scopes:
                torch.testing.assert_close(found.maps[scope], expected.maps[scope], rtol=0, atol=1e-10, msg=scope)
                torch.testing.assert_close(found.bias[scope], expected.bias[scope], rtol=0, atol=1e-10, msg=scope)
            torch.testing.assert_close(found.output, expected.output, rtol=0, atol=1e-12)
        assert (found.maps[f"{CROSS}atb"][:, MASKED] == 0).all()


@pytest.mark.parametrize("scope", ["attn", "atb", "atb_ln", "atb_ln_ff_res"])
def test_one_scope_of_one_set_of_keys(scope: str) -> None:
    given = layer(decoder=True)
    expected = given.maps(given.weights.scopes, "reference")
    for name in (scope, CROSS + scope):
        found = given.maps((name,), rows=torch.tensor([5, 0]))
        assert set(found.maps) == {name}
        torch.testing.assert_close(found.maps[name], expected.maps[name][[5, 0]], rtol=0, atol=1e-10)
