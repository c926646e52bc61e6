"""Plain PyTorch under ``torch.compile``, as a backend that `device_jobs.py` measures."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ffattr.ops import torch_kernels

__all__ = ["Compiled"]

_WIDEST = 1 << 28
"""Elements of a chunk's widest temporary: large enough to keep a GPU busy."""


class Compiled:
    """`torch_kernels` with ``ff_norms`` compiled for a chunk of queries: a loop over all chunks would be unrolled."""

    ig_slope, gram_norms = staticmethod(torch_kernels.ig_slope), staticmethod(torch_kernels.gram_norms)

    def __init__(self, backend: str) -> None:
        torch.compiler.reset()
        self.chunk: Any = torch.compile(torch_kernels.ff_norms, backend=backend, dynamic=False, fullgraph=True)

    def ff_norms(self, *arguments: Any) -> Tensor:
        alpha, down = arguments[0], arguments[4]
        queries, keys = alpha.shape[1:]
        most = max(1, _WIDEST // (keys * (down.shape[0] + 2 * down.shape[1])))
        step = min(queries, 1 << int(math.log2(most)))
        along = (1, 0, None, 1, None, None, None, 0, None, 0)
        parts = []
        chunks, torch_kernels.split_queries = (
            torch_kernels.split_queries,
            functools.partial(torch_kernels.split_queries, limit=1 << 62),
        )
        try:
            for start in range(0, queries, step):
                rows = [_narrowed(t, axis, start, step) for t, axis in zip(arguments, along, strict=False)]
                parts.append(self.chunk(*rows, *arguments[len(along) :]))
        finally:
            torch_kernels.split_queries = chunks
        return torch.cat(parts, 1)


def _narrowed(t: Tensor | None, axis: int | None, start: int, length: int) -> Tensor | None:
    if t is None or axis is None:
        return t
    return t.narrow(axis, start, min(length, t.shape[axis] - start))
