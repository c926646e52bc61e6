"""What key tokens bring to the points of a layer, against the definition's vectors."""

from __future__ import annotations

import pytest
import random_layers
import torch
from made_packs import cut, define_vectors, pass_pack, sequences

from ffattr.decomposition import reference
from ffattr.engine.key_tokens import attention_paths, write_head_vectors
from ffattr.engine.pack import Pack

KINDS = {
    "pre": {"norms": "pre"},
    "post": {"norms": "post"},
    "of": {"norms": "of"},
    "decoder": {"norms": "post", "decoder": True},
}
POINTS = {"attn": "raw", "atb": "residual", "ff_input": "ff_input"}


def test_there_is_a_path_for_every_attention() -> None:
    own, cross = attention_paths(random_layers.layer(decoder=True).weights)
    assert (own.source, cross.source) == ("own", "cross")
    assert (own.reads_own_tokens, cross.reads_own_tokens) == (True, False)
    assert len(list(attention_paths(random_layers.layer().weights))) == 1


def test_points_without_a_norm_between_them_are_one() -> None:
    (pre,) = attention_paths(random_layers.layer(norms="pre").weights)
    assert pre.raw is pre.residual is not pre.ff_input
    (post,) = attention_paths(random_layers.layer(norms="post").weights)
    assert post.raw is not post.residual is post.ff_input
    assert (len(post.raw.norms), len(post.residual.norms)) == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_head_values_and_the_residual_are_the_vectors(kind: str) -> None:
    """With the scales of the norms, which are the query's."""
    layer = random_layers.layer(**KINDS[kind])
    one = cut(layer, list(range(7)), [4, 0, 6])
    given = pass_pack(layer, Pack((one,)))
    for number, source in enumerate(given.sources):
        for point, scale in (
            ("attn", None),
            ("atb", given.passed.residual_scale[number]),
            ("ff_input", given.passed.ff_scale[number]),
        ):
            if point == "ff_input" and layer.weights.norm_before_ff is None:
                continue
            stream_map = getattr(source.path, POINTS[point])
            found = torch.einsum("hnm,mhe->nmhe", given.passed.alpha[number], source.values).flatten(2)
            found = found @ stream_map.matrix
            if point != "attn" and source.path.reads_own_tokens:
                rows = torch.arange(3)
                found[rows, one.query_tokens] += source.residual_at(stream_map, one.query_tokens)
            if scale is not None:
                found = found * scale[:, None, None]
            scope = layer.weights.scope_at(point, source.path.source)  # type: ignore[arg-type]
            torch.testing.assert_close(found, define_vectors(layer, one, scope), rtol=0, atol=1e-12)


def test_an_encoders_token_has_no_residual() -> None:
    layer = random_layers.layer(norms="post", decoder=True)
    pack = Pack(tuple(sequences(layer)))
    own, cross = (path.key_tokens(pack, "token") for path in attention_paths(layer.weights))
    assert own.starts == pack.starts == (0, 5, 6, 15, 18)
    assert cross.starts == (0, 9, 20, 27, 37)  # eleven tokens, without as many as half of the sequence's own
    assert not cross.residual_at(cross.path.residual).any()
    assert cross.residual_at(cross.path.raw, torch.tensor([3, 36])).shape == (2, random_layers.WIDTH)
    assert torch.equal(own.residual_at(own.path.raw, slice(5, 6)), pack.x[5:6])


def test_weights_of_several_sequences_are_side_by_side_and_end_with_zeros() -> None:
    layer = random_layers.layer()
    pack = Pack(tuple(sequences(layer)))
    (source,) = (path.key_tokens(pack, "token") for path in attention_paths(layer.weights))
    queries = pack.query_block(0, 100)
    alpha = source.alpha(queries)
    assert alpha.shape == (random_layers.HEADS, 7, 9)  # one has nine tokens, though no query
    read = source.read_context(alpha, queries)
    for number, rows in queries.sequences():
        one = pack.sequences[number]
        own = one.attention.attention_weights(queries.token_in_sequence[rows])
        assert torch.equal(alpha[:, rows, : len(one.x)], own)
        assert not alpha[:, rows, len(one.x) :].any()
        values, _ = reference.own_values(layer.weights, one.x, "token")
        torch.testing.assert_close(read[rows], torch.einsum("hnm,mhe->nhe", own, values), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value_bias", ["token", "separate"])
def test_a_bias_of_values_is_the_tokens_or_nobodys(value_bias: str) -> None:
    layer = random_layers.layer(norms="post")
    (path,) = attention_paths(layer.weights)
    bias = layer.weights.value.bias
    assert bias is not None
    keys = path.key_tokens(Pack((cut(layer, [0, 1], [0]),)), value_bias)
    linear = (layer.x[:2] @ layer.weights.value.weight).view(2, random_layers.HEADS, -1)
    by_head = bias.view(random_layers.HEADS, -1)
    torch.testing.assert_close(keys.values, linear + by_head * (value_bias == "token"), rtol=0, atol=1e-12)
    if value_bias == "token":
        assert keys.constant is None
    else:
        torch.testing.assert_close(keys.constant, by_head)


def test_head_vectors_end_with_what_is_brought_beside_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    values, own = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 6, generator=generator)
    matrix = torch.randn(15, 6, generator=generator)
    to = torch.full((4, 4, 6), torch.nan)
    assert write_head_vectors(values, matrix, own, to) is to
    torch.testing.assert_close(to[:, :3], torch.einsum("mhe,hed->mhd", values, matrix.view(3, 5, 6)))
    assert torch.equal(to[:, 3], own)
