"""The end of a wide kernel: from blocks of the rows ``o`` and ``o + r`` to the norms of every feed-forward scope.

With ``t = o + r`` of mean ``mu``, and ``g`` the gain of the norm after the block, one pass over the columns is enough:
``sum g^2 (t - mu)^2 = sum g^2 t^2 - 2 mu sum g^2 t + mu^2 sum g^2``. Without centring, the first term alone.

Sums of magnitudes, and ALTI (`ffattr.ops.reduction`), have no such identity: the mean would have to be known before.
There what is centred is computed apart, from operands that are: ``centre_apart``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_terms", "centre_apart", "column_sums", "store_norms", "store_terms", "sum_terms"]


@triton.jit
def column_sums(acc, gamma, column, width, COLUMNS: tl.constexpr):
    """Returns sums by row of ``t^2``, ``t``, ``g^2 t^2``, ``g^2 t``, and that of ``g^2``; ``acc`` is columns of
    ``t``."""
    c = column + tl.arange(0, COLUMNS)
    squares = tl.sum(acc * acc, 1)
    total = tl.sum(acc, 1)
    if gamma is None:
        weighted_squares, weighted, gamma_squares = squares, total, tl.sum((c < width).to(tl.float32))
    else:
        g = tl.load(gamma + c, mask=c < width, other=0.0)
        acc = acc * g[None, :]
        weighted_squares, weighted, gamma_squares = tl.sum(acc * acc, 1), tl.sum(acc * g[None, :], 1), tl.sum(g * g)
    return squares, total, weighted_squares, weighted, gamma_squares


@triton.jit
def store_norms(
    out,  # where the rows' first scope goes
    scope,  # from one scope to the next, in elements
    live,
    size,
    total_size,
    after_size,
    squares,
    total_squares,
    total,
    weighted_squares,
    weighted,
    gamma_squares,
    width,
    CENTRE: tl.constexpr,
):
    """Stores norms of ``o``, ``o + r`` and, where ``after_size`` is given, of the norm's output, each times its
    size."""
    tl.store(out, tl.sqrt(squares) * size, mask=live)
    tl.store(out + scope, tl.sqrt(total_squares) * total_size, mask=live)
    if after_size is not None:
        if CENTRE:
            mean = total / width
            weighted_squares += mean * (mean * gamma_squares - 2 * weighted)
            # Rounding can leave a vanishing square below zero; a NaN stays one.
            weighted_squares = tl.where(weighted_squares < 0, 0.0, weighted_squares)
        tl.store(out + 2 * scope, tl.sqrt(weighted_squares) * after_size, mask=live)


@triton.jit
def sum_terms(v, totals, first, row, column, width, COLUMNS: tl.constexpr):
    """Returns sums by row of ``|v|``, or, where ``totals`` ``[., width]`` are given, of ``|y| - |y - v|`` with ``y``
    their rows ``first + row``, ``row`` ``[rows of v, or 1]``; ``v`` is columns of the vectors."""
    if totals is None:
        terms = tl.abs(v)
    else:
        c = column + tl.arange(0, COLUMNS)
        # Offsets of 32 bits: addresses of a whole tile would take twice the registers.
        y = tl.load(totals + first * width + (row[:, None] * width + c[None, :]), mask=(c < width)[None, :], other=0.0)
        along = tl.where(y < 0, -v, v)
        rest = 2 * tl.abs(y) - along
        terms = tl.where(along < rest, along, rest)  # a NaN stays one
    return tl.sum(terms, 1)


@triton.jit
def add_terms(t, after, gamma, totals, first, scope, row, column, width, of_total, of_normed, COLUMNS: tl.constexpr):
    """Adds the terms of ``o + r``, columns of which are ``t``, and those of the norm's output, whose scale is ``after``
    (None: no norm); their ``totals`` lie ``scope`` and twice as many rows behind ``first``. Returns both sums."""
    of_total += sum_terms(t, totals, first + scope, row, column, width, COLUMNS)
    if after is not None:
        t = t * after
        if gamma is not None:
            c = column + tl.arange(0, COLUMNS)
            t = t * tl.load(gamma + c, mask=c < width, other=0.0)[None, :]
        of_normed += sum_terms(t, totals, first + 2 * scope, row, column, width, COLUMNS)
    return of_total, of_normed


@triton.jit
def store_terms(out, scope, live, of_row, of_total, of_normed, norm_scale, totals):
    """Stores sums of terms of ``o``, ``o + r`` and, where ``norm_scale`` is given, of the norm's output: those of ALTI
    are at least zero."""
    if totals is not None:
        of_row = tl.where(of_row < 0, 0.0, of_row)
        of_total = tl.where(of_total < 0, 0.0, of_total)
        of_normed = tl.where(of_normed < 0, 0.0, of_normed)
    tl.store(out, of_row, mask=live)
    tl.store(out + scope, of_total, mask=live)
    if norm_scale is not None:
        tl.store(out + 2 * scope, of_normed, mask=live)


def centre_apart(
    run: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor],
    down: Tensor,
    residual: Tensor,
    norm_scale: Tensor,
    totals: Tensor | None,
) -> Tensor:
    """Returns ``[3, N, M]`` by two calls of ``run(down, residual, norm_scale, totals)``, which does not centre: the
    first two scopes as they are, and the third from operands whose rows have a mean of zero. That takes twice the time.
    """

    def centre(matrix: Tensor) -> Tensor:
        wide = matrix.float()
        return (wide - wide.mean(-1, keepdim=True)).to(matrix.dtype)

    before = run(down, residual, None, None if totals is None else totals[:2])
    return torch.cat([before, run(centre(down), centre(residual), norm_scale, totals)[2:]])
