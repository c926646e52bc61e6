"""Two attributions of the same tokens, compared."""

from dataclasses import replace

import pytest
import torch
from keeping import kept
from synthetic import POST_LN, PRE_LN, attribution

from ffattr import Pool
from ffattr.analysis import spearman


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
