import math

import pandas as pd
import pytest
import torch
from keeping import kept, some
from synthetic import POST_LN, PRE_LN, attribution

from ffattr import Pool, Reduce, TopK
from ffattr.analysis import ChangeSample, contextualization_change, spearman
from ffattr.analysis.change_sample import _merge_draws
from ffattr.analysis.ranks import standard_error


def rho(a, b):
    """Another way to the same number: pandas' average ranks, then its Pearson correlation."""
    return pd.DataFrame({"a": a.flatten().numpy(), "b": b.flatten().numpy()}).rank().corr().loc["a", "b"]


@pytest.mark.parametrize("levels", [0, 3, 10])
def test_spearman_is_pandas_with_ties_too(levels):
    generator = torch.Generator().manual_seed(levels)
    a, b = torch.rand(2, 7, 11, generator=generator)
    b = a + b
    if levels:
        a, b = (a * levels).floor(), (b * levels).floor()
    expected = rho(a, b)
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_spearman_sees_order_only():
    x = torch.linspace(-3, 3, 50)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)


def test_spearman_where_it_is_not_defined():
    assert math.isnan(spearman(torch.ones(4), torch.arange(4)))
    assert math.isnan(spearman(torch.ones(1), torch.ones(1)))
    assert math.isnan(spearman(torch.tensor([1.0, math.nan, 3.0]), torch.arange(3.0)))
    assert math.isnan(spearman(torch.ones(0), torch.ones(0)))
    with pytest.raises(ValueError, match=r"equal shapes, got \[2\] and \[3\]"):
        spearman(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize(
    ("scopes", "expected"),
    [
        (
            POST_LN,
            [
                ("FF", "atb", "atb_ff"),
                ("RES", "atb_ff", "atb_ff_res"),
                ("LN", "atb_ff_res", "atb_ff_res_ln"),
                ("FF block", "atb", "atb_ff_res_ln"),
            ],
        ),
        (
            PRE_LN,
            [
                ("LN", "atb", "atb_ln"),
                ("FF", "atb_ln", "atb_ln_ff"),
                ("RES", "atb_ln_ff", "atb_ln_ff_res"),
                ("FF block", "atb", "atb_ln_ff_res"),
            ],
        ),
        (("atb", "atb_ff"), [("FF", "atb", "atb_ff")]),
        (("atb", "atb_ln_ff_res"), [("FF block", "atb", "atb_ln_ff_res")]),
    ],
)
def test_components_are_pairs_of_neighbouring_scopes(scopes, expected):
    frame = contextualization_change(attribution(scopes))
    assert list(frame) == ["layer", "component", "before", "after", "value"]
    for _, rows in frame.groupby("layer"):
        assert list(rows[["component", "before", "after"]].itertuples(index=False, name=None)) == expected
    assert list(frame["layer"].unique()) == [0, 2, 5]


def test_value_is_one_minus_rho_over_real_pairs_averaged_over_sequences():
    attr = attribution(queries=(0, 3, 5))
    frame = contextualization_change(attr)
    value = frame[(frame.layer == 2) & (frame.component == "LN")]["value"].item()
    expected = []
    for batch, (rows, keys) in enumerate((([0, 1, 2], 6), ([0, 1], 4))):
        a, b = (attr.maps[s][1, batch][rows, :keys].flatten() for s in ("atb_ff_res", "atb_ff_res_ln"))
        expected.append(1 - rho(a, b))
    assert value == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_a_causal_model_counts_no_key_after_the_query():
    attr = attribution(PRE_LN, real=(6,), queries=(2, 4), causal=True)
    value = contextualization_change(attr)["value"][0]
    a, b = (torch.cat([attr.maps[s][0, 0, 0, :3], attr.maps[s][0, 0, 1, :5]]) for s in ("atb", "atb_ln"))
    assert value == pytest.approx(1 - rho(a, b), abs=1e-6)
    attr.arguments["causal"] = False
    assert contextualization_change(attr)["value"][0] < value  # the zeros agree


def test_unchanged_maps_change_nothing_and_padding_is_not_looked_at():
    attr = attribution(("atb", "atb_ff"))
    attr.maps["atb_ff"] = attr.maps["atb"] ** 2
    attr.maps["atb_ff"][:, 1, :, 4:] = 7.0
    assert contextualization_change(attr)["value"].abs().max() < 1e-6


def test_scopes_without_a_component_are_an_error():
    with pytest.raises(ValueError, match=r"no two neighbouring scopes .* among attn, atb: .*scopes='all'"):
        contextualization_change(attribution(("attn", "atb")))


def test_maps_by_expert_are_no_component():
    pre = ("atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res")
    attr = attribution(pre)
    attr.scopes = (*pre, "atb_ln_ff_experts")
    found = contextualization_change(attr)
    assert set(found["component"]) == {"LN", "FF", "RES", "FF block"}


def test_keys_of_an_encoder_have_a_mask_of_their_own():
    attr = attribution(("atb", "atb_ln"), tokens=6, real=(6, 4))
    attr.key_mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
    attr.maps["atb"][:, 1, :4, 4] = torch.arange(1.0, 5)  # a key that is none of the queries
    attr.maps["atb_ln"][:, 1, :4, 4] = -torch.arange(1.0, 5)
    found = contextualization_change(attr)["value"].iloc[0]
    expected = [1 - spearman(attr.maps["atb"][0, 0], attr.maps["atb_ln"][0, 0])]
    expected.append(1 - spearman(attr.maps["atb"][0, 1, :4, :5], attr.maps["atb_ln"][0, 1, :4, :5]))
    assert found == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("asked", [TopK(2), Pool(2), Reduce(lambda rows: None)])
def test_maps_that_were_not_kept_whole(asked):
    with pytest.raises(ValueError, match=r"no whole maps of atb\w* were kept: .*keep='dense', or .*ChangeSample"):
        contextualization_change(kept(asked, some(("atb", "atb_ff"))))


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


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("size", [300, 1500])
def test_the_standard_error_is_how_far_samples_lie(size, levels):
    """With ties, and without; of few of all pairs, and of half of them."""
    generator = torch.Generator().manual_seed(levels)
    a, b = torch.rand(2, 3000, generator=generator, dtype=torch.float64)
    b = a + b * a
    if levels:
        a, b = (a * levels).floor(), (b * levels).floor()
    found, errors = [], []
    for _ in range(200):
        some = torch.randperm(3000, generator=generator)[:size]
        found.append(spearman(a[some], b[some]))
        errors.append(standard_error(a[some], b[some], 3000))
    off = torch.tensor(found) - spearman(a, b)
    # Of 200 draws, a spread is known to 1 / sqrt(400) of itself: five per cent, three times.
    assert float(off.norm()) / math.sqrt(200) == pytest.approx(sum(errors) / 200, rel=0.15)


def test_the_delta_method_is_what_one_more_pair_changes():
    """By differences: the correlation of ranks of weighted pairs, with a little more weight on one of them."""
    a, b = torch.randint(5, (2, 40), generator=torch.Generator().manual_seed(2)).double()
    b = a + b

    def weighted(weights):
        f, g = (((x > x[:, None]).double().T + (x == x[:, None]).double() / 2) @ weights for x in (a, b))
        f, g = f - weights @ f, g - weights @ g
        return weights @ (f * g) / ((weights @ f**2) * (weights @ g**2)).sqrt()

    even = torch.full((40,), 1 / 40, dtype=torch.float64)
    assert weighted(even).item() == pytest.approx(spearman(a, b), abs=1e-12)
    step = 1e-5
    towards = [(1 - step) * even + step * one for one in torch.eye(40, dtype=torch.float64)]
    away = [(1 + step) * even - step * one for one in torch.eye(40, dtype=torch.float64)]
    change = torch.stack([(weighted(w) - weighted(v)) / (2 * step) for w, v in zip(towards, away, strict=True)])
    expected = float(change.norm()) / 40 * math.sqrt(1 - 40 / 100)
    assert standard_error(a, b, 100) == pytest.approx(expected, rel=1e-6)


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
