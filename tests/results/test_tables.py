"""What an `Attribution` is looked at as, but for plots: strongest pairs, xarray, comparisons, HTML."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from keeping import kept, some
from synthetic import HEADS, POST_LN, PRE_LN, attribution

import ffattr
from ffattr import Pool, Reduce, StackedAttribution, TopK
from ffattr.analysis import spearman


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


def test_comparison_numbers_are_what_they_say():
    a, b = attribution(POST_LN[3:], seed=0), attribution(POST_LN[3:], seed=1)
    found = a.compare(b, "atb_ff")
    assert list(found["layer"]) == [0, 0, 2, 2, 5, 5]
    for row in found.itertuples():
        real = [6, 4][row.batch]
        x, y = (of.maps["atb_ff"][a.layers.index(row.layer), row.batch, :real, :real].double() for of in (a, b))
        assert row.rho == pytest.approx(spearman(x, y))
        assert row.difference == pytest.approx(float((x - y).norm() / x.norm()))
        assert row.largest == pytest.approx(float((x - y).abs().max()))
        apart = ~torch.eye(real, dtype=torch.bool)
        tops = [set(side[apart].topk(10).indices.tolist()) for side in (x, y)]
        assert row.overlap == len(tops[0] & tops[1]) / 10


def test_comparison_of_scopes_layers_and_causal_maps():
    a = attribution(PRE_LN, layers=(0, 2, 5), causal=True)
    assert set(a.compare(a)["scope"]) == set(PRE_LN)
    between = a.compare(a, [("atb", "layer")])
    assert set(zip(between["scope"], between["other_scope"], strict=True)) == {("atb", "atb_ln_ff_res")}
    lower = torch.ones(6, 6).tril().bool()
    x, y = (a.maps[scope][0, 0][lower] for scope in ("atb", "atb_ln_ff_res"))
    assert between["rho"][0] == pytest.approx(spearman(x, y))
    b = attribution(PRE_LN, layers=(2, 5, 7), causal=True)
    assert a.compare(b, "atb")[["layer", "other_layer"]].drop_duplicates().values.tolist() == [[2, 2], [5, 5]]
    c = attribution(PRE_LN, layers=(10, 11, 12), causal=True)
    assert set(a.compare(c, "atb")["other_layer"]) == {10, 11, 12}


def test_a_map_of_zeros_compares_to_nothing():
    a = attribution(("atb",))
    b = replace(a, kept=replace(a.kept, maps={"atb": a.maps["atb"] * 0}))
    found = b.compare(a)
    assert found[["rho", "difference"]].isna().to_numpy().all()


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (attribution(("atb",), real=(6, 5)), ValueError, r"sequences differ: 6, 4 tokens here, 6, 5 there"),
        (attribution(("atb",), queries=(1, 2)), ValueError, r"the queries differ: \[0, 1, 2"),
        (attribution(("atb",), layers=(7,)), ValueError, "no layer is in both: 0, 2, 5 here, 7 there"),
        (replace(attribution(("atb",)), tokens=[["x"] * 6] * 2), ValueError, "the tokens differ: 'tok0.0' here, 'x'"),
        (kept(Pool(2), attribution(("atb",))), ValueError, "the blocks differ: None here, 2 there"),
        ("maps.safetensors", TypeError, "compare takes an Attribution, got a str"),
    ],
)
def test_what_cannot_be_compared(other, error, message):
    with pytest.raises(error, match=message):
        attribution(("atb",)).compare(other, "atb")


def test_heads_are_not_compared_with_their_sum():
    attr = attribution(("attn_heads", "attn"))
    with pytest.raises(ValueError, match="different axes"):
        attr.compare(attr, [("attn_heads", "attn")])


def stacked():
    encoder, decoder = attribution(POST_LN, seed=1), attribution(POST_LN, causal=True, seed=2)
    cross = attribution(("atb", "atb_ff"), seed=3)
    return StackedAttribution.of({"encoder": encoder, "decoder": decoder, "cross": cross})


def test_views_of_an_encoder_and_a_decoder(tmp_path):
    attr = stacked()
    pd.testing.assert_frame_equal(attr.top(2, "cross.atb"), attr.stacks["cross"].top(2, "atb"))
    assert set(attr.to_xarray(["encoder.layer", "cross.atb"]).children) == {"encoder", "cross"}
    found = attr.compare(attr, ["cross.atb", ("encoder.atb", "encoder.layer")])
    assert found.groupby("stack")["rho"].min()["cross"] == pytest.approx(1)
    assert found.groupby("stack")["rho"].max()["encoder"] < 0.99
    with pytest.raises(ValueError, match=r"decoder\.atb and cross\.atb are maps of different tokens"):
        attr.compare(attr, [("decoder.atb", "cross.atb")])
    with pytest.raises(TypeError, match="an encoder and a decoder, the others an Attribution"):
        attr.compare(attribution())
    attr.to_html(tmp_path / "maps.html", scopes=["decoder.layer", "cross.layer"])
    text = (tmp_path / "maps.html").read_text()
    assert "decoder, 1: " in text
    assert "cross, 2: " in text
    assert "encoder, 1: " not in text
    assert attr._repr_html_().count("<table") == 3


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&amp;", "'", "</td>", "<!--"]


def test_a_notebook_shows_a_map_in_which_tokens_are_text():
    attr = attribution(tokens=6, real=(6,))
    attr.tokens = [HOSTILE]
    text = attr._repr_html_()
    assert not re.search(r"<(?!/?(div|code|table|caption|tr|th|td)\b)", text)
    assert "&lt;script&gt;alert(1…" in text
    assert text.count("<td") == 36
    assert re.search(r'title="[\d.]+ \([\d.]+%\)"', text)
    assert "script>" not in text.replace("&lt;script&gt;", "")


def test_a_notebook_is_shown_little_of_much():
    attr = attribution(tokens=300, real=(300,))
    text = attr._repr_html_()
    assert text.count("<td") == 24 * 24
    assert "first 24 tokens" in text
    assert len(text) < 100_000


@pytest.mark.parametrize("asked", [TopK(2), Pool(2)])
def test_a_notebook_shows_what_was_kept(asked):
    assert "<table" in kept(asked, some(("atb", "atb_ff")))._repr_html_()


def test_a_notebook_shows_a_line_where_no_map_is():
    assert kept(Reduce(lambda rows: None), some(("atb",)))._repr_html_().count("<") == 4
    assert "<table" not in attribution(layers=())._repr_html_()
    assert "<table" not in attribution(queries=())._repr_html_()


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    attr = attribution(("atb", "atb_ff"))
    path = tmp_path / "maps.html"
    attr.to_html(path, title="A title <b>")
    text = path.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>A title &lt;b&gt;</title>" in text
    with pytest.raises(ValueError, match="larger than"):
        attr.to_html(tmp_path / "small.html", limit=1000)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        attr.to_html(tmp_path / "missing" / "maps.html")
    with pytest.raises(ValueError, match="keep=Reduce"):
        kept(Reduce(lambda rows: None), some(("atb",))).to_html(tmp_path / "none.html")
    with pytest.raises(KeyError, match="no scope 'atb_ln' here"):
        attr.to_html(tmp_path / "none.html", scopes="atb_ln")
    monkeypatch.setattr("ffattr.results.pages.render_page", lambda *_: iter(["half", 1]))
    with pytest.raises(TypeError):
        attr.to_html(path)
    assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["maps.html"]


def test_a_page_says_how_wrong_a_sketch_is(tmp_path):
    attr = attribution(("atb", "atb_ff"))
    attr.to_html(tmp_path / "exact.html")
    assert "sketch" not in _facts(tmp_path / "exact.html")
    errors = torch.full((3, 2), 0.01)
    errors[1, 1] = 0.0234
    replace(attr, sketch_error={"atb_ff": errors}).to_html(tmp_path / "sketch.html")
    assert '["median error of the sketch","at most 2.34%"]' in _facts(tmp_path / "sketch.html").replace('", "', '","')


def _facts(path):
    text = path.read_text()
    start = text.index('"facts":')
    return text[start : text.index("]]", start) + 2]


def test_padding_experts_and_blocks_have_pages(tmp_path):
    attr = some(("atb", "atb_ff"), queries=(6, 3, 4, 0))
    attr.to_html(tmp_path / "a.html")
    kept(TopK(2), attr).to_html(tmp_path / "b.html")
    heads = kept(TopK(2), some(("attn_heads", "atb")))
    heads.to_html(tmp_path / "d.html")
    assert '"head 1"' in (tmp_path / "d.html").read_text()
    kept(Pool(2), attr).to_html(tmp_path / "c.html")
    assert "tok1.2" in (tmp_path / "a.html").read_text()
    assert "tok1.1" not in (tmp_path / "a.html").read_text()  # padding


def test_groups_know_their_tokens():
    """End to end: the model's words, and which token is in which."""
    import documented

    given = documented.namespace()
    attr = ffattr.attribute(given["model"], ["The cat barking."], tokenizer=given["tokenizer"], groups="words")
    assert attr.groups.tolist() == [[0, 1, 2, 3, 3, 4, 5]]
    found = attr.top(100)
    assert not ((found["query_token"] == "##ing") & (found["key_token"] == "barking")).any()


def test_pictures_and_analyses_are_of_one_stack():
    """The tokens and layers of a `StackedAttribution` are those of one of its stacks, its maps of all of them."""
    attr = stacked()
    for view in (
        lambda: attr.plot_arcs(1, "cross.atb"),
        lambda: attr.plot_scopes(),
        lambda: attr.plot_amplification(),
        lambda: ffattr.analysis.contextualization_change(attr),
        lambda: ffattr.analysis.rollout(attr, "cross.layer"),
    ):
        with pytest.raises(TypeError, match=r"analyse one of them, attr\.stacks\['encoder'\] or "):
            view()


def test_columns_of_other_tokens_are_named_before_their_number():
    attr = attribution(("atb", "atb_ff"), tokens=6, real=(6, 6), queries=(0, 1))
    cross = replace(attr, mask=attr.mask[:, :2], tokens=[row[:2] for row in attr.tokens])
    cross = replace(cross, key_tokens=attr.tokens, key_mask=attr.mask)
    with pytest.raises(ValueError, match="the columns of these maps are not the tokens of their rows"):
        ffattr.analysis.token_summary(cross, "atb")
