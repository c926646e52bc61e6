"""Panels are checked before they are shown, and read one map at a time."""

import math
import re

import pytest
import torch
from page_data import make_panel, make_scored

from ffattr.errors import NonFiniteError
from ffattr.report import render


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": ["a"]}, "'1: a panel' has 1 queries and 3 positions"),
        ({"keys": [], "key_positions": []}, "'1: a panel' has 0 keys"),
        ({"layers": []}, r"'1: a panel' has layers \[\]"),
        ({"layers": [0, 0]}, r"has layers \[0, 0\], expected one or more, each once"),
        ({"scopes": ["atb", "atb"]}, "has scopes"),
        ({"parts": {"attn": ["head 0"]}}, r"has parts of \['attn'\]"),
        ({"parts": {"atb": ["head 0", "head 1"]}}, r"atb, layer 0, of panel '1: a panel' has shape \[3, 3\]"),
        ({"read": lambda scope, place: torch.rand(3, 4)}, r"has shape \[3, 4\], expected \[3, 3\]"),
        ({"read": lambda scope, place: torch.full((3, 3), -0.5)}, "holds -0.5, expected norms"),
    ],
)
def test_panels_that_cannot_be_shown_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        render([make_panel(torch.rand(1, 3, 3), **changed)], "x")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(value):
    with pytest.raises(NonFiniteError, match="atb, layer 0, of panel '1: a panel' holds NaN or infinity"):
        render([make_panel(torch.full((1, 2, 2), value))], "x")


def test_maps_are_read_one_at_a_time_and_parts_come_together():
    heads, whole = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5)
    seen = []

    def read(scope, place):
        seen.append((scope, place))
        return (heads if scope == "attn_heads" else whole)[place]

    parts = {"attn_heads": ["head 0", "head 1", "head 2"]}
    panel = make_panel(whole, scopes=["attn_heads", "atb"], parts=parts, layers=[7, 3], read=read)
    panel.check()
    assert seen == []
    assert panel.entries == 2 * (3 + 1) * 4 * 5
    for number, (scope, place, maps) in enumerate(panel.maps()):
        assert len(seen) == number + 1  # nothing is read before it is wanted
        expected = heads[place] if scope == "attn_heads" else whole[place][None]
        assert torch.equal(torch.stack([torch.from_numpy(one) for one in maps]), expected)
    assert seen == [("attn_heads", 0), ("attn_heads", 1), ("atb", 0), ("atb", 1)]


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3), (2, 3, 4), (2, 1, 3, 3)])
def test_parts_have_an_axis_of_their_own(shape):
    panel = make_panel(torch.rand(1, 2, 3, 3), read=lambda scope, place: torch.rand(shape))
    panel.check()
    with pytest.raises(ValueError, match=re.escape(f"has shape {list(shape)}, expected [2, 3, 3]")):
        next(panel.maps())


def test_scores_that_cannot_be_shown_are_named():
    scores = torch.randn(2, 4, 5)
    cases = [
        ({"layers": [0, 1]}, "'1: a text' has 4 boundaries of 2 layers, expected one more than layers"),
        ({"keys": ["a"], "key_positions": [0]}, r"scores of 'number 0' of panel '1: a text' have shape \[4, 5\]"),
        ({"scores": None}, "'1: a text' has neither maps nor scores"),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            render([make_scored(scores, **changed)], "x")
    scores[1, 2, 3] = math.nan
    with pytest.raises(NonFiniteError, match="the scores of 'number 1' of panel '1: a text' holds NaN"):
        render([make_scored(scores)], "x")


def test_entries_are_those_of_maps_and_scores():
    scores, flow = torch.randn(2, 4, 5), torch.randn(2, 3, 5, 5)
    assert make_scored(scores).entries == 2 * 4 * 5
    panel = make_scored(scores, flow)
    assert panel.entries == 2 * 4 * 5 + 2 * 3 * 25
    assert [(scope, place) for scope, place, _ in panel.maps()] == [
        (f"number {k}", n) for k in (0, 1) for n in range(3)
    ]
    assert not list(make_scored(scores).maps())
