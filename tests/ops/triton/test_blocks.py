"""Blocks of queries: every query once, each block within its sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from guards import DEVICE

blocks = pytest.importorskip("ffattr.ops.triton.blocks")
triton = pytest.importorskip("triton")
tl = triton.language

CPU = torch.device("cpu")


@triton.jit(do_not_specialize=["queries", "keys"])
def write_blocks(table, out, queries, keys, QUERIES: tl.constexpr):
    index = tl.program_id(0)
    first, count, first_key, key_count = blocks.find_block(table, index, queries, keys, QUERIES)
    tl.store(out + 4 * index, first)
    tl.store(out + 4 * index + 1, count)
    tl.store(out + 4 * index + 2, first_key)
    tl.store(out + 4 * index + 3, key_count)


def list_blocks(bounds: Sequence[tuple[int, int]], block: int) -> list[list[int]]:
    """What the programs of a launch find."""
    count, table = blocks.query_blocks(bounds, block, DEVICE)
    assert (table is None) == (len(bounds) == 2)
    out = torch.full((count + 1, 4), -1, dtype=torch.int32, device=DEVICE)
    write_blocks[(count,)](table, out, *bounds[-1], QUERIES=block)
    found: list[list[int]] = out.tolist()
    assert found.pop() == [-1] * 4
    return found


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize(
    "bounds", [[(0, 0), (1, 5), (1, 9), (33, 9), (40, 70)], [(0, 0), (33, 7)], [(0, 0), (16, 1)]], ids=str
)
def test_blocks_cover_every_query_once(bounds: list[tuple[int, int]], block: int) -> None:
    assert list_blocks(bounds, block) == [
        [first, min(block, end - first), first_key, end_key - first_key]
        for (start, first_key), (end, end_key) in pairwise(bounds)
        for first in range(start, end, block)
    ]


def test_no_queries_are_no_blocks() -> None:
    count, table = blocks.query_blocks([(0, 0), (0, 7), (0, 9)], 4, CPU)
    assert count == 0
    assert table.shape == (0, 4)
    assert blocks.query_blocks([(0, 0), (0, 7)], 4, CPU) == (0, None)


def test_a_block_ends_with_its_sequence() -> None:
    """Of three queries and two keys, then of four queries and seven keys."""
    assert list_blocks([(0, 0), (3, 2), (7, 9)], 4) == [[0, 3, 0, 2], [3, 4, 2, 7]]
    assert list_blocks([(0, 0), (3, 2), (7, 9)], 2) == [
        *([0, 2, 0, 2], [2, 1, 0, 2]),
        *([3, 2, 2, 7], [5, 2, 2, 7]),
    ]


def test_a_table_is_no_part_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a copy reads would have to be there whenever the graph is replayed; one sequence needs none."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu = torch.device("cuda")
    assert blocks.query_blocks([(0, 0), (9, 7)], 4, gpu) == (3, None)
    with pytest.raises(RuntimeError, match=r"2 sequences in one call .* capture a call for each sequence"):
        blocks.query_blocks([(0, 0), (3, 2), (7, 9)], 4, gpu)
