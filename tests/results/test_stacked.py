"""Attributions of an encoder and a decoder: views of all stacks, analyses of one."""

from dataclasses import replace

import pandas as pd
import pytest
from synthetic import POST_LN, attribution

import ffattr
from ffattr import StackedAttribution


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
