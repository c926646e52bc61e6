"""What the precision that a user asks for means for each operand.

That precision is one of the *wide products*, those with the feed-forward matrices. Everything else of a layer
(attention, statistics of norms, slopes, the norms that are the result) is float64 with float64 and float32 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

__all__ = [
    "are_finite",
    "find_narrowest",
    "operand_dtype",
    "output_tolerance",
    "quantised",
    "result_dtype",
    "without_autocast",
]

# Rounding alone gives 1e-6 in float32; erf-GELU taken for tanh-GELU, the smallest mistake known, gives 7e-5 and more.
_OF_OUTPUT = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SINGLE = 1e-6  # of a float64 model whose attention weights or norms were made in float32


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What maps and everything but the wide products are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(dtype: torch.dtype, rounded: bool = True) -> torch.dtype:
    """What the wide operands but the down matrix are in: with float8 bfloat16, else as that matrix.

    Not ``rounded``: what results are in, for kernels that round nothing but what they multiply by that matrix.
    """
    if not rounded:
        return result_dtype(dtype)
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switches autocast off, where a user has it on: what is computed in here is in the dtypes of its operands."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def find_narrowest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """Returns the dtype that rounds most; None where there is none among ``dtypes``."""
    given = (dtype for dtype in dtypes if dtype is not None)
    return max(given, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def are_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. Where there is none the sum is finite, and takes a tenth of the time that it
    takes to look at each entry, which is done where the sum says no: it may itself have been too large."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return math.isfinite(total.item()) or bool(tensor.isfinite().all())


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` ``[F, d]`` as float8_e4m3fn and a scale ``[d]``, so that ``float8 * scale`` is near it.

    Every column is scaled to the largest float8 number; a column of zeros stays one.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (matrix.abs().amax(0) / largest).clamp_min(torch.finfo(matrix.dtype).tiny)
    return (matrix / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


def output_tolerance(own: torch.dtype, computed: torch.dtype, rounds_to_float32: bool) -> float:
    """Largest relative difference, of any token, between a layer's output and its recomputation that rounding explains.

    The model rounds to ``own``, the recomputation to ``computed``; ``rounds_to_float32``: something in the model rounds
    to float32 whatever its dtype.
    """
    coarser = own if own.itemsize < computed.itemsize else computed
    tolerance = _OF_OUTPUT.get(coarser, _OF_OUTPUT[torch.float32])
    return max(tolerance, _SINGLE) if rounds_to_float32 else tolerance
