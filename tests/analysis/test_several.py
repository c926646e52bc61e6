"""Several collectors in one pass."""

import pandas as pd
import pytest
from keeping import kept, some

from ffattr import Reduce
from ffattr.analysis import AmplifiedPairs, Several, TokenSummary, amplified_pairs


def test_several_collectors_share_one_pass():
    attr = some(("atb", "atb_ff"))
    pairs, sums, shapes = AmplifiedPairs(4), TokenSummary(), []
    result = kept(Reduce(Several(pairs, sums, lambda rows: shapes.append(rows.layer))), attr, cut=2)
    assert result.reduced == []
    pd.testing.assert_frame_equal(pairs.frame(result), amplified_pairs(attr, 4))
    assert len(sums.frame(result)) == 3 * (6 + 3)
    assert shapes == [0] * 5 + [2] * 5 + [5] * 5
    result = kept(Reduce(Several(AmplifiedPairs(), lambda rows: rows.layer)), attr, cut=7)
    assert result.reduced == [(None, 0), (None, 0), (None, 2), (None, 2), (None, 5), (None, 5)]
    with pytest.raises(TypeError, match=r"Several\(3\), expected functions that take an ffattr.Rows"):
        Several(3)


def test_collectors_get_the_same_block_in_their_order():
    seen = []
    several = Several(lambda rows: seen.append(("first", rows)), lambda rows: seen.append(("second", rows)))
    block = object()
    assert several(block) is None
    assert seen == [("first", block), ("second", block)]
    assert Several(lambda rows: 0, lambda rows: None)(block) == (0, None)  # a zero is something
    assert Several()(block) is None


def test_an_error_of_one_stops_all():
    seen = []

    def fail(rows):
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        Several(fail, seen.append)(object())
    assert seen == []
