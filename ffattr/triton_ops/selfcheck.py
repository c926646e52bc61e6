"""Once per process and GPU: do the kernels, as compiled here, compute what plain PyTorch computes?

A map has no check of its own, unlike a layer's output. Compilers and drivers differ, and not every GPU that Triton
knows has been tried; so `ffattr.backends` asks before the first map is made. It costs the compilation of a few small
cases, which Triton keeps on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import torch_ops
from .ff_norms import ff_norms
from .gram_norms import gram_norms
from .ig_slope import ig_slope
from .operator_norms import operator_norms

__all__ = ["failure"]

_TOKENS, _HEADS, _HEAD_DIM, _NEURONS, _WIDTH = 70, 5, 16, 144, 80  # more than one block, and no multiple of one
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of the largest entry: far above rounding, far below a wrong index."""


def failure(device: torch.device) -> str | None:
    """What went wrong on ``device``, or None."""
    return _failure(torch.device(device.type, device.index or 0))


@lru_cache
def _failure(device: torch.device) -> str | None:
    try:
        for name, kernel, definition, arguments, tolerance in _cases(device):
            wide = tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)
            found, expected = kernel(*arguments).double(), definition(*wide)
            error = float(((found - expected).abs() / expected.abs().amax((-1, -2), keepdim=True)).max())
            if not error <= tolerance:
                return f"{name} is off by {error:.1e} of the largest entry, expected at most {tolerance:.0e}"
    except Exception as error:  # whatever a compiler or driver raises: the backend is not fit to be used
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {text[0]}"
    return None


Case = tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...], float]


def _cases(device: torch.device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    alpha = random(_HEADS, _TOKENS, _TOKENS).softmax(-1).tril().contiguous()
    position = torch.arange(_TOKENS, device=device)
    scale, gamma = random(_TOKENS).abs() + 0.5, random(_WIDTH)
    vectors = random(_TOKENS, _HEADS + 1, _WIDTH).double()
    yield "gram_norms", gram_norms, torch_ops.gram_norms, (alpha, position, vectors @ vectors.mT, scale), 1e-5
    for dtype, tolerance in _TOLERANCE.items():
        for streams, activation in ((1, "gelu"), (2, "silu")):
            z = random(streams, _TOKENS, _NEURONS, dtype=dtype)
            arguments = (z, None, None, activation, "exact", 0)
            yield f"ig_slope in {dtype}", ig_slope, torch_ops.ig_slope, arguments, tolerance
            slope, down = random(streams, _TOKENS, _NEURONS, dtype=dtype), random(_NEURONS, _WIDTH, dtype=dtype)
            tail = (random(_TOKENS, _HEADS + 1, _WIDTH, dtype=dtype), scale, gamma, scale, True)
            features = random(streams, _TOKENS, _HEADS + 1, _NEURONS, dtype=dtype)
            given = (alpha, position, features, slope, down, None, *tail)
            yield f"ff_norms in {dtype}", ff_norms, torch_ops.ff_norms, given, tolerance
            values = random(_TOKENS, _HEADS, _HEAD_DIM, dtype=dtype)
            maps = random(streams, _HEADS * _HEAD_DIM, _NEURONS, dtype=dtype)
            given = (alpha, position, values, maps, slope, slope, down, *tail)
            yield f"operator_norms in {dtype}", operator_norms, torch_ops.operator_norms, given, tolerance
