import math

import pytest
import torch
from keeping import kept, some
from synthetic import POST_LN, PRE_LN, attribution

from ffattr import Pool, Reduce, TopK
from ffattr.analysis import contextualization_change, spearman
from ffattr.analysis.change import bound_mean


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
    assert list(frame) == ["layer", "component", "before", "after", "value", "low", "high"]
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
        expected.append(1 - spearman(a, b))
    assert value == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_the_mean_over_sequences_has_bounds():
    changes = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    low, high = bound_mean([*changes, math.nan])
    mean, error = float(torch.tensor(changes).mean()), float(torch.tensor(changes).std()) / 40**0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert bound_mean(changes) == bound_mean(changes)
    many = changes * 60
    low, high = bound_mean(many)
    assert (low + high) / 2 == pytest.approx(mean)
    assert high - low == pytest.approx(2 * 1.96 * error / 60**0.5, rel=0.02)
    assert all(math.isnan(end) for end in bound_mean([0.3, math.nan]))


def test_the_mean_over_sequences_has_true_bounds():
    """Of ten sequences of a known mean, the bounds hold it about as often as they say."""
    generator = torch.Generator().manual_seed(1)
    held = []
    for _ in range(100):
        low, high = bound_mean(torch.randn(10, generator=generator, dtype=torch.float64).tolist())
        held.append(low < 0 < high)
    assert 82 <= sum(held) <= 98  # percentiles of ten draws are a little narrow


def test_bounds_are_in_the_frame():
    frame = contextualization_change(attribution(real=(6, 4, 5, 6)))
    assert ((frame["low"] < frame["value"]) & (frame["value"] < frame["high"])).all()
    assert contextualization_change(attribution(real=(6,)))[["low", "high"]].isna().all(axis=None)


def test_choices_of_which_pairs_count():
    attr = attribution(("atb", "atb_ff"), layers=(0,), real=(6,))
    attr.tokens[0][0] = "[CLS]"
    before, after = (attr.maps[scope][0, 0] for scope in ("atb", "atb_ff"))
    others = ~torch.eye(6, dtype=torch.bool)
    for options, a, b in (
        ({"own": False}, before[others], after[others]),
        ({"special": False}, before[1:, 1:], after[1:, 1:]),
        ({"shares": True}, before / before.sum(-1, keepdim=True), after / after.sum(-1, keepdim=True)),
    ):
        value = contextualization_change(attr, **options)["value"][0]
        assert value == pytest.approx(1 - spearman(a.flatten(), b.flatten()), abs=1e-9), options


def test_structural_zeros_may_be_counted():
    attr = attribution(("atb", "atb_ff"), layers=(0,), real=(6,), causal=True)
    counted = contextualization_change(attr, zeros=True)["value"][0]
    a, b = (attr.maps[scope][0, 0].flatten() for scope in ("atb", "atb_ff"))
    assert counted == pytest.approx(1 - spearman(a, b), abs=1e-9)
    assert counted < contextualization_change(attr)["value"][0]


def test_maps_that_differ_in_nothing_change_by_zero_and_not_by_less():
    attr = attribution(("atb", "atb_ff"))
    attr.maps["atb_ff"] = attr.maps["atb"] * 3
    assert set(contextualization_change(attr)["value"]) == {0.0}


def test_a_causal_model_counts_no_key_after_the_query():
    attr = attribution(PRE_LN, real=(6,), queries=(2, 4), causal=True)
    value = contextualization_change(attr)["value"][0]
    a, b = (torch.cat([attr.maps[s][0, 0, 0, :3], attr.maps[s][0, 0, 1, :5]]) for s in ("atb", "atb_ln"))
    assert value == pytest.approx(1 - spearman(a, b), abs=1e-6)
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
