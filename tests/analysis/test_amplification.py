import pandas as pd
import pytest
import torch
from keeping import kept, some
from synthetic import POST_LN, PRE_LN, attribution

from ffattr import Pool, Reduce, StackedAttribution, TopK
from ffattr.analysis import (
    AmplifiedPairs,
    amplified_pairs,
    category_rates,
    ff_amp,
    ff_amp_maps,
)

MAPS = {
    "padded": (some(POST_LN), ("atb", "atb_ff")),
    "causal": (some(PRE_LN, causal=True, queries=(6, 3, 4, 0)), ("atb_ln", "atb_ln_ff")),
    "float32": (attribution(("atb", "atb_ff"), queries=(0, 3, 5)), ("atb", "atb_ff")),
}
maps = pytest.mark.parametrize(("attr", "scopes"), MAPS.values(), ids=MAPS)


def loop(attr, scopes):
    """(layer, batch, query, key): share before and after, of all pairs that count."""
    found = {}
    for place, layer in enumerate(attr.layers):
        for batch, mask in enumerate(attr.mask.tolist()):
            for row, query in enumerate(attr.queries):
                keys = [key for key, real in enumerate(mask) if real]
                sides = []
                for scope in scopes:
                    values = attr.maps[scope][place, batch, row].tolist()
                    total = sum(values[key] for key in keys)
                    sides.append({key: values[key] / total if total else 0.0 for key in keys})
                for key in keys:
                    if mask[query] and not (attr.arguments["causal"] and key > query):
                        found[layer, batch, query, key] = (sides[0][key], sides[1][key])
    return found


def of_frame(frame):
    """The same of a frame, in its order."""
    rows = frame[["layer", "batch", "query", "key", "before", "after"]].itertuples(index=False, name=None)
    return {tuple(row[:4]): tuple(row[4:]) for row in rows}


@maps
def test_ff_amp_is_the_difference_of_shares(attr, scopes, monkeypatch):
    frame, expected = ff_amp(attr), loop(attr, scopes)
    assert list(frame) == [
        *("layer", "batch", "query", "key", "query_token", "key_token", "before", "after", "amplification")
    ]
    found = of_frame(frame)
    assert len(frame) == len(found)
    assert found.keys() == expected.keys()
    for pair, values in found.items():
        assert values == pytest.approx(expected[pair], abs=1e-12)
    assert (frame["amplification"] == frame["after"] - frame["before"]).all()
    assert frame["key_token"][3] == attr.tokens[0][frame["key"][3]]
    names = [attr.tokens[batch][query] for batch, query in zip(frame["batch"], frame["query"], strict=True)]
    assert list(frame["query_token"]) == names
    whole = torch.zeros_like(attr.maps[scopes[0]], dtype=torch.float64)
    for (layer, batch, query, key), (before, after) in expected.items():
        whole[attr.layers.index(layer), batch, attr.queries.index(query), key] = after - before
    for at_once in (2**20, 10):
        monkeypatch.setattr("ffattr.analysis.rows.AT_ONCE", at_once)
        torch.testing.assert_close(ff_amp_maps(attr), whole, rtol=0, atol=1e-12)


def test_one_layer_and_sequence_of_ff_amp():
    attr = some(POST_LN)
    whole = ff_amp(attr)
    part = ff_amp(attr, layer=2, batch=-1)
    expected = whole[(whole["layer"] == 2) & (whole["batch"] == 1)].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected)
    pd.testing.assert_frame_equal(ff_amp(attr, layer=-2, batch=1), expected)
    with pytest.raises(IndexError, match="layer 1 was not computed; computed: 0, 2, 5"):
        ff_amp(attr, layer=1)
    with pytest.raises(IndexError, match="batch 2 is out of range: there are 2 sequences"):
        ff_amp(attr, batch=2)


def best(attr, scopes, k, per, self_pairs):
    """The pairs kept, by sorting all."""
    groups = {}
    for pair, (before, after) in loop(attr, scopes).items():
        layer, batch, query, key = pair
        if (before or after) and (self_pairs or query != key):
            groups.setdefault((layer, batch if per == "sequence" else 0), []).append((before - after, pair))
    # Equal to rounding: the eighths of which these maps consist give the same share in many ways.
    order = {group: sorted((round(less, 12), pair[1:], pair) for less, pair in of) for group, of in groups.items()}
    return [pair for group in sorted(order) for _, _, pair in order[group][:k]]


@maps
@pytest.mark.parametrize("per", ["layer", "sequence"])
@pytest.mark.parametrize(("k", "self_pairs"), [(5, False), (7, True), (1000, False)])
def test_amplified_pairs_are_the_first_of_all_sorted(attr, scopes, per, k, self_pairs):
    frame = amplified_pairs(attr, k, per, self_pairs)
    expected = best(attr, scopes, k, per, self_pairs)
    found = list(of_frame(frame))
    shares = loop(attr, scopes)

    def change(pair):
        return shares[pair][1] - shares[pair][0]

    assert [change(p) for p in found] == pytest.approx([change(p) for p in expected], abs=1e-12)
    if attr is MAPS["float32"][0]:  # without equals
        assert found == expected
    assert len(set(found)) == len(found)
    groups = ["layer"] if per == "layer" else ["layer", "batch"]
    for _, rows in frame.groupby(groups):
        assert list(rows["rank"]) == list(range(1, len(rows) + 1))
        assert rows["amplification"].is_monotonic_decreasing
    assert (frame["query"] == frame["key"]).any() == self_pairs
    assert ((frame["before"] > 0) | (frame["after"] > 0)).all()


@maps
@pytest.mark.parametrize("per", ["layer", "sequence"])
@pytest.mark.parametrize("how", [{"cut": 1}, {"cut": 2}, {"cut": 3, "backwards": True}])
def test_a_stream_gives_the_same_pairs(attr, scopes, per, how, monkeypatch):
    expected = amplified_pairs(attr, 6, per)
    for at_once in (2**20, 10):
        monkeypatch.setattr("ffattr.analysis.rows.AT_ONCE", at_once)
        collector = AmplifiedPairs(6, per)
        result = kept(Reduce(collector), attr, **how)
        assert result.reduced == []
        pd.testing.assert_frame_equal(collector.frame(result), expected, check_exact=True)


def test_equals_come_by_sequence_query_and_key():
    attr = attribution(("atb", "atb_ff"), layers=(3,), tokens=4, real=(4, 4))
    attr.maps = {scope: torch.ones(1, 2, 4, 4) for scope in attr.scopes}
    expected = [(b, q, j) for b in range(2) for q in range(4) for j in range(4) if q != j][:15]
    for how in ({"cut": 4}, {"cut": 1, "backwards": True}):
        collector = AmplifiedPairs(15)
        frame = collector.frame(kept(Reduce(collector), attr, **how))
        assert list(frame[["batch", "query", "key"]].itertuples(index=False, name=None)) == expected


def test_rows_of_zeros_have_no_shares():
    attr = attribution(("atb", "atb_ff"), layers=(0,), tokens=3, real=(3,))
    attr.maps["atb_ff"][0, 0, 1] = 0
    attr.maps["atb"][0, 0, 2] = 0
    attr.maps["atb_ff"][0, 0, 2] = 0
    frame = ff_amp(attr).set_index(["query", "key"])
    assert (frame.loc[1, "after"] == 0).all()
    assert (frame.loc[2, "amplification"] == 0).all()
    assert set(amplified_pairs(attr)["query"]) == {0, 1}


def test_columns_that_are_other_tokens():
    attr = attribution(("atb", "atb_ff"), tokens=6, real=(6, 4))
    attr.key_mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
    for values in attr.maps.values():
        values[:, 1, :4, 4] = 1
    attr.key_tokens = [[f"key{b}.{t}" for t in range(6)] for b in range(2)]
    assert set(ff_amp(attr, batch=1)["key_token"]) == {f"key1.{t}" for t in range(5)}
    with pytest.raises(ValueError, match=r"no pair is a token's own: say self_pairs=True \(and categories=None\)"):
        amplified_pairs(attr)
    with pytest.raises(ValueError, match="categories are of pairs of tokens, but the columns of these maps are not"):
        amplified_pairs(attr, self_pairs=True)
    frame = amplified_pairs(attr, 1000, self_pairs=True, categories=None)
    assert len(frame) == 3 * (36 + 20)
    assert list(frame.columns[-3:]) == ["before", "after", "amplification"]


def test_what_is_refused():
    attr = some(("atb", "atb_ff"))
    with pytest.raises(ValueError, match="k=0, expected an integer of at least 1"):
        AmplifiedPairs(0)
    with pytest.raises(ValueError, match="per='token', expected 'layer' or 'sequence'"):
        AmplifiedPairs(per="token")
    with pytest.raises(ValueError, match=r"no rows came yet: .*Reduce\(pairs\)"):
        AmplifiedPairs().frame(attr)
    lacking = some(("atb", "atb_ln"))
    for ask in (ff_amp, ff_amp_maps, amplified_pairs):
        with pytest.raises(ValueError, match=r"no scopes right before and right after .* among atb, atb_ln: .*'all'"):
            ask(lacking)
        with pytest.raises(TypeError, match=r"several stacks .* attr.stacks\['encoder'\] or attr.stacks\['decoder'\]"):
            ask(StackedAttribution.of({"encoder": attr, "decoder": attr}))
        for keep in (TopK(2), Pool(2), Reduce(lambda rows: None)):
            with pytest.raises(ValueError, match=r"no whole maps of atb were kept: .*dense.*AmplifiedPairs"):
                ask(kept(keep, attr))
    with pytest.raises(ValueError, match="no scopes right before and right after"):
        kept(Reduce(AmplifiedPairs()), lacking)
    collector = AmplifiedPairs()
    kept(Reduce(collector), attr)
    other = attribution(("atb", "atb_ff"), layers=(0, 2))
    smaller = [attribution(("atb", "atb_ff"), tokens=size, real=real) for size, real in ((5, (5, 5)), (7, (7,)))]
    for mistaken in (other, *smaller):
        with pytest.raises(ValueError, match=r"collected of the layers \[0, 2, 5\] and of at least 2 sequences of 7"):
            collector.frame(mistaken)
        with pytest.raises(ValueError, match=r"collected of the layers \[0, 2, 5\] and of at least 2 sequences of 7"):
            category_rates(collector.frame(attr), mistaken)
    with pytest.raises(ValueError, match="layer 0 of sequence 0 came twice: use a new AmplifiedPairs"):
        kept(Reduce(collector), attr)
