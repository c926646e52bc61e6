"""Blocks of queries, each within one sequence: what the programs of a launch over several sequences work on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["query_blocks"]


def query_blocks(bounds: Sequence[tuple[int, int]], block: int, device: torch.device) -> Tensor:
    """Returns ``[number of blocks, 4]`` int32 on ``device``: first query, number of queries, first key, number of keys.

    A block has at most ``block`` queries, all of one sequence, and meets all keys of that sequence. ``bounds``, by
    `ffattr.ops.torch_kernels.sequence_bounds`: (first query, first key) of every sequence, and where the last one ends.
    """
    rows = [
        (first, min(block, end - first), key, next_key - key)
        for (start, key), (end, next_key) in pairwise(bounds)
        for first in range(start, end, block)
    ]
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 4)
    if device.type == "cuda":
        table = table.pin_memory()  # a copy from other memory would wait for all work queued on the GPU
    return table.to(device, non_blocking=True)
