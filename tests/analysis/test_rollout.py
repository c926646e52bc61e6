import pandas as pd
import pytest
import torch
from synthetic import PRE_LN, attribution
from tiny_models import build, inputs

import ffattr
from ffattr.analysis import rollout, rollout_maps

COLUMNS = ["scope", "layer", "batch", "query", "key", "query_token", "key_token", "share"]


def naive(layers, real, residual):
    """Of one sequence: products of matrices of its real tokens alone, in plain loops."""
    places = [t for t, there in enumerate(real.tolist()) if there]
    reached, found = {(i, j): float(i == j) for i in places for j in places}, []
    for layer in layers:
        one = {}
        for i in places:
            total = sum(float(layer[i, j]) for j in places)
            for j in places:
                one[i, j] = (1 - residual) * float(layer[i, j]) / total + residual * (i == j)
        reached = {(i, j): sum(one[i, k] * reached[k, j] for k in places) for i in places for j in places}
        found.append(reached)
    return found


def chained(**asked):
    return attribution(layers=(3, 4, 5), **asked)


@pytest.mark.parametrize("residual", [None, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scope", ["atb", "layer"])
def test_maps_are_normalised_and_multiplied(scope, causal, residual):
    attr = chained(causal=causal)
    found = rollout_maps(attr, scope, residual=residual)
    assert found.shape == (3, 2, 6, 6)
    assert found.sum(-1) == pytest.approx(attr.mask.float().expand(3, 2, 6))
    for batch, real in enumerate(attr.mask):
        expected = naive(attr[scope][:, batch], real, residual or 0.0)
        for at, shares in enumerate(expected):
            for (i, j), share in shares.items():
                assert found[at, batch, i, j].item() == pytest.approx(share, abs=1e-6)
    if causal:
        assert (found.triu(1) == 0).all()


def test_the_frame_is_the_maps_of_real_tokens():
    attr = chained()
    frame = rollout(attr, ["atb", "layer"])
    assert list(frame) == COLUMNS
    assert len(frame) == 2 * 3 * (36 + 16)
    assert list(frame["scope"].unique()) == ["atb", "atb_ff_res_ln"]
    for scope in ("atb", "atb_ff_res_ln"):
        maps = rollout_maps(attr, scope)
        for row in frame[frame["scope"] == scope].itertuples():
            assert row.share == maps[row.layer - 3, row.batch, row.query, row.key].item()
            assert (row.query_token, row.key_token) == (f"tok{row.batch}.{row.query}", f"tok{row.batch}.{row.key}")
    pd.testing.assert_frame_equal(rollout(attr, "layer"), rollout(attr))


def test_padding_is_not_looked_at():
    attr = chained()
    expected = rollout_maps(attr)
    attr.maps["atb_ff_res_ln"][:, 1, :, 4:] = 7.0
    attr.maps["atb_ff_res_ln"][:, 1, 4:, :] = float("nan")  # what a softmax makes of a row that is masked whole
    assert rollout_maps(attr).equal(expected)


def test_start_is_where_the_product_begins():
    attr = chained()
    later = attribution(layers=(3, 4, 5))
    later.maps = {scope: values[1:] for scope, values in later.maps.items()}
    later.layers = (4, 5)
    assert rollout_maps(attr, start=4).equal(rollout_maps(later))
    frame = rollout(attr, start=4)
    assert list(frame["layer"].unique()) == [4, 5]
    pd.testing.assert_frame_equal(frame, rollout(later))
    with pytest.raises(ValueError, match=r"start=2 is none of the layers 3, 4, 5"):
        rollout_maps(attr, start=2)


@pytest.mark.parametrize("given", ["tensor", "tuple", "mean"])
def test_attention_weights_of_a_model(given):
    """Abnar and Zuidema's own: heads averaged, half of it the residual."""
    asked = inputs("bert", padding="right")
    model = build("bert", attn_implementation="eager")
    with torch.no_grad():
        weights = model(**asked, output_attentions=True).attentions
    mask = asked["attention_mask"]
    stacked = torch.stack(weights)
    maps = {"tensor": stacked, "tuple": weights, "mean": stacked.mean(2)}[given]
    found = rollout_maps(maps, mask=mask)
    for batch in range(2):
        expected = naive(stacked[:, batch].mean(1), mask[batch], 0.5)
        for at, shares in enumerate(expected):
            for (i, j), share in shares.items():
                assert found[at, batch, i, j].item() == pytest.approx(share, abs=1e-12)
    frame = rollout(maps, mask=mask)
    assert list(frame) == COLUMNS
    assert len(frame) == 2 * (49 + 25)
    assert set(frame["scope"]) == {"weights"}
    assert frame["query_token"].tolist() == frame["query"].astype(str).tolist()
    last = rollout(maps, mask=mask, start=1)
    assert set(last["layer"]) == {1}
    assert last["share"].sum() == pytest.approx(12)


def test_a_residual_of_zero_is_the_weights_alone():
    weights = torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.testing.assert_close(rollout_maps(weights, residual=0)[1, 0], weights[1, 0] @ weights[0, 0])


def test_of_a_model_that_mixes_nothing_rollout_is_the_identity():
    assert rollout_maps(torch.eye(3).expand(4, 2, 3, 3)).equal(torch.eye(3).expand(4, 2, 3, 3))


def test_half_maps_are_multiplied_in_float32():
    attr = chained()
    attr.maps["atb"] = attr.maps["atb"].bfloat16()
    assert rollout_maps(attr, "atb").dtype == torch.float32


@pytest.mark.parametrize(
    ("attr", "asked", "error", "match"),
    [
        (attribution(), {}, ValueError, r"layers that follow each other, got layers 0, 2, 5: .*layers=None"),
        (chained(queries=(0, 3)), {}, ValueError, r"rows of all 6 tokens.*there are 2: .*queries=None"),
        (chained(queries=(5, 4, 3, 2, 1, 0)), {}, ValueError, r"rows of all 6 tokens, in their order"),
        (chained(), {"scope": "attn_heads"}, ValueError, r"no whole maps of attn_heads.*not told apart by head"),
        (chained(), {"scope": "atb_ln"}, KeyError, r"no scope 'atb_ln' here; computed: attn_heads"),
        (chained(), {"residual": 1.0}, ValueError, r"residual=1\.0, expected a number of at least 0 and below 1"),
        (chained(), {"residual": -0.1}, ValueError, r"residual=-0\.1"),
        (chained(), {"mask": torch.ones(2, 6)}, ValueError, r"mask= is for attention weights"),
        (torch.rand(2, 1, 3, 4), {}, ValueError, r"shape \[2, 1, 3, 4\], expected \[layers, sequences"),
        (torch.rand(2, 3, 3), {}, ValueError, r"shape \[2, 3, 3\]"),
        ((), {}, ValueError, r"attn_implementation='eager'.*output_attentions=True"),
        ((None, None), {}, ValueError, r"attn_implementation='eager'"),
        (torch.rand(2, 1, 3, 3), {"mask": torch.ones(1, 4)}, ValueError, r"mask has shape \[1, 4\], expected \[1, 3\]"),
        (torch.rand(2, 1, 3, 3), {"scope": "atb"}, ValueError, r"scope='atb' is for an Attribution"),
    ],
)
def test_what_does_not_chain_is_refused(attr, asked, error, match):
    for function in (rollout, rollout_maps):
        with pytest.raises(error, match=match):
            function(attr, **asked)


@pytest.mark.parametrize("asked", [{"groups": [[(0, 3), (3, 7)]] * 2}, {"keys": [0, 2]}, {"keep": ffattr.Pool(2)}])
def test_columns_that_are_not_the_tokens_of_the_rows_are_refused(asked):
    attr = ffattr.attribute(build("bert"), inputs("bert"), **asked)
    with pytest.raises(ValueError, match=r"are not the tokens of its rows|no whole maps of atb_ff_res_ln"):
        rollout_maps(attr)


def test_maps_of_a_model_chain():
    attr = ffattr.attribute(build("gpt2"), inputs("gpt2", padding="left"), scopes=["atb", PRE_LN[-1]])
    found = rollout_maps(attr, "atb")
    torch.testing.assert_close(found.sum(-1), attr.mask.double().expand(2, 2, 7))
    assert (found[:, 0, 0, 0] == 1).all()
    assert found[1, 0, 6, 0] > 0
