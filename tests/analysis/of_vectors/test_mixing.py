from dataclasses import replace

import pandas as pd
import pytest
import tiny_models
from tiny_models import build, inputs

import ffattr
from ffattr.analysis import mixing_ratio

COLUMNS = ["layer", "batch", "query", "query_token", "context", "own", "ratio"]


def naive(vectors):
    rows = []
    for at, layer in enumerate(vectors.layers):
        for batch, mask in enumerate(vectors.mask):
            for n, query in enumerate(vectors.queries):
                if not mask[query]:
                    continue
                keys = vectors.values[at, batch, n]
                context = sum(keys[j] for j in range(len(keys)) if j != query and mask[j]).norm().item()
                own = keys[query].norm().item()
                name = vectors.tokens[batch][query]
                rows.append((layer, batch, query, name, context, own, context / (context + own)))
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("scope", ["attn", "atb", "layer"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_ratio_of_every_real_token(name, scope, padding):
    given = inputs(name, padding=padding)
    vectors = ffattr.vectors(build(name), given, scope=scope, layers=[1, 0], queries=[6, 0, 3])
    frame = mixing_ratio(vectors)
    pd.testing.assert_frame_equal(frame, naive(vectors), rtol=1e-12, atol=1e-12)
    real = vectors.mask[:, [6, 0, 3]].sum().item()
    assert len(frame) == 2 * real == (12 if padding is None else 10)


def test_blocks_of_queries_and_layers_are_the_whole():
    model, given = build("bert"), inputs("bert", padding="right")
    whole = mixing_ratio(ffattr.vectors(model, given, scope="atb"))
    parts = [
        mixing_ratio(ffattr.vectors(model, given, scope="atb", layers=layer, queries=queries))
        for layer in (0, 1)
        for queries in (slice(0, 4), slice(4, None))
    ]
    order = ["layer", "batch", "query"]
    found = pd.concat(parts).sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(found, whole.sort_values(order, ignore_index=True), rtol=1e-12)


def test_the_first_token_of_a_causal_model_has_no_context():
    """Exactly, not up to what a subtraction leaves."""
    frame = mixing_ratio(ffattr.vectors(build("gpt2"), inputs("gpt2"), scope="atb"))
    assert (frame[frame["query"] == 0]["ratio"] == 0).all()
    assert (frame[frame["query"] > 0]["ratio"] > 0.01).all()


def test_the_bias_is_left_out():
    vectors = ffattr.vectors(build("bert"), inputs("bert"), scope="atb")
    other = replace(vectors, bias=vectors.bias + 7, total=vectors.total + 7)
    pd.testing.assert_frame_equal(mixing_ratio(vectors), mixing_ratio(other))
    separate = ffattr.vectors(build("bert"), inputs("bert"), scope="atb", value_bias="separate")
    assert not mixing_ratio(separate)["ratio"].equals(mixing_ratio(vectors)["ratio"])  # it was part of the tokens'


def test_vectors_that_are_told_apart():
    with pytest.raises(ValueError, match=r"the vectors of attn_heads are told apart by head or by expert"):
        mixing_ratio(ffattr.vectors(build("bert"), inputs("bert"), scope="attn_heads"))


def test_an_encoders_tokens_are_no_context_of_their_own():
    model, given = build("bart"), tiny_models.inputs("bart", padding="right")
    vectors = ffattr.vectors(model, given, scope="cross.attn")
    assert vectors.key_mask.equal(given["attention_mask"].bool())
    with pytest.raises(ValueError, match=r"the keys of cross\.attn are the encoder's tokens"):
        mixing_ratio(vectors)
    decoder = ffattr.vectors(model, given, scope="decoder.atb")
    pd.testing.assert_frame_equal(mixing_ratio(decoder), naive(decoder), rtol=1e-12, atol=1e-12)
