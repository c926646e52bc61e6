"""The *operator* method with its heads mixed first, from what every backend has: a library's product and ``ff_norms``.

``operator_norms`` applies ``J_n`` ``[H * dh, d]`` to a key's values, head by head. Whatever the heads of a pair bring
to the feed-forward block can be added up before: then one matrix ``K_n`` ``[D, d]`` does, which for ``D = d`` is
smaller where ``H * dh > d``, and is made of the model's own projections. To ``ff_norms`` its rows are the down matrix
of ``D`` neurons whose slopes are one.

Two heads of one key, which the query gives weights of 1 and 2; ``K`` doubles them:

>>> import torch
>>> from ffattr.ops.contract import Epilogue
>>> from ffattr.ops.mixed_operator import mixed_operator_norms
>>> alpha = torch.tensor([1.0, 2.0])[:, None, None]
>>> features = torch.tensor([[[3.0], [4.0], [0.0]]])  # the last is the residual's
>>> projections, slope, down = [torch.tensor([[2.0]])], torch.ones(1, 1, 1), torch.ones(1, 1)
>>> given = alpha, torch.tensor([0]), features, projections, slope, down, Epilogue(features)
>>> mixed_operator_norms(torch.ops.ffattr, *given).flatten()  # of 2 (3 + 2 * 4), and of this and 3 + 2 * 4
tensor([22., 33.])
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from .contract import Epilogue, Operators
from .torch_kernels import SPARSE, multiply_matrices, sequence_bounds

__all__ = ["mixed_operator_norms"]


def mixed_operator_norms(
    operators: Operators,
    alpha: Tensor,
    position: Tensor,
    features: Tensor,
    projections: Sequence[Tensor],
    slope: Tensor,
    down: Tensor,
    epilogue: Epilogue,
) -> Tensor:
    """Returns ``[2 or 3, N, M]`` as the wide operators do, with ``o = (sum_h alpha[h] features[m, h]) @ K_n`` and
    ``K_n = (sum_s projections[s] * slope[s, n]) @ down``.

    ``features`` ``[K, H + 1, D]``, ``S`` times ``projections`` ``[D, F]``, ``slope`` ``[S, N, F]`` and ``down``
    ``[F, d]``; the rest is that of `ffattr.ops.contract`.
    """
    bounds = sequence_bounds("mixed_operator_norms", epilogue.sequences, alpha, len(features))
    out = alpha.new_zeros((2 if epilogue.norm_scale is None else 3, *alpha.shape[1:]))
    ones = features.new_ones(1, 1, features.shape[2])
    for (query, key), (next_query, next_key) in itertools.pairwise(bounds):
        keys, columns = slice(key, next_key), slice(next_key - key)
        for n in range(query, next_query):
            row = slice(n, n + 1)
            weights, operator = alpha[:, row, columns].contiguous(), _make_operator(projections, slope[:, n], down)
            tail = _of_query(epilogue, row, keys)
            made = operators.ff_norms(weights, position[row], features[None, keys], ones, operator, None, *tail)
            out[:, row, columns] = made
    return out


def _make_operator(projections: Sequence[Tensor], slope: Tensor, down: Tensor) -> Tensor:
    """Returns ``K`` ``[D, d]`` of the query whose slopes are ``slope`` ``[S, F]``, without the neurons whose slope is
    zero in every stream where these are many."""
    # On a GPU the list of the others would have to be waited for.
    if slope.device.type == "cpu":
        active = (slope != 0).any(0)  # NaN too
        if active.count_nonzero() <= SPARSE * active.numel():
            some = active.nonzero()[:, 0]
            projections = [part.index_select(1, some) for part in projections]
            slope, down = slope[:, some], down[some]
    scaled = projections[0] * slope[0]
    for part, factor in zip(projections[1:], slope[1:], strict=True):
        scaled.addcmul_(part, factor)
    return multiply_matrices(scaled.to(down.dtype), down)


def _of_query(epilogue: Epilogue, row: slice, keys: slice) -> Epilogue:
    """The operands of one query, and of the keys of its sequence alone."""
    residual_scale, norm_scale, totals = epilogue.residual_scale, epilogue.norm_scale, epilogue.totals
    return epilogue._replace(
        residual=epilogue.residual[keys],
        residual_scale=None if residual_scale is None else residual_scale[row],
        norm_scale=None if norm_scale is None else norm_scale[row],
        totals=None if totals is None else totals[:, row],
        sequences=None,
        triangular=False,
    )
