"""Spearman's rank correlation, and how sure it is of a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["center_ranks", "correlate", "spearman", "standard_error"]


def spearman(a: Tensor, b: Tensor) -> float:
    """Returns Spearman's rank correlation of all elements of ``a`` and ``b``, ties at their average rank.

    NaN where it is not defined: fewer than two elements, all elements of one side equal, or a NaN among them.

    >>> a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> round(ffattr.analysis.spearman(a, a.exp()), 6)  # only the order counts
    1.0
    >>> round(ffattr.analysis.spearman(a, torch.tensor([1.0, 3.0, 2.0, 4.0])), 6)
    0.8
    """
    for side in (a, b):
        if not isinstance(side, Tensor):
            raise TypeError(f"rank correlation is of two tensors, got a {type(side).__name__}")
    if a.shape != b.shape:
        raise ValueError(f"rank correlation needs equal shapes, got {list(a.shape)} and {list(b.shape)}")
    return correlate(center_ranks(a.flatten()), center_ranks(b.flatten()))


def center_ranks(values: Tensor) -> Tensor:
    """Returns the ranks of ``values`` ``[..., p]`` less their mean, in float64; NaN where one of the ``p`` is."""
    ranks = _rank_values(values)
    undefined = values.isnan().any(-1, keepdim=True)
    return (ranks - (values.shape[-1] + 1) / 2).masked_fill_(undefined, math.nan)


def correlate(first: Tensor, second: Tensor) -> float:
    """Returns the correlation of what `center_ranks` gave of two sides; NaN where it is not defined."""
    spread = float(first.norm() * second.norm())
    return float(first @ second) / spread if spread > 0 else math.nan


def _rank_values(values: Tensor) -> Tensor:
    """Returns ranks from 1 among the last dimension, in float64; equal values share the mean of their places."""
    ordered, order = values.sort(-1)
    places = torch.arange(1, values.shape[-1] + 1, dtype=torch.float64, device=values.device).expand_as(ordered)
    ranks = torch.empty_like(places, memory_format=torch.contiguous_format)
    steps = ordered[..., 1:] != ordered[..., :-1]
    if bool(steps.all()):
        return ranks.scatter_(-1, order, places)
    ends = functional.pad(steps, (1, 1), value=True)
    first = places.masked_fill(~ends[..., :-1], 0).cummax(-1).values
    last = places.masked_fill(~ends[..., 1:], math.inf).flip(-1).cummin(-1).values.flip(-1)
    return ranks.scatter_(-1, order, (first + last) / 2)


def standard_error(a: Tensor, b: Tensor, of: int) -> float:
    """Returns the standard error of the rank correlation of a random sample of ``of`` pairs, by the delta method.

    The correlation is ``C / sqrt(A B)`` of means over products of ranks. One more pair changes them by its own product
    and by the ranks of all others, on the side that it comes in below.
    """
    if len(a) >= of:
        return 0.0
    f, g = ((_rank_values(side) - 0.5) / len(side) - 0.5 for side in (a, b))
    variance_a, variance_b, covariance = (f * f).mean(), (g * g).mean(), (f * g).mean()
    by_covariance = f * g + _sum_above(a, g) + _sum_above(b, f)
    by_variances = (f * f + 2 * _sum_above(a, f)) / variance_a + (g * g + 2 * _sum_above(b, g)) / variance_b
    change = (by_covariance - covariance * by_variances / 2) / (variance_a * variance_b).sqrt()
    return float(change.std(correction=0)) / math.sqrt(len(a)) * math.sqrt(1 - len(a) / of)


def _sum_above(values: Tensor, weights: Tensor) -> Tensor:
    """Sums for each of ``values`` the ``weights`` of the larger ones and half of those of its equals, per value."""
    found, place = torch.unique(values, sorted=True, return_inverse=True)
    sums = weights.new_zeros(len(found)).index_add_(0, place, weights)
    return ((sums.sum() - sums.cumsum(0) + sums / 2) / len(values))[place]
