"""Blocks of queries, each within one sequence: what the programs of a launch work on.

Of one sequence a program finds its block by itself. Of several there is a table, which is copied to the GPU: that is no
part of a CUDA graph, since what a copy reads has to be there whenever the graph is replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["find_block", "query_blocks"]


def query_blocks(bounds: Sequence[tuple[int, int]], block: int, device: torch.device) -> tuple[int, Tensor | None]:
    """Returns how many blocks there are, and for several sequences their table ``[count, 4]`` int32 on ``device``:
    first query, number of queries, first key, number of keys.

    A block has at most ``block`` queries, all of one sequence, and meets all keys of that sequence. ``bounds``, by
    `ffattr.ops.torch_kernels.sequence_bounds`: (first query, first key) of every sequence, and where the last one ends.
    Raises RuntimeError for several sequences while a CUDA graph is captured.
    """
    if len(bounds) == 2:
        return triton.cdiv(bounds[1][0], block), None
    rows = [
        (first, min(block, end - first), key, next_key - key)
        for (start, key), (end, next_key) in pairwise(bounds)
        for first in range(start, end, block)
    ]
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 4)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{len(bounds) - 1} sequences in one call of a Triton kernel cannot be captured in a CUDA graph, since "
                "their table is copied to the GPU; capture a call for each sequence"
            )
        table = table.pin_memory()  # a copy from other memory would wait for all work queued on the GPU
    return len(rows), table.to(device, non_blocking=True)


@triton.jit
def find_block(table, index, queries, keys, QUERIES: tl.constexpr):
    """Returns of block ``index`` the first query, the number of queries, the first key and the number of keys.

    ``table`` is that of `query_blocks`; without it there is one sequence of ``queries`` and ``keys``.
    """
    if table is None:
        first = index * QUERIES
        count = tl.minimum(queries - first, QUERIES)
        first_key = first * 0
        key_count = keys
    else:
        at = table + 4 * index
        first, count = tl.load(at), tl.load(at + 1)
        first_key, key_count = tl.load(at + 2), tl.load(at + 3)
    return first, count, first_key, key_count
