"""What analyses read of maps: which pairs count, rows in pieces, shares, and what names of scopes say."""

from types import SimpleNamespace

import pytest
import torch
from keeping import kept, some
from synthetic import POST_LN, PRE_LN, attribution

from ffattr import Reduce, StackedAttribution, TopK, analysis
from ffattr.analysis import rows
from ffattr.analysis.rows import (
    check_one_stack,
    check_same_run,
    find_components,
    find_ff_output,
    find_scopes_around_ff,
    has_ff_component,
    iterate_rows,
    mark_counted_pairs,
    read_summed_values,
    row_shares,
    split_rows,
)

WITHIN_BLOCKS = ("attn_heads", "attn", "atb", "atb_ff", "atb_ff_res")
"""Scopes of a layer whose norms are within its blocks, as in OLMo 2."""


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_that_count_are_of_real_tokens_and_look_back(causal):
    attr = some(("atb",), real=((0, 1, 3), (2,)), tokens=4, queries=(3, 0, 2), causal=causal)
    expected = [
        [[True, True, False, True], [True, not causal, False, not causal], [False] * 4],
        [[False] * 4, [False] * 4, [False, False, True, False]],
    ]
    assert [pairs.tolist() for pairs in mark_counted_pairs(attr)] == expected


def test_columns_of_other_tokens_count_by_their_own_mask():
    attr = attribution(("atb",), tokens=2, real=(2, 1))
    attr.key_mask = torch.tensor([[True, False, True], [False, True, False]])
    first, second = mark_counted_pairs(attr)
    assert first.tolist() == [[True, False, True]] * 2
    assert second.tolist() == [[False, True, False], [False] * 3]


def test_kept_rows_are_those_that_a_stream_brings():
    attr = some(("atb", "atb_ff"), queries=(6, 2, 0, 3))
    streamed = {}
    kept(Reduce(lambda block: streamed.update({(block.layer, block.batch): block})), attr, cut=9)
    found = list(iterate_rows(attr, ["atb", "atb_ff"], "Collector"))
    assert [(one.layer, one.batch) for one in found] == list(streamed)
    for one in found:
        block = streamed[one.layer, one.batch]
        assert torch.equal(one.queries, block.queries)
        assert torch.equal(one.keys, block.keys)
        assert all(torch.equal(one.maps[scope], block.maps[scope]) for scope in ("atb", "atb_ff"))
        assert attr.layers[one.place] == one.layer
        assert [attr.queries[row] for row in one.rows] == one.queries.tolist()
    (one,) = iterate_rows(attr, ["atb"], "Collector", layers=[2], batches=[1])
    assert (one.layer, one.batch, one.queries.tolist(), one.keys.tolist()) == (5, 1, [2, 3], [2, 3, 4])


def test_rows_of_maps_that_were_not_kept_are_refused():
    attr = some(("atb", "atb_ff"))
    for asked in (kept(TopK(2), attr), attribution(("attn", "atb_ff"))):
        with pytest.raises(ValueError, match=r"no whole maps of atb were kept: .*dense.* ffattr.analysis.Collector,"):
            next(iterate_rows(asked, ["atb"], "Collector"))


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1, 1, 1, 1, 1]), (14, [2, 2, 1]), (100, [5])])
def test_rows_are_split_into_as_many_pairs_as_fit(at_once, sizes, monkeypatch):
    monkeypatch.setattr(rows, "AT_ONCE", at_once)
    maps = {"atb": torch.rand(5, 6), "atb_ff": torch.rand(5, 6)}
    block = SimpleNamespace(queries=torch.tensor([4, 3, 2, 1, 0]), keys=torch.arange(6), maps=maps)
    parts = list(split_rows(block, ["atb_ff", "atb"]))
    assert [len(queries) for queries, _, _ in parts] == sizes
    assert torch.equal(torch.cat([queries for queries, _, _ in parts]), block.queries)
    for place, scope in enumerate(("atb_ff", "atb")):
        assert torch.equal(torch.cat([tiles[place] for _, _, tiles in parts]), maps[scope])


def test_no_keys_are_no_reason_to_stop():
    block = SimpleNamespace(queries=torch.arange(3), keys=torch.arange(0), maps={"atb": torch.rand(3, 0)})
    ((queries, keys, (tile,)),) = split_rows(block, ["atb"])
    assert (queries.tolist(), keys.tolist(), tuple(tile.shape)) == ([0, 1, 2], [], (3, 0))
    assert row_shares(tile).shape == (3, 0)


def test_shares_are_in_double_precision_and_rows_of_zeros_stay():
    found = row_shares(torch.tensor([[1.0, 3.0], [0.0, 0.0], [0.1, 0.2]]))
    assert found.dtype == torch.float64
    assert found[:2].tolist() == [[0.25, 0.75], [0.0, 0.0]]
    assert found[2].sum().item() == pytest.approx(1, abs=1e-15)


def test_what_was_collected_has_to_be_of_the_attribution():
    attr = attribution(("atb",), layers=(3, 1))
    check_same_run(attr, {1}, 2, 6)
    for layers, sequences, tokens in (({0, 1}, 2, 6), ({1}, 3, 6), ({1}, 2, 7)):
        with pytest.raises(ValueError, match=r"but this attribution is of the layers \[1, 3\] and of 2 sequences of 6"):
            check_same_run(attr, layers, sequences, tokens)
    with pytest.raises(TypeError, match=r"analyse one of them, attr.stacks\['encoder'\] or attr.stacks\['decoder'\]"):
        check_one_stack(StackedAttribution.of({"encoder": attr, "decoder": attr}))


@pytest.mark.parametrize(
    ("scopes", "steps"),
    [
        (POST_LN[:-1], ["FF", "RES"]),  # a block ends with its norm
        (WITHIN_BLOCKS, ["FF", "RES", "FF block"]),
        (("attn", "atb", "atb_ff_res"), ["FF block"]),
        (("atb", "atb_ff_res"), None),  # the last norm may be missing
        (("atb_ff", "atb_ln"), None),
        (("attn", "attn_res"), None),  # a component of the attention block
    ],
)
def test_components_by_the_names_of_scopes(scopes, steps):
    if steps is None:
        with pytest.raises(ValueError, match=f"no two neighbouring scopes .* among {', '.join(scopes)}: "):
            find_components(scopes)
        return
    found = find_components(scopes)
    assert [component for component, *_ in found] == steps
    assert has_ff_component(scopes) == ("FF" in steps)
    if "FF block" in steps:
        assert found[-1] == ("FF block", "atb", "atb_ff_res")


def test_scopes_around_the_network_and_its_output():
    assert find_scopes_around_ff(POST_LN) == ["atb", "atb_ff"]
    assert find_scopes_around_ff(PRE_LN) == ["atb_ln", "atb_ln_ff"]
    assert (find_ff_output(POST_LN), find_ff_output(PRE_LN)) == ("atb_ff", "atb_ln_ff")
    with pytest.raises(ValueError, match=r"no scopes right before and right after .* among atb, atb_ln: "):
        find_scopes_around_ff(("atb", "atb_ln"))
    with pytest.raises(ValueError, match=r"no vectors of the feed-forward network .* among atb, atb_ff_res$"):
        find_ff_output(("atb", "atb_ff_res"))


def test_vectors_told_apart_by_head_are_no_sums():
    values = torch.zeros(1, 1, 2, 3, 3, 4)
    assert read_summed_values(SimpleNamespace(scope="atb", values=values[:, :, 0])).shape == (1, 1, 3, 3, 4)
    with pytest.raises(ValueError, match="the vectors of attn_heads are told apart by head or by expert"):
        read_summed_values(SimpleNamespace(scope="attn_heads", values=values))


ANALYSES = [
    *(
        "amplified_pairs",
        "contextualization_change",
        "ff_amp",
        "ff_amp_maps",
        "rollout",
        "rollout_maps",
        "token_summary",
    ),
    *("mixing_ratio", "cancellation", "ff_energy", "norm_balance"),
]


@pytest.mark.parametrize("value", [5, None, "text", {"a": 1}, [1, 2]], ids=str)
@pytest.mark.parametrize("name", ANALYSES)
def test_what_is_nothing_to_analyse_is_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=r"expected"):
        getattr(analysis, name)(value)


@pytest.mark.parametrize("value", [5, None, "text", [1]], ids=str)
def test_pairs_and_tokens_are_what_they_should_be(value):
    with pytest.raises(TypeError, match="is no attribution: expected what"):
        analysis.category_rates(value, value)
    with pytest.raises(TypeError, match=r"pairs is a .*, expected a frame"):
        analysis.category_rates(value, attribution())
    with pytest.raises(TypeError, match="rank correlation is of two tensors"):
        analysis.spearman(value, value)
    if value != "text":
        with pytest.raises(TypeError, match=r"tokens is .*, expected a list of texts"):
            analysis.pair_categories(value)
