"""What a vector becomes in a map: its Euclidean norm, its L1 norm, or how near it comes to what all add up to (ALTI).

The L1 norm weighs a few large dimensions less than the Euclidean one does. *ALTI* (Ferrando et al. 2022, arXiv
2203.04212) asks by how much the whole ``y_i`` is nearer to a vector than to nothing:

    max(0, ||y_i||_1 - ||y_i - F_i(x_j)||_1)

divided by the sum of its row, so that a vector that points away from the whole counts for nothing. There, ``y_i`` is
the output of a post-LN attention block, biases included, which is our scope ``atb``. Here it is the stream of the query
at the scope, biases included, whatever the scope: this is our definition for all others. Told apart by head or expert a
stream has no bias, and ``y_i`` is the sum of the vectors of this head or expert. In a decoder with cross-attention the
vectors of both sources add up to one stream from ``atb`` on, so both parts of a row are divided by the sum of the whole
(as in Ferrando et al. 2022, arXiv 2205.11631).

The difference of two norms that are nearly the same would leave rounding errors of the larger ones. With
``s = sign(y_c)`` it is ``min(s v_c, 2 |y_c| - s v_c)``, added up over the dimensions ``c``, whose errors are those of
the vector ``v``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "Reduction", "normalise_rows", "reduce_vectors"]

Reduction = Literal["l2", "l1", "alti"]

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def reduce_vectors(vectors: Tensor, reduction: Reduction, total: Tensor | None = None) -> Tensor:
    """Reduces ``[..., d]`` to ``[...]``; for ``"alti"``, whose rows are not divided by their sums here, ``total``
    ``[..., d]`` is what the vectors add up to.

    >>> from ffattr.ops.reduction import reduce_vectors
    >>> y, v = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, -1.0], [3.0, 0.0], [-1.0, 0.0]])
    >>> reduce_vectors(v, "l1").tolist(), reduce_vectors(v, "alti", y).tolist()
    ([2.0, 3.0, 1.0], [2.0, 1.0, 0.0])
    """
    if reduction != "alti":
        norms: Tensor = torch.linalg.vector_norm(vectors, ord=2 if reduction == "l2" else 1, dim=-1)
        return norms
    assert total is not None
    along = torch.where(total < 0, -vectors, vectors)
    return torch.minimum(along, 2 * total.abs() - along).sum(-1).clamp_min(0)


def normalise_rows(rows: Sequence[Tensor]) -> Tensor:
    """Divides ``[..., C]`` by the sums over all columns, in place: those of several parts of the same rows together.

    Returns the divisors ``[...]``: 1 of rows of zeros, which stay what they are.

    >>> from ffattr.ops.reduction import normalise_rows
    >>> rows = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    >>> normalise_rows([rows]).tolist(), rows.tolist()
    ([4.0, 1.0], [[0.25, 0.75], [0.0, 0.0]])
    """
    sums = torch.stack([part.sum(-1) for part in rows]).sum(0)
    sums = torch.where(sums == 0, 1, sums)
    for part in rows:
        part /= sums[..., None]
    return sums
