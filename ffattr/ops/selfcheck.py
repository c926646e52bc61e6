"""A check, once per process and GPU, that kernels as compiled here compute what plain PyTorch computes.

A map has no check of its own, unlike a layer's output. Compilers and drivers differ, and not every GPU that Triton's or
the CUDA kernels are compiled for has been tried; so `ffattr.ops.backends` asks before the first map is made. With
Triton it costs the compilation of some kernels, half a minute the first time, which Triton keeps on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..decomposition.precision import operand_dtype, quantised
from . import torch_kernels
from .contract import Operators
from .out_of_memory import OutOfMemoryWatch
from .reduction import Reduction

__all__ = ["find_failure", "make_cases"]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 8e-2}
"""The error allowed in parts of the largest entry: far above rounding, far below a wrong index."""


@dataclass(frozen=True)
class _Layer:
    """Holds sizes that the rules give tiles of their own, and that are no multiple of one; or MiniLM's, in which
    kernels fill their rings of stages several times over."""

    tokens: int
    heads: int
    neurons: int
    width: int
    streams: int
    normed: bool  # whether norms follow, as in a post-LN layer


_LAYERS = (
    _Layer(70, 5, 144, 80, 1, True),
    _Layer(130, 17, 80, 496, 2, False),
    _Layer(33, 12, 80, 496, 1, False),
    _Layer(66, 12, 1536, 384, 1, True),
    _Layer(66, 12, 1536, 384, 2, False),
)
_HEAD_DIM = 16


def find_failure(
    operators: Operators, device: torch.device, dtype: torch.dtype, reduction: Reduction = "l2"
) -> str | None:
    """Says what went wrong with a backend's ``operators`` on ``device`` with wide products in ``dtype``, or None. What
    other vectors than norms take is compiled, and checked, where it is asked for."""
    current = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return _find_failure(operators, torch.device(device.type, current), dtype, reduction)


@lru_cache
def _find_failure(operators: Operators, device: torch.device, dtype: torch.dtype, reduction: Reduction) -> str | None:
    watch = OutOfMemoryWatch(device)
    try:
        for name, arguments in make_cases(device, dtype, reduction):
            wide = tuple(_to_double(argument) for argument in arguments)
            found, expected = getattr(operators, name)(*arguments).double(), getattr(torch_kernels, name)(*wide)
            error = float(((found - expected).abs() / expected.abs().amax((-1, -2), keepdim=True)).max())
            if not error <= _TOLERANCE[dtype]:
                return f"{name} is off by {error:.1e} of the largest entry, expected at most {_TOLERANCE[dtype]:.0e}"
    except Exception as error:  # whatever a compiler or driver raises: the backend is not fit to be used
        if watch.explains(error):
            raise torch.OutOfMemoryError(str(error)) from error  # says nothing of the kernels: not to be remembered
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {text[0]}"
    return None


def _to_double(argument: object) -> object:
    """Converts to float64, but for float8 and what has no dtype."""
    if not isinstance(argument, Tensor) or not argument.is_floating_point() or argument.dtype == torch.float8_e4m3fn:
        return argument
    return argument.double()


def make_cases(device: torch.device, dtype: torch.dtype, reduction: Reduction) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields what is checked: names of operators with arguments."""
    generator = torch.Generator().manual_seed(0)
    operand = operand_dtype(dtype)

    def draw_normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for layer in _LAYERS:
        tokens, heads, neurons, width, streams = layer.tokens, layer.heads, layer.neurons, layer.width, layer.streams
        alpha = draw_normal(heads, tokens, tokens).softmax(-1).tril().contiguous()
        position, scale = torch.arange(tokens, device=device), draw_normal(tokens).abs() + 0.5
        norms = (scale, draw_normal(width), scale, True) if layer.normed else (None, None, None, False)
        totals = draw_normal(2 + layer.normed, tokens, width) if reduction == "alti" else None
        tail = (*norms, None, reduction, totals)
        vectors = draw_normal(tokens, heads + 1, width).double()
        yield "gram_norms", (alpha, position, vectors @ vectors.mT, norms[0])
        z = draw_normal(streams, tokens, neurons)
        yield "ig_slope", (z, None, None, "gelu" if streams == 1 else "silu", "exact", 0)
        slope, down = draw_normal(streams, tokens, neurons, dtype=operand), draw_normal(neurons, width)
        residual = draw_normal(tokens, heads + 1, width, dtype=operand)
        features = draw_normal(streams, tokens, heads + 1, neurons, dtype=operand)
        matrix, matrix_scale = quantised(down) if dtype == torch.float8_e4m3fn else (down.to(dtype), None)
        yield "ff_norms", (alpha, position, features, slope, matrix, matrix_scale, residual, *tail)
        if dtype != torch.float8_e4m3fn:  # which has no other method
            values = draw_normal(tokens, heads, _HEAD_DIM, dtype=dtype)
            maps = draw_normal(streams, heads * _HEAD_DIM, neurons, dtype=dtype)
            yield "operator_norms", (alpha, position, values, maps, slope, slope, matrix, residual, *tail)
