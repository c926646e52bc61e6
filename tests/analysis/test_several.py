"""Several collectors in one pass."""

import pandas as pd
import pytest
from keeping import kept, some

from ffattr import Reduce
from ffattr.analysis import (
    AmplifiedPairs,
    Several,
    TokenSummary,
    amplified_pairs,
)


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
