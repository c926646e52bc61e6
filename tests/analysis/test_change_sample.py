"""The change of maps from a sample of their pairs, against that of all pairs."""

import math

import pandas as pd
import pytest
import torch
from keeping import kept, some
from synthetic import POST_LN, PRE_LN, attribution

from ffattr import Reduce
from ffattr.analysis import ChangeSample, contextualization_change
from ffattr.analysis.change_sample import _merge_draws


def sampled(attr, pairs=20_000, seed=0, causal=None, **how):
    sample = ChangeSample(pairs, seed, causal)
    assert kept(Reduce(sample), attr, **how).reduced == []
    return sample.contextualization_change()


@pytest.mark.parametrize("how", [{"cut": 1}, {"cut": 3, "backwards": True}])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("scopes", "dtype"), [(POST_LN, torch.float32), (PRE_LN, torch.float64)])
def test_a_sample_of_all_pairs_is_no_sample(scopes, dtype, causal, how):
    attr = some(scopes, causal=causal, dtype=dtype, queries=(6, 3, 4, 0))
    expected = contextualization_change(attr)
    found = sampled(attr, **how)
    assert list(found) == [*expected, "pairs", "standard_error"]
    found = found.sort_values("layer", kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(found[list(expected)], expected, rtol=1e-12, atol=1e-12)
    # Sequence 0 has the tokens 0 1 3 4 5 6 and queries 6 3 4 0, sequence 1 the tokens 2 3 4 and queries 3 4.
    assert set(found["pairs"]) == {6 + 3 + 4 + 1 + 2 + 3 if causal else 4 * 6 + 2 * 3}
    assert set(found["standard_error"]) == {0.0}


def large(seed, tokens=60, causal=False):
    attr = attribution(PRE_LN[2:], layers=(0, 3), tokens=tokens, real=(tokens, tokens - 7), causal=causal, seed=seed)
    for before, after in (("atb", "atb_ln"), ("atb_ln", "atb_ln_ff"), ("atb_ln_ff", "atb_ln_ff_res")):
        attr.maps[after] = attr.maps[after] * 0.5 + attr.maps[before]
    return attr


@pytest.mark.parametrize("causal", [False, True])
def test_a_sample_does_not_depend_on_how_rows_come(causal, monkeypatch):
    attr = large(0, causal=causal)
    first = sampled(attr, 300, cut=60)
    assert set(first["pairs"]) == {600}
    pd.testing.assert_frame_equal(sampled(attr, 300, cut=7), first)
    monkeypatch.setattr("ffattr.analysis.rows.AT_ONCE", 100)
    pd.testing.assert_frame_equal(sampled(attr, 300, cut=7), first)
    backwards = sampled(attr, 300, cut=5, backwards=True).sort_values("layer", kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(backwards, first)
    assert (sampled(attr, 300, seed=1)["value"] != first["value"]).all()


def test_standard_errors_of_sequences_add_up():
    attr = large(1)
    truth = contextualization_change(attr)
    frames = [sampled(attr, 400, seed=seed, cut=60) for seed in range(12)]
    z = torch.tensor([((frame["value"] - truth["value"]) / frame["standard_error"]).tolist() for frame in frames])
    assert 0.6 < z.norm() / math.sqrt(z.numel()) < 1.6
    one = attribution(PRE_LN, tokens=30, real=(30, 30))
    for maps in one.maps.values():
        maps[:, 1] = 1.0  # its correlation is not defined
    alone = sampled(one, 100)
    assert alone["value"].notna().all()
    assert (alone["standard_error"] > 0).all()


def test_a_sample_is_drawn_from_all_pairs_alike():
    """The values are the numbers of the pairs, so that a sample shows which ones it has."""
    attr = attribution(("atb", "atb_ln"), layers=(4,), tokens=40, real=(40,))
    attr.maps["atb"] = torch.arange(1.0, 1601).view(1, 1, 40, 40)
    attr.maps["atb_ln"] = attr.maps["atb"] * 2
    counts = torch.zeros(1600)
    for seed in range(100):
        sample = ChangeSample(400, seed)
        kept(Reduce(sample), attr, cut=11)
        values, of = _merge_draws(*sample._drawn[4][0], causal=False)
        assert of == 1600
        assert torch.equal(values[1], 2 * values[0])
        counts[values[0].long() - 1] += 1
    assert counts.sum() == 40_000
    by_query, by_key = counts.view(40, 40).sum(1), counts.view(40, 40).sum(0)
    # 1000 each, with a spread of sqrt(1000 * 3/4) = 27: five of these.
    assert (by_query - 1000).abs().max() < 137
    assert (by_key - 1000).abs().max() < 137
    assert counts.min() > 25 - 5 * 4.4
    assert counts.max() < 25 + 5 * 4.4


def test_whether_a_model_is_causal_can_be_said():
    attr = some(("atb", "atb_ln"), causal=True)
    attr.arguments["causal"] = False  # as of maps by groups of tokens
    expected = contextualization_change(attr)
    found = sampled(attr, causal=False)
    pd.testing.assert_frame_equal(found[list(expected)], expected, rtol=1e-12, atol=1e-12)
    assert (sampled(attr)["pairs"] < found["pairs"]).all()


def test_what_a_sample_refuses():
    attr = some(("atb", "atb_ln"))
    with pytest.raises(ValueError, match=r"ChangeSample\(pairs=1\), expected an integer of at least 2"):
        ChangeSample(1)
    with pytest.raises(ValueError, match=r"nothing was drawn yet: .*keep=ffattr.Reduce\(sample\)"):
        ChangeSample().contextualization_change()
    with pytest.raises(ValueError, match="no two neighbouring scopes"):
        kept(Reduce(ChangeSample()), some(("attn_heads", "atb")))
    for pairs in (5, 1000):
        sample = ChangeSample(pairs)
        kept(Reduce(sample), attr)
        with pytest.raises(ValueError, match="layer 0 of sequence 0 came twice: use a new ChangeSample"):
            kept(Reduce(sample), attr)


def test_by_sequence_and_all_together():
    attr = large(2)
    sample = ChangeSample(400)
    kept(Reduce(sample), attr)
    found, means = sample.contextualization_change("sequence"), sample.contextualization_change()
    assert list(found) == ["layer", "batch", *(name for name in list(means)[1:] if name not in ("low", "high"))]
    assert found["batch"].unique().tolist() == [0, 1]
    by = found.groupby(["layer", "component"], sort=False)["value"].mean()
    assert by.to_numpy() == pytest.approx(means["value"].to_numpy(), rel=1e-12)
    with pytest.raises(ValueError, match="per='batch', expected 'layer' or 'sequence'"):
        sample.contextualization_change("batch")


def test_a_key_draws_the_same_pairs_at_any_place():
    attr = large(3, tokens=60)
    for maps in attr.maps.values():
        maps[:, 1] = maps[:, 0]
    attr.mask[:] = True
    found = []
    for keys in ([7, 2**62], [2**62, 7]):
        sample = ChangeSample(300, keys=keys)
        kept(Reduce(sample), attr)
        found.append(sample.contextualization_change("sequence").set_index(["batch", "layer", "component"])["value"])
    assert found[0][0].tolist() == found[1][1].tolist() != found[0][1].tolist()
    with pytest.raises(ValueError, match=r"has -1, expected numbers from 0 to 2\*\*63 - 1"):
        ChangeSample(keys=[-1])
    with pytest.raises(ValueError, match=r"sequence 1 came, but ChangeSample\(keys=...\) has 1"):
        kept(Reduce(ChangeSample(300, keys=[7])), attr)
