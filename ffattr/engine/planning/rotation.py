"""The model's width turned about, so that the down matrix is zero right of its diagonal: norms stay as they are, and
kernels leave products with zeros out.

With ``down[:d]^T = Q R`` (QR decomposition) the first ``d`` rows of ``down @ Q`` are ``R^T``. Column ``c`` then has
``min(c, F)`` zeros, together half of ``d^2`` numbers of ``F d``: an eighth where ``F = 4 d``.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ...decomposition.layer import LayerWeights
from ...decomposition.scopes import Scope

__all__ = ["PAYS", "choose_vectors", "count_operations", "count_zeros", "rotate_down"]

PAYS = 6
"""How many times the operations that a rotation takes have to be saved by it: most are steps of a decomposition in
float64, the others may be those of a unit that is several times as fast as vectors."""


def rotate_down(down: Tensor) -> tuple[Tensor, Tensor]:
    """Returns an orthogonal ``Q`` ``[d, d]``, and ``down @ Q`` ``[F, d]``, which is zero right of its diagonal; both
    in the dtype of ``down`` ``[F, d]``, the first computed in float64."""
    turn = torch.linalg.qr(down[: down.shape[1]].T.double(), mode="complete").Q.to(down.dtype)
    return turn, (down @ turn).tril_()


def count_zeros(neurons: int, width: int) -> int:
    """Returns how many numbers of a down matrix a rotation makes zero."""
    square = min(neurons, width)
    return square * (square - 1) // 2 + (width - square) * square


def count_operations(neurons: int, width: int) -> float:
    """Returns how many floating point operations a rotation takes: a decomposition, its orthogonal matrix, a
    product."""
    return 8 / 3 * width**3 + 2.0 * neurons * width**2


def choose_vectors(weights: LayerWeights, scopes: Collection[Scope]) -> tuple[Scope, ...]:
    """Returns the scopes whose norms are all of the same vectors, and among them those of ``scopes`` behind the
    feed-forward block; none where there is no such choice.

    The norm after the block lies between the last scope and the others, with an element-wise gain. Of a mixture every
    set of experts has a matrix of its own.
    """
    known = weights.pairwise_scopes
    asked = {scope.seen_from("own") for scope in scopes} & {*known}
    if weights.mixture or not asked:
        return ()
    if weights.norm_after_ff is None:
        return known
    return next((some for some in (known[:-1], known[-1:]) if asked <= {*some}), ())
