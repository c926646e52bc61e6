"""Blocks of rows handed on to a function."""

import pytest
import torch
from keeping import kept, some

from ffattr import Reduce

pytestmark = pytest.mark.usefixtures("one_thread")


def test_reduce_hands_on_every_block_and_lists_what_comes_back():
    attr = some(queries=(5, 0, 2))
    blocks = []

    def fn(rows):
        blocks.append(rows)
        return None if rows.batch else (rows.layer, rows.queries.tolist())

    found = kept(Reduce(fn), attr, cut=2)
    assert (found.maps, found.largest) == ({}, {})
    assert found.reduced == [(layer, queries) for layer in (0, 2, 5) for queries in ([5, 0],)]
    assert [(rows.layer, rows.batch) for rows in blocks] == [(n, b) for n in (0, 2, 5) for b in (0, 1)]
    for rows in blocks:
        assert rows.keys.tolist() == attr.mask[rows.batch].nonzero()[:, 0].tolist()
        n = [attr.queries.index(query) for query in rows.queries.tolist()]
        for scope, maps in attr.maps.items():
            expected = maps[attr.layers.index(rows.layer), rows.batch][..., n, :][..., rows.keys]
            assert torch.equal(rows.maps[scope], expected)


def test_an_error_of_the_function_passes_through():
    def fn(rows):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        kept(Reduce(fn), some())
