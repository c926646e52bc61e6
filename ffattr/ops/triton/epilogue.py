"""The end of a wide kernel: from blocks of the rows ``o`` and ``o + r`` to the norms of every feed-forward scope.

With ``t = o + r`` of mean ``mu``, and ``g`` the gain of the norm after the block, one pass over the columns is enough:
``sum g^2 (t - mu)^2 = sum g^2 t^2 - 2 mu sum g^2 t + mu^2 sum g^2``. Without centring, the first term alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["column_sums", "store_norms"]


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
