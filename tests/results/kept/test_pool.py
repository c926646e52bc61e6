"""Means of blocks, against the whole maps."""

import pytest
import torch
from keeping import CUTS, SCOPES, kept, opened, some

from ffattr import Pool

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("queries", [None, (6, 0, 2, 2, 5)])
@pytest.mark.parametrize("block", [1, 2, 3, 10])
def test_pool_is_the_mean_over_real_pairs(block, queries, how):
    attr = some(queries=queries)
    found = kept(Pool(block), attr, **how)
    assert found.block == block
    rows = torch.tensor(attr.queries)
    for scope in SCOPES:
        maps = attr.maps[scope]
        for batch in range(2):
            for i, some_rows in enumerate(torch.arange(len(rows)).split(block)):
                for j, some_keys in enumerate(torch.arange(7).split(block)):
                    n = some_rows[attr.mask[batch][rows[some_rows]]]
                    t = some_keys[attr.mask[batch][some_keys]]
                    of = maps[:, batch][..., n, :][..., t]
                    mean = of.mean((-1, -2)) if of.numel() else torch.zeros(of.shape[:-2], dtype=of.dtype)
                    torch.testing.assert_close(found.maps[scope][:, batch, ..., i, j], mean, rtol=1e-14, atol=0)
        assert found.maps[scope].shape[-2:] == (-(-len(rows) // block), -(-7 // block))


def test_pooled_maps_are_the_same_however_rows_come():
    attr = some(("atb",), dtype=torch.float32)
    attr.maps["atb"] = attr.maps["atb"] * torch.rand(attr.maps["atb"].shape)
    first, second = (kept(Pool(4), attr, **how).maps["atb"] for how in CUTS[:2])
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, second, rtol=1e-7, atol=0)


def test_maps_by_expert_are_not_pooled():
    with pytest.raises(ValueError, match=r"Pool\(block=2\).*atb_ln_ff_experts is told apart by each token's own"):
        opened(Pool(2), some(("atb_ln_ff_experts",)))
