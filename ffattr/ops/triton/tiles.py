"""Tiles of matrices, and products of them, which the wide kernels share.

Matrices come as TMA descriptors where the device has TMA and the strides allow it (``TMA``), as pointers elsewhere.
Rows and columns beyond a matrix read as zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .runtime import INTERPRETED as _INTERPRETED

__all__ = ["add_product", "describe_matrix", "load_rows", "load_slab", "product_precision", "scale_tile", "tma_fits"]

INTERPRETED = tl.constexpr(_INTERPRETED)


def tma_fits(*matrices: Tensor) -> bool:
    """Tells whether TMA can read these: they and their rows are 16-byte aligned. Copying costs more than pointer
    loads."""
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(-1) == 1
        and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
        for t in matrices
    )


def describe_matrix(t: Tensor, block: list[int], tma: bool) -> Tensor | TensorDescriptor:
    """Returns ``t`` as the kernels take it, read in blocks of the shape ``block``."""
    return TensorDescriptor.from_tensor(t, block) if tma else t


def product_precision(dtype: torch.dtype) -> str:
    """Returns what `add_product` multiplies float32 in.

    Three tf32 products keep float32's accuracy, at several times FMA's rate.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"  # the second has no effect on narrower types


@triton.jit
def load_rows(source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Loads the tile ``[ROWS, COLUMNS]`` of a contiguous matrix ``[rows, columns]``, from ``(row, column)``."""
    if TMA:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = source + r[:, None].to(tl.int64) * columns + c[None, :]
        tile = tl.load(at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return tile


@triton.jit
def load_slab(
    source, index, column, heads, columns, pitch, HEADS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """Loads the tile ``[HEADS, COLUMNS]`` of slab ``index``'s first ``heads`` rows; slabs are ``pitch`` elements
    apart."""
    if TMA:
        tile = source.load([index, 0, column]).reshape(HEADS, COLUMNS)
    else:
        h = tl.arange(0, HEADS)
        c = column + tl.arange(0, COLUMNS)
        at = source + index.to(tl.int64) * pitch + h[:, None] * columns + c[None, :]
        tile = tl.load(at, mask=(h < heads)[:, None] & (c < columns)[None, :], other=0.0)
    return tile


@triton.jit
def add_product(a, b, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:  # see runtime.py
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def scale_tile(tile, factor):
    """Returns ``tile * factor`` in the factor's type: halves are multiplied in pairs, at a third of the
    instructions."""
    if INTERPRETED:  # see runtime.py
        return tile.to(tl.float32) * factor.to(tl.float32)
    return tile.to(factor.dtype) * factor
