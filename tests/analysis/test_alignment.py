"""The angle between the network's vector and what bypasses it, from three norms, against the vectors themselves."""

import pandas as pd
import pytest
import torch
from synthetic import attribution
from tiny_models import build, inputs

import ffattr
from ffattr.analysis import Alignment, alignment

COLUMNS = ["layer", "pairs_of", "pairs", "mean", "median", "negative", "ratio", "removed"]


def _made(ff, bypass, cosine, **options):
    """Maps in which every pair has these lengths and this angle."""
    attr = attribution(("atb", "atb_ff", "atb_ff_res"), **options)
    there = (attr.maps["atb"] > 0).double()
    total = (ff**2 + bypass**2 + 2 * ff * bypass * cosine) ** 0.5
    attr.maps = {"atb": bypass * there, "atb_ff": ff * there, "atb_ff_res": total * there}
    return attr


@pytest.mark.parametrize("cosine", [-1.0, -0.4, 0.0, 0.7, 1.0])
def test_a_known_angle(cosine):
    found = alignment(_made(0.5, 2.0, cosine))
    assert list(found) == COLUMNS
    assert found["pairs"].tolist() == [10, 42] * 3  # of six and four tokens
    for name, expected in (("mean", cosine), ("ratio", 0.25), ("removed", -cosine * 0.25)):
        assert found[name].to_numpy() == pytest.approx(expected, abs=1e-12)
    assert found["median"].to_numpy() == pytest.approx(cosine, abs=5e-4)
    if cosine:
        assert set(found["negative"]) == {float(cosine < 0)}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_angles_are_those_of_the_vectors(name):
    model, given = build(name), inputs(name)
    attr = ffattr.attribute(model, given, scopes="all", backend="reference")
    output = next(scope for scope in attr.scopes if scope.endswith("_ff"))
    both = ffattr.vectors(model, given, scope=["atb", output])
    bypass, ff = both["atb"].values.double(), both[output].values.double()
    lengths = ff.norm(dim=-1), bypass.norm(dim=-1)
    cosines = (ff * bypass).sum(-1) / (lengths[0] * lengths[1])
    found = alignment(attr)
    own = torch.eye(cosines.shape[-1], dtype=torch.bool)
    for place, layer in enumerate(attr.layers):
        counted = (lengths[0][place] > 0) & (lengths[1][place] > 0)
        for which, some in (("own", counted & own), ("others", counted & ~own)):
            row = found[(found["layer"] == layer) & (found["pairs_of"] == which)].iloc[0]
            values = cosines[place][some]
            assert row["pairs"] == len(values)
            assert row["mean"] == pytest.approx(float(values.mean()), abs=1e-9)
            assert row["median"] == pytest.approx(float(values.quantile(0.5)), abs=6e-4)
            assert row["negative"] == pytest.approx(float((values < 0).double().mean()), abs=1e-9)
            ratio = (lengths[0] / lengths[1])[place][some]
            assert row["ratio"] == pytest.approx(float(ratio.log().mean().exp()), rel=1e-9)
            assert row["removed"] == pytest.approx(float((-values * ratio).mean()), abs=1e-9)


def test_a_stream_says_the_same_and_sequences_can_be_told_apart():
    model, given = build("bert"), inputs("bert")
    angles = Alignment()
    ffattr.attribute(model, given, scopes="all", keep=ffattr.Reduce(angles))
    attr = ffattr.attribute(model, given, scopes="all")
    pd.testing.assert_frame_equal(angles.frame(), alignment(attr), rtol=1e-9)
    apart = angles.frame("sequence")
    assert list(apart) == ["layer", "batch", *COLUMNS[1:]]
    assert apart.groupby(["layer", "pairs_of"])["pairs"].sum().tolist() == (
        angles.frame().groupby(["layer", "pairs_of"])["pairs"].sum().tolist()
    )


def test_what_cannot_be_told():
    with pytest.raises(ValueError, match="no scopes of the feed-forward network, of what bypasses it"):
        alignment(attribution(("atb", "atb_ff")))
    attr = attribution()
    attr.arguments["reduce"] = "l1"
    with pytest.raises(ValueError, match="expected Euclidean norms"):
        alignment(attr)
    with pytest.raises(ValueError, match="no rows came yet"):
        Alignment().frame()
    with pytest.raises(ValueError, match="per='pair'"):
        alignment(attribution(), "pair")
