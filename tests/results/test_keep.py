"""What ``keep=`` may be."""

import pytest
import torch
from keeping import kept, some

import ffattr
from ffattr import Dense, Pool, Reduce, TopK
from ffattr.results import keep


def test_what_keep_may_be():
    assert keep.parse_keep("dense") == Dense() == ffattr.Dense(None, None)
    assert keep.parse_keep(TopK(3)) == TopK(3)
    for asked, error, message in (
        ("sparse", ValueError, r"unknown keep 'sparse', expected 'dense', or ffattr.Dense"),
        (None, TypeError, "keep is None, expected 'dense'"),
        (TopK, TypeError, "keep is <class"),
    ):
        with pytest.raises(error, match=message):
            keep.parse_keep(asked)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK(0), ValueError, r"TopK\(k=0\), expected at least 1"),
        (lambda: TopK(2.0), TypeError, r"TopK\(k=2.0\), expected an integer"),
        (lambda: Pool(-1), ValueError, r"Pool\(block=-1\)"),
        (lambda: Pool(True), TypeError, r"Pool\(block=True\)"),
        (lambda: Reduce(3), TypeError, r"Reduce\(3\), expected a function"),
        (lambda: Dense(torch.int32), ValueError, r"Dense\(dtype=torch.int32\)"),
        (lambda: Dense("float16"), ValueError, r"Dense\(dtype='float16'\)"),
        (lambda: Dense(path=3), TypeError, r"Dense\(path=3\)"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("asked", [Dense(), TopK(2), Pool(2)])
def test_what_a_policy_saves_is_restored_by_it(asked):
    attr = kept(asked, some())
    content = {"scopes": attr.scopes, **attr.kept.file_description()}
    found = keep.restore_kept(attr.scopes, attr.kept.list_tensors(attr.scopes), content)
    assert type(found) is type(attr.kept) is asked.kept
    assert (found.maps.keys(), found.largest.keys()) == (attr.maps.keys(), attr.largest.keys())
    assert (found.block, found.describe()) == (attr.block, attr.kept.describe())


def test_only_a_file_cannot_hold_an_encoder_and_a_decoder():
    for asked in (Dense(), TopK(2), Pool(2), Reduce(len)):
        asked.check_stacks()
    with pytest.raises(ValueError, match=r"keep=Dense\(path=...\) holds one stack of layers"):
        Dense(path="maps.safetensors").check_stacks()
