"""Seconds of anything on a CPU or GPU, and the rates that the machine reaches in its matrix product and its memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from ..decomposition.precision import operand_dtype

__all__ = ["copy_bandwidth", "make_product", "matrix_rate", "processor_seconds", "seconds_of", "time_median"]


def processor_seconds(run: Callable[[], object]) -> float:
    """Returns the seconds that one ``run`` takes of a processor: while others have it, this clock stands."""
    start = time.process_time()
    run()
    return time.process_time() - start


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Returns the seconds of one ``run``, on average of ``repeats`` in a row: a GPU's own time, or the clock's on a
    CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats


def time_median(run: Callable[[], object], device: torch.device, rounds: int, limit: float = math.inf) -> float:
    """Returns the median seconds of ``rounds``; no more begin than within ``limit`` seconds, but one at least.

    Call ``run`` once before: its first time counts too. On a GPU a round repeats what takes less than 10 ms.
    """
    repeats = 1
    if device.type == "cuda":
        repeats = max(1, min(50, round(0.01 / max(seconds_of(run, device), 1e-9))))
    start = time.monotonic()
    times = [seconds_of(run, device, repeats)]
    while len(times) < rounds and time.monotonic() - start < limit:
        times.append(seconds_of(run, device, repeats))
    return statistics.median(times)


def make_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """Returns a product in ``dtype`` by this machine's own library, and its number of operations."""
    m, k, n = (8192, 8192, 8192) if device.type == "cuda" else (4096, 3072, 768)
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    return lambda: a @ b, 2.0 * m * k * n


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> tuple[torch.dtype, float]:
    """Returns what wide products in ``dtype`` are compared with: a product's dtype, and its operations per second.

    The dtype is that of the wide operands on a GPU, bfloat16 for float8; on a CPU it is float32, which libraries are
    fast in.
    """
    kind = operand_dtype(dtype) if device.type == "cuda" else torch.float32
    run, flops = make_product(device, kind)
    run()
    return kind, flops / time_median(run, device, rounds)


def copy_bandwidth(device: torch.device, rounds: int = 7, size: int | None = None) -> float:
    """Returns the bytes per second, read and written, of a copy of ``size`` bytes (None: more than any cache holds)."""
    count = size or (1 << 30 if device.type == "cuda" else 1 << 28)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = source.clone()
    return 2.0 * count / time_median(lambda: target.copy_(source), device, rounds)
