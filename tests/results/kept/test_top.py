"""The largest entries of every row, against the whole maps."""

import pytest
import torch
from keeping import CUTS, SCOPES, kept, row, some

from ffattr import TopK
from ffattr.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_top_is_the_largest_of_every_row_with_ties_in_order(k, how):
    attr = some(causal=True)
    found = kept(TopK(k), attr, **how)
    assert found.maps == {}
    every = torch.arange(7)
    for scope in SCOPES:
        top, maps = found.largest[scope], attr.maps[scope]
        assert top.keys.dtype == torch.int32
        assert top.values.shape == (*maps.shape[:-1], k)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in maps.shape[:-1])).tolist():
            values, keys = row(maps[tuple(at)], every, k)
            assert (top.values[tuple(at)].tolist(), top.keys[tuple(at)].tolist()) == (values, keys)
        torch.testing.assert_close(top.total, maps.sum(-1), rtol=1e-14, atol=0)
        dense = top.dense(7)
        assert torch.equal(torch.where(dense > 0, dense, maps), maps)
        assert torch.equal((dense > 0).sum(-1), (maps > 0).sum(-1).clamp_max(k))
        torch.testing.assert_close(top.rest, (maps - dense).norm(dim=-1), rtol=1e-14, atol=0)


def test_equal_entries_give_the_lowest_positions():
    attr = some(("atb",))
    attr.maps["atb"][0, 0, 1] = torch.tensor([1.0, 2, 0, 2, 1, 1, 2])
    top = kept(TopK(4), attr).largest["atb"]
    assert top.keys[0, 0, 1].tolist() == [1, 3, 6, 0]
    long = torch.ones(1, 1, 2, 5000)  # as long as where topk changes its algorithm
    sink = TopK(40).open({"atb": (1, 1, 2, 5000)}, torch.float32, torch.device("cpu"), [0], [0, 1])
    sink.add_rows(0, 0, torch.arange(2), torch.arange(5000), {"atb": long[0, 0]})
    assert sink.finish().largest["atb"].keys[0, 0].tolist() == [list(range(40))] * 2


def test_top_says_what_is_wrong():
    attr = some(("atb",))
    top = kept(TopK(2), attr).largest["atb"]
    with pytest.raises(ValueError, match="keys=6, but there are entries up to position 6"):
        top.dense(6)
    assert kept(TopK(2), some(("atb",), queries=())).largest["atb"].dense(0).shape == (3, 2, 0, 0)
    attr.maps["atb"][0, 0, 1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="scope atb has entries that are NaN"):
        kept(TopK(2), attr)


def test_signed_entries_are_ranked_by_size_and_keep_their_signs():
    tile = torch.tensor([[1.0, -3, 0, 3, 2], [-1.0, 0, 0, 0, 0.5]])
    sink = TopK(3).open({"flow": (1, 1, 2, 5)}, torch.float64, torch.device("cpu"), [0], [0, 1])
    sink.add_rows(0, 0, torch.arange(2), torch.arange(5), {"flow": tile})
    top = sink.finish().largest["flow"]
    assert top.values[0, 0].tolist() == [[-3, 3, 2], [-1, 0.5, 0]]
    assert top.keys[0, 0].tolist() == [[1, 3, 4], [0, 4, -1]]
    assert top.total[0, 0].tolist() == [3, -0.5]
    assert top.rest[0, 0].tolist() == [1, 0]
    assert top.dense(5)[0, 0].tolist() == [[0, -3, 0, 3, 2], [-1, 0, 0, 0, 0.5]]
