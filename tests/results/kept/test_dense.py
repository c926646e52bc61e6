"""Whole maps kept in memory."""

import pytest
import torch
from keeping import CUTS, SCOPES, kept, some

from ffattr import Dense
from ffattr.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("queries", [None, (5, 0, 2, 2)])
def test_dense_is_the_maps(how, queries):
    attr = some(queries=queries)
    found = kept(Dense(), attr, **how)
    assert found.maps.keys() == attr.maps.keys()
    assert all(torch.equal(found.maps[scope], attr.maps[scope]) for scope in SCOPES)
    assert (found.largest, found.reduced, found.block) == ({}, [], None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dense_in_another_dtype(dtype):
    attr = some(dtype=torch.float32)
    found = kept(Dense(dtype), attr)
    assert all(torch.equal(found.maps[scope], attr.maps[scope].to(dtype)) for scope in SCOPES)


@pytest.mark.parametrize(
    ("kept_in", "computed", "largest", "advice"),
    [
        (torch.float16, torch.float32, 65520.0, "keep the maps in torch.bfloat16"),
        (torch.float32, torch.float64, 1e39, "keep the maps in torch.float64"),
    ],
)
def test_a_norm_beyond_the_range_is_an_error_that_says_what_is_wide_enough(kept_in, computed, largest, advice):
    attr = some(("atb",), dtype=computed)
    attr.maps["atb"][2, 1, 3, 2] = largest
    with pytest.raises(NonFiniteError, match=rf"an entry of atb is .*beyond the range of {kept_in}.*{advice}"):
        kept(Dense(kept_in), attr)
    attr.maps["atb"][2, 1, 3, 2] = torch.finfo(kept_in).max
    assert kept(Dense(kept_in), attr).maps["atb"].isfinite().all()
