"""What every policy has to bear: no rows, no keys, missing scopes, another device."""

from types import SimpleNamespace

import pytest
import torch
from keeping import SCOPES, kept, opened, some
from two_devices import THERE, TwoDevices

from ffattr import Dense, Pool, Reduce, TopK
from ffattr.results.kept import policy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("asked", [Dense(), TopK(2), Pool(2), Reduce(lambda rows: rows.layer)])
def test_no_rows_at_all(asked):
    attr = some(queries=())
    sink = opened(asked, attr)
    none = torch.empty(0, dtype=torch.int64)
    sink.add_rows(0, 0, none, none, {scope: maps[0, 0][..., :0] for scope, maps in attr.maps.items()})
    found = sink.finish()
    assert found.reduced == []
    assert all(maps.shape[-2] == 0 for maps in found.maps.values())


@pytest.mark.parametrize("asked", [Dense(), TopK(2), Pool(2), Reduce(lambda rows: rows.keys.tolist())])
def test_no_keys_at_all(asked):
    attr = some()
    sink = opened(asked, attr)
    none = torch.empty(0, dtype=torch.int64)
    sink.add_rows(
        1, 0, torch.tensor([3, 5]), none, {scope: maps[1, 0][..., [3, 5], :0] for scope, maps in attr.maps.items()}
    )
    found = sink.finish()
    assert not any(maps.any() for maps in found.maps.values())
    assert not any(top.values.any() or top.rest.any() or (top.keys >= 0).any() for top in found.largest.values())
    assert found.reduced == ([[]] if isinstance(asked, Reduce) else [])


@pytest.mark.parametrize("asked", [Dense(), TopK(2), Pool(2)])
def test_a_scope_that_a_layer_lacks_stays_empty(asked):
    attr = some(("atb", "atb_ff"))
    sink = opened(asked, attr)
    sink.add_rows(0, 0, torch.tensor([1]), torch.arange(7), {"atb": attr.maps["atb"][0, 0, 1:2]})
    found = sink.finish()
    values = found.maps or {scope: top.values for scope, top in found.largest.items()}
    assert values["atb"].any()
    assert not values["atb_ff"].any()


@pytest.mark.parametrize("asked", [Dense(), Dense(torch.float16), TopK(2), Pool(2)])
@pytest.mark.parametrize("queries", [None, (5, 0, 2)])
def test_tiles_from_another_device(asked, queries):
    """The sink is on one device and the layer on another."""
    attr = some(queries=queries)
    expected = kept(asked, attr)
    with TwoDevices():
        found = kept(asked, attr, device=THERE)
    for scope in SCOPES:
        if expected.largest:
            for part in ("values", "keys", "rest", "total"):
                assert torch.equal(getattr(found.largest[scope], part), getattr(expected.largest[scope], part))
        else:
            assert torch.equal(found.maps[scope], expected.maps[scope])


@pytest.mark.parametrize(
    ("asked", "size"),
    [(TopK(2**33), r"[\d,]+\.\d GiB"), (TopK(2**62), r"[\d,]+\.\d GiB"), (Pool(1), "0.0 GiB"), (Dense(), "0.0 GiB")],
)
def test_what_is_beyond_the_memory_is_refused_by_its_size(monkeypatch, asked, size):
    attr = some(("atb",))
    if not isinstance(asked, TopK):
        monkeypatch.setattr(policy.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    expected = (
        rf"what keep={type(asked).__name__}\(.*\) holds would take {size}, more than the .* GiB that are free; ask"
    )
    with pytest.raises(ValueError, match=expected):
        opened(asked, attr)


@pytest.mark.parametrize("make", [TopK, Pool])
def test_counts_are_numbers_that_there_are(make):
    with pytest.raises(ValueError, match=r"=9223372036854775808\), expected at least 1 and less than 2\*\*63"):
        make(2**63)
