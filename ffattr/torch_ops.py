"""The ``torch`` backend: the operators of `ffattr.ops` in plain PyTorch, on any device, in chunks of queries.

Nothing of size ``[N, M, d]`` exists for more than a chunk. The C++, CUDA and Triton kernels compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ig

__all__ = ["ff_norms", "gram_norms", "ig_slope", "operator_norms"]

_CHUNK = 1 << 22
"""Elements of the widest temporary of a chunk (16 MiB in float32): larger ones leave the caches for no gain."""


def ig_slope(
    z: Tensor, base: Tensor | None, row_scale: Tensor | None, activation: str, rule: str, steps: int
) -> Tensor:
    slope = ig.slopes(z, ig.ACTIVATIONS[activation], rule, steps, base)
    return slope if row_scale is None else slope * row_scale[:, None]


def gram_norms(alpha: Tensor, position: Tensor, gram: Tensor, row_scale: Tensor | None) -> Tensor:
    weights = _with_residual(alpha, position)[..., : gram.shape[-1]].to(gram.dtype)  # [N, M, G]
    squared = torch.einsum("nmg,mgk,nmk->nm", weights, gram, weights)
    norms = squared.clamp_min_(0).sqrt_().to(alpha.dtype)  # rounding can leave a vanishing square below zero
    return norms if row_scale is None else norms * row_scale[:, None]


def ff_norms(
    alpha: Tensor,
    position: Tensor,
    features: Tensor,
    slope: Tensor,
    down: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    gamma: Tensor | None,
    norm_scale: Tensor | None,
    centre: bool,
) -> Tensor:
    queries, keys = alpha.shape[1:]
    out = alpha.new_empty((2 if norm_scale is None else 3, queries, keys))
    for rows in _chunks(queries, keys * (down.shape[0] + 2 * down.shape[1])):
        weights = _with_residual(alpha[:, rows], position[rows])
        neurons: Tensor | None = None
        for stream, factor in zip(features, slope[:, rows], strict=True):
            part = _mix(weights, stream).mul_(factor[:, None])
            neurons = part if neurons is None else neurons.add_(part)
        assert neurons is not None
        out[:, rows] = _wide_norms(
            neurons @ down,
            _mix(weights, residual),
            None if residual_scale is None else residual_scale[rows],
            gamma,
            None if norm_scale is None else norm_scale[rows],
            centre,
        )
    return out


def operator_norms(
    alpha: Tensor,
    position: Tensor,
    values: Tensor,
    maps: Tensor,
    own: Tensor,
    slope: Tensor,
    down: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    gamma: Tensor | None,
    norm_scale: Tensor | None,
    centre: bool,
) -> Tensor:
    queries, keys = alpha.shape[1:]
    inner, width = maps.shape[1], down.shape[1]
    out = alpha.new_empty((2 if norm_scale is None else 3, queries, keys))
    per_query = max(inner * (down.shape[0] + width), keys * (inner + 2 * width))
    for rows in _chunks(queries, per_query):
        weights = _with_residual(alpha[:, rows], position[rows])
        operator = (maps[:, None] * slope[:, rows, None]).sum(0) @ down  # [n, H * dh, d]
        scaled = (weights[..., :-1, None] * values).flatten(2)  # [n, M, H * dh]
        wide = scaled @ operator
        itself = weights[..., -1]  # [n, M], 1 where the key is the query itself
        n, m = itself.nonzero(as_tuple=True)
        wide[n, m] += (slope[:, rows][:, n] * own[:, rows][:, n]).sum(0) @ down
        out[:, rows] = _wide_norms(
            wide,
            _mix(weights, residual),
            None if residual_scale is None else residual_scale[rows],
            gamma,
            None if norm_scale is None else norm_scale[rows],
            centre,
        )
    return out


def _with_residual(alpha: Tensor, position: Tensor) -> Tensor:
    """``[N, M, H + 1]``: the attention weights and, as one more head, the residual's."""
    keys = torch.arange(alpha.shape[2], device=alpha.device)
    itself = (position[:, None] == keys).to(alpha.dtype)
    return torch.cat([alpha, itself[None]]).permute(1, 2, 0)


def _mix(weights: Tensor, features: Tensor) -> Tensor:
    """``sum_h weights[n, m, h] features[m, h]``: ``[N, M, width]``."""
    return (weights.transpose(0, 1) @ features).transpose(0, 1)


def _wide_norms(
    wide: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    gamma: Tensor | None,
    norm_scale: Tensor | None,
    centre: bool,
) -> Tensor:
    norms = [wide.norm(dim=-1)]
    total = wide.add_(residual if residual_scale is None else residual * residual_scale[:, None, None])
    norms.append(total.norm(dim=-1))
    if norm_scale is not None:
        if centre:
            total = total - total.mean(-1, keepdim=True)
        if gamma is not None:
            total = total * gamma
        norms.append(total.norm(dim=-1) * norm_scale[:, None])
    return torch.stack(norms)


def _chunks(queries: int, elements_per_query: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, elements_per_query))
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]
