"""Blocks of queries: every query once, each block within its sequence."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from guards import DEVICE

query_blocks = pytest.importorskip("ffattr.ops.triton.blocks").query_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize("block", [1, 4, 16])
def test_blocks_cover_every_query_once(block: int) -> None:
    bounds = [(0, 0), (1, 5), (1, 9), (33, 9), (40, 70)]
    table = query_blocks(bounds, block, CPU)
    expected = [
        [first, min(block, end - first), first_key, end_key - first_key]
        for (start, first_key), (end, end_key) in pairwise(bounds)
        for first in range(start, end, block)
    ]
    assert table.tolist() == expected
    assert table.dtype == torch.int32


def test_no_queries_are_no_blocks() -> None:
    assert query_blocks([(0, 0), (0, 7)], 4, CPU).shape == (0, 4)


def test_a_block_ends_with_its_sequence() -> None:
    """Of three queries and two keys, then of four queries and seven keys."""
    table = query_blocks([(0, 0), (3, 2), (7, 9)], 4, DEVICE)
    assert table.device.type == DEVICE.type
    assert table.tolist() == [[0, 3, 0, 2], [3, 4, 2, 7]]
    assert query_blocks([(0, 0), (3, 2), (7, 9)], 2, CPU).tolist() == [
        *([0, 2, 0, 2], [2, 1, 0, 2]),
        *([3, 2, 2, 7], [5, 2, 2, 7]),
    ]
