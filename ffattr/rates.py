"""How fast each method runs on this machine: what decides where counted operations come near each other."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from .backends import BACKENDS
from .dtypes import operand_dtype, result_dtype

__all__ = ["measured"]


@functools.lru_cache(maxsize=16)
def measured(name: str, dtype: torch.dtype, device: torch.device, threads: int) -> tuple[float, float]:
    """Operations per second of *direct* and *operator* with wide products in ``dtype``, by a short run of each.

    About 0.1 s, once for a machine.
    """
    del threads  # part of the key: another number of threads has other rates
    operators = BACKENDS[name].operators
    heads, head_dim, width, ff_width, queries, keys = 8, 32, 256, 1024, 16, 192
    if device.type == "cuda":  # which would be done with these before the next kernel is launched
        heads, head_dim, width, ff_width, queries, keys = 12, 64, 768, 3072, 64, 1024

    def tensor(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=operand_dtype(dtype), device=device)

    alpha, position = tensor(heads, queries, keys).to(result_dtype(dtype)), torch.arange(queries, device=device)
    slope, down = tensor(1, queries, ff_width), tensor(ff_width, width)
    tail = (tensor(keys, heads + 1, width), None, None, None, False)
    inner = heads * head_dim

    def direct() -> object:
        features = tensor(1, keys, heads + 1, ff_width)
        return operators.ff_norms(alpha, position, features, slope, down, None, *tail)

    def operator() -> object:
        maps, own = tensor(1, inner, ff_width), tensor(1, queries, ff_width)
        return operators.operator_norms(alpha, position, tensor(keys, heads, head_dim), maps, own, slope, down, *tail)

    flops = (
        2.0 * queries * keys * ff_width * width,
        2.0 * queries * inner * ff_width * width + 2.0 * queries * keys * inner * width,
    )
    return flops[0] / _best(direct, device), flops[1] / _best(operator, device)


def _best(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)
