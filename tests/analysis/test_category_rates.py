"""How often pairs fall into categories, counted by hand."""

import math
from dataclasses import replace

import documented
import pandas as pd
import pytest
from keeping import kept, some

import ffattr
from ffattr import Reduce
from ffattr.analysis import AmplifiedPairs, Categories, amplified_pairs, category_rates, pair_categories
from ffattr.analysis.category_rates import _chance_of_at_least, count_all_pairs


def named(attr):
    words = ["the", "dog", "##s"]
    texts = [["[CLS]", *words, "and", "the", "cat"], [*["[PAD]"] * 2, *words, *["[PAD]"] * 2]]
    return replace(attr, tokens=texts)


@pytest.mark.parametrize("causal", [False, True])
def test_rates_are_counted_pairs(causal):
    attr = named(some(("atb", "atb_ff"), causal=causal, queries=(6, 3, 4, 0)))
    real = ((0, 1, 3, 4, 5, 6), (2, 3, 4))
    top = amplified_pairs(attr, 6, self_pairs=True)
    counts, total = dict.fromkeys(Categories().names, 0), 0
    hits = {(layer, name): 0 for layer in attr.layers for name in counts}
    drawn = dict.fromkeys(attr.layers, 0)
    chosen = set(top[["layer", "batch", "query", "key"]].itertuples(index=False, name=None))
    for batch, places in enumerate(real):
        kinds = pair_categories([attr.tokens[batch][at] for at in places])
        for i, query in enumerate(places):
            for j, key in enumerate(places):
                if query not in attr.queries or query == key or (causal and key > query):
                    continue
                total += 1
                for name in counts:
                    counts[name] += int(kinds[name][i, j])
                for layer in attr.layers:
                    taken = (layer, batch, query, key) in chosen
                    drawn[layer] += taken
                    for name in counts:
                        hits[layer, name] += taken and bool(kinds[name][i, j])
    frame = category_rates(top, attr)
    assert list(zip(frame["layer"], frame["category"], strict=True)) == list(hits)
    assert list(frame["count"]) == list(hits.values())
    assert list(frame["pairs"]) == [drawn[layer] for layer in frame["layer"]]
    assert set(frame["all_pairs"]) == {total}
    assert list(frame["all_count"]) == list(counts.values()) * 3
    for row in frame.itertuples():
        assert row.share == frame["count"][row.Index] / row.pairs
        assert row.base_rate == counts[row.category] / total
        if row.base_rate:
            assert row.lift == row.share / row.base_rate
        else:
            assert math.isnan(row.lift)
    assert frame["count"].sum() > 0
    # The categories of the frame are those that are counted.
    others = top[top["query"] != top["key"]]
    for name in counts:
        assert others.groupby("layer")[name].sum().tolist() == frame[frame["category"] == name]["count"].tolist()


def test_rates_of_a_stream_need_no_maps():
    attr = named(some(("atb", "atb_ff"), causal=True))
    collector = AmplifiedPairs(8)
    result = kept(Reduce(collector), attr, cut=2)
    assert not result.maps
    pd.testing.assert_frame_equal(category_rates(collector, result), category_rates(amplified_pairs(attr, 8), attr))


# Pairs of a corpus: the logarithms of factorials of such numbers have few digits behind the point.
LARGE = [(40, 3 * 10**9, 10**12), (30, 10**15 - 5 * 10**6, 10**15), (25, 7, 10**11), (300, 10**5, 2 * 10**6)]


@pytest.mark.parametrize(
    ("drawn", "marked", "of"), [(5, 7, 30), (20, 18, 30), (4, 0, 9), (3, 9, 9), (50, 400, 9000), *LARGE]
)
def test_the_chance_of_as_many_at_random(drawn, marked, of):
    ways = [math.comb(marked, x) * math.comb(of - marked, drawn - x) for x in range(drawn + 1)]
    for count in range(max(0, drawn - (of - marked)), min(drawn, marked) + 1):
        expected = sum(ways[count:]) / math.comb(of, drawn)
        assert _chance_of_at_least(count, drawn, marked, of) == pytest.approx(expected, rel=1e-8)


def test_a_model_from_text_to_rates():
    """A stream of a real forward pass says what its kept maps say."""
    with_maps, model, words = (documented.namespace()[name] for name in ("attr", "model", "tokenizer"))
    collector, texts = AmplifiedPairs(20), ["The cat sat on the mat.", "Dogs barking."]
    attr = ffattr.attribute(model, texts, tokenizer=words, scopes=["atb", "atb_ff"], keep=Reduce(collector))
    expected = amplified_pairs(with_maps, 20)
    found = collector.frame(attr)
    pd.testing.assert_frame_equal(found, expected)
    # Sentences of 9 and 7 tokens; dog ##s and bark ##ing are words, "the" comes twice.
    rates = category_rates(collector, attr).set_index(["layer", "category"])
    assert set(rates["all_pairs"]) == {9 * 8 + 7 * 6}
    assert rates.loc[(0, "subwords"), "all_count"] == 4
    assert rates.loc[(0, "repeated"), "all_count"] == 2
    assert rates.loc[1, "count"].to_dict() == found[found["layer"] == 1][list(Categories().names)].sum().to_dict()


def test_pairs_of_a_token_and_itself_are_on_neither_side():
    attr = named(some(("atb", "atb_ff")))
    own = pd.DataFrame({"layer": 0, "batch": [0, 0, 1], "query": [3, 4, 2], "key": [3, 5, 2]})
    found = category_rates(own, attr)
    assert set(found["pairs"]) == {1}
    assert set(found["all_pairs"]) == {6 * 5 + 3 * 2}
    for nothing in (own.iloc[[0, 2]], own[:0]):
        assert len(category_rates(nothing, attr)) == 0


def test_all_pairs_together_are_what_there_is_by_chance():
    attr = named(some(("atb", "atb_ff")))
    every = [(0, b, i, j) for b, real in enumerate(((0, 1, 3, 4, 5, 6), (2, 3, 4))) for i in real for j in real]
    found = category_rates(pd.DataFrame(every, columns=["layer", "batch", "query", "key"]), attr)
    assert found["count"].equals(found["all_count"])
    assert set(found["p_value"]) == {1.0}
    assert set(found["lift"].dropna()) == {1.0}


def test_counts_of_sequences_add_up_to_those_of_all():
    attr = named(some(("atb", "atb_ff")))
    counts = count_all_pairs(attr, Categories())
    assert {batch: total for batch, (total, _) in counts.items()} == {0: 6 * 5, 1: 3 * 2}
    rates = category_rates(amplified_pairs(attr, 8), attr).query("layer == layer.min()").set_index("category")
    for name in Categories().names:
        assert rates.loc[name, "all_count"] == sum(of[name] for _, of in counts.values())
