"""Maps as pandas and xarray: all pairs, and the strongest ones."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from keeping import kept, some
from synthetic import HEADS, POST_LN, attribution

import ffattr
from ffattr import Pool, TopK


def test_to_pandas_has_every_real_pair_once():
    attr = attribution(("atb", "atb_ff"), queries=(0, 5))
    frame = attr.to_pandas()
    assert list(frame) == ["scope", "layer", "batch", "query", "key", "query_token", "key_token", "norm"]
    # Sequence 0 has 6 real keys and both queries; sequence 1 has 4 real keys, and query 5 is padding.
    assert len(frame) == 2 * 3 * (2 * 6 + 1 * 4)
    assert not frame.duplicated(["scope", "layer", "batch", "query", "key"]).any()
    for row in frame.itertuples():
        place = (attr.layers.index(row.layer), row.batch, attr.queries.index(row.query), row.key)
        assert row.norm == attr.maps[row.scope][place].item()
        assert row.query_token == attr.tokens[row.batch][row.query]
        assert row.key_token == attr.tokens[row.batch][row.key]


def test_to_pandas_with_heads():
    attr = attribution()
    frame = attr.to_pandas(["attn_heads", "layer"])
    heads = frame[frame.scope == "attn_heads"]
    assert len(heads) == 3 * HEADS * (36 + 16)
    assert frame[frame.scope == POST_LN[-1]]["head"].isna().all()
    row = heads.iloc[-1]
    assert row.norm == attr.maps["attn_heads"][-1, 1, row["head"], row.query, row.key].item()
    assert "head" not in attr.to_pandas("atb")


def test_to_pandas_of_the_largest_entries():
    attr = some(queries=(5, 0, 2, 4), causal=True)
    frame = kept(TopK(2), attr).to_pandas()
    whole = attr.to_pandas()
    assert list(frame) == list(whole)
    by = ["scope", "layer", "batch", "head", "query"]
    expected = whole[whole.norm > 0].sort_values([*by, "norm", "key"], ascending=[True] * 5 + [False, True])
    expected = expected.groupby(by, dropna=False, observed=True).head(2)
    found = frame.sort_values([*by, "norm", "key"], ascending=[True] * 5 + [False, True])
    assert 0 < len(found) < len(whole)
    for column in frame:
        assert found[column].astype(str).tolist() == expected[column].astype(str).tolist(), column


def test_to_pandas_of_blocks():
    attr = kept(Pool(2), some(("atb",)))
    frame = attr.to_pandas()
    # Sequence 0 has the tokens 0 1 3 4 5 6 in blocks 01 -3 45 6, sequence 1 has 2 3 4.
    assert len(frame) == 3 * (4 * 4 + 2 * 2)
    one = frame[(frame.layer == 2) & (frame.batch == 0) & (frame["query"] == 3)]
    assert one["key"].tolist() == [0, 3, 4, 6]
    assert one["key_token"].tolist() == ["tok0.0 … tok0.1", "tok0.3", "tok0.4 … tok0.5", "tok0.6"]
    assert set(one["query_token"]) == {"tok0.3"}
    assert one["norm"].tolist() == attr.maps["atb"][1, 0, 1].tolist()
    assert frame[frame.batch == 1]["query"].unique().tolist() == [2, 4]


def by_hand(attr, scope, layer, batch, own):
    """Pairs of different tokens with their norm and share, strongest first."""
    values = attr.maps[scope][layer, batch]
    rows = [(n, query) for n, query in enumerate(attr.queries) if attr.mask[batch, query]]
    found = [
        (float(values[n, key]), query, key, float(values[n, key] / values[n].sum()))
        for n, query in rows
        for key in range(values.shape[1])
        if values[n, key] > 0 and (own or key != query)
    ]
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("options", [{}, {"queries": (4, 1)}, {"causal": True}])
def test_top_is_the_strongest_pairs_of_each_layer_and_sequence(own, options):
    attr = attribution(("atb", "atb_ff"), **options)
    found = attr.top(3, "atb", own=own)
    for (layer, batch), of_one in found.groupby(["layer", "batch"]):
        expected = by_hand(attr, "atb", attr.layers.index(layer), batch, own)[:3]
        assert list(of_one["rank"]) == list(range(1, len(expected) + 1))
        assert list(zip(of_one["query"], of_one["key"], strict=True)) == [pair[1:3] for pair in expected]
        assert list(of_one["norm"]) == pytest.approx([pair[0] for pair in expected])
        assert list(of_one["share"]) == pytest.approx([pair[3] for pair in expected])
        assert list(of_one["key_token"]) == [attr.tokens[batch][pair[2]] for pair in expected]
    assert set(found["layer"]) == set(attr.layers)


def test_top_of_heads_and_of_what_was_kept():
    attr = attribution(("attn_heads", "atb"))
    heads = attr.top(1000, "attn_heads", own=True)
    assert set(heads["head"]) == set(range(HEADS))
    first = heads.iloc[0]
    place = (0, 0, first["head"], first["query"], first["key"])
    assert attr.maps["attn_heads"][place] == attr.maps["attn_heads"][0, 0].max() == pytest.approx(first["norm"])
    whole = attr.top(2, "atb", own=True)
    pd.testing.assert_frame_equal(kept(TopK(4), attr).top(2, "atb", own=True), whole)


def test_top_of_blocks_leaves_out_a_blocks_own():
    attr = kept(Pool(2), attribution(("atb",), tokens=8, real=(8, 6)))
    found = attr.top(100, "atb")
    assert not (found["query"] == found["key"]).any()
    assert set(found["query"]) == {0, 2, 4, 6}
    assert found["query_token"][0].count(" … ") == 1


def test_top_of_groups_leaves_out_a_tokens_own_group():
    attr = attribution(("atb",), tokens=6, real=(6, 6))
    groups = torch.tensor([[0, 1, 1, 2, 3, -1], [0, 0, 1, 2, 3, 3]])
    maps = torch.rand(3, 2, 6, 4, generator=torch.Generator().manual_seed(1))
    grouped = replace(
        attr,
        kept=replace(attr.kept, maps={"atb": maps}),
        groups=groups,
        key_tokens=[list("abcd")] * 2,
        key_mask=torch.ones(2, 4).bool(),
    )
    found = grouped.top(100)
    for pair in found.itertuples():
        assert groups[pair.batch, pair.query] != pair.key
    assert len(found) == 3 * (6 * 4 - 5 + 6 * 4 - 6)


def test_groups_know_their_tokens():
    """End to end: the model's words, and which token is in which."""
    import documented

    given = documented.namespace()
    attr = ffattr.attribute(given["model"], ["The cat barking."], tokenizer=given["tokenizer"], groups="words")
    assert attr.groups.tolist() == [[0, 1, 2, 3, 3, 4, 5]]
    found = attr.top(100)
    assert not ((found["query_token"] == "##ing") & (found["key_token"] == "barking")).any()


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "all"])
def test_top_of_no_number(k):
    with pytest.raises(ValueError, match=r"top\(k=.*expected an integer of at least 1"):
        attribution(("atb",)).top(k)


def test_xarray_has_named_dimensions_and_all_numbers():
    attr = attribution(queries=(4, 1))
    data = attr.to_xarray()
    assert data["attn_heads"].dims == ("layer", "batch", "head", "query", "key")
    assert data["atb"].dims == ("layer", "batch", "query", "key")
    one = data["atb"].sel(layer=5, query=1).isel(batch=1)
    assert one.values.tolist() == attr.maps["atb"][2, 1, 1].tolist()
    assert data["atb_bias"].sel(layer=2).values.tolist() == attr.bias["atb"][1].tolist()
    assert data["query_token"].values.tolist() == [["tok0.4", "tok0.1"], ["tok1.4", "tok1.1"]]
    assert data["query_real"].values.tolist() == [[True, True], [False, True]]
    assert data["key_real"].sum().item() == 10
    assert data.attrs == {"ig": "exact", "causal": 0}
    assert list(attr.to_xarray("layer").data_vars) == ["atb_ff_res_ln", "atb_ff_res_ln_bias"]


def test_xarray_of_blocks_and_of_half_precision():
    attr = attribution(("atb",), tokens=7, real=(7, 5))
    blocks = kept(Pool(3), attr).to_xarray()
    assert blocks["query"].values.tolist() == blocks["key"].values.tolist() == [0, 3, 6]
    attr.maps["atb"] = attr.maps["atb"].bfloat16()
    assert attr.to_xarray()["atb"].dtype == "float32"
    with pytest.raises(ValueError, match="keep=TopK"):
        kept(TopK(2), attribution(("atb",))).to_xarray()
