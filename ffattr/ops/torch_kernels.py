"""The ``torch`` backend: the operators of `ffattr.ops` in plain PyTorch, on any device, in chunks of queries.

Nothing of size ``[N, M, d]`` exists for more than a chunk. The C++, CUDA and Triton kernels compute the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..decomposition import integrated_gradients as ig
from .reduction import REDUCTIONS, Reduction, reduce_vectors

__all__ = [
    "check_reduction",
    "ff_norms",
    "gram_norms",
    "ig_slope",
    "mix_heads",
    "multiply_matrices",
    "operator_norms",
    "sequence_bounds",
    "split_queries",
    "with_residual",
]

CHUNK = 1 << 22
"""Elements of the widest temporary of a chunk (16 MiB in float32): larger ones leave the caches for no gain."""


SPARSE = 0.5
"""Largest share of slopes that are not zero for which `operator_norms` leaves out the rest."""

_COLUMNS = 128
"""Columns of a product that start at the same row where ``down`` is zero right of its diagonal: even of 1024, eight
products are as fast as one."""

_TEMPORARIES: dict[Reduction, int] = {"l2": 2, "l1": 2, "alti": 4}
"""Temporaries of the model's width that a pair takes."""


def ig_slope(
    z: Tensor, base: Tensor | None, row_scale: Tensor | None, activation: str, rule: str, steps: int
) -> Tensor:
    slope = ig.slopes(z, ig.ACTIVATIONS[activation], rule, steps, base)
    # A scale wider than z would widen the product.
    return slope if row_scale is None else (slope * row_scale[:, None]).to(z.dtype)


def gram_norms(
    alpha: Tensor, position: Tensor, gram: Tensor, row_scale: Tensor | None, sequences: Tensor | None = None
) -> Tensor:
    size = gram.shape[-1]
    out = alpha.new_zeros(alpha.shape[1:])
    for rows, columns, keys in split_queries("gram_norms", alpha, len(gram), sequences, per_key=2 * size):
        weights = with_residual(alpha[:, rows, columns], position[rows])[..., :size].to(gram.dtype)  # [n, m, G]
        squared = torch.einsum("nmg,mgk,nmk->nm", weights, gram[keys], weights)
        norms = squared.clamp_min_(0).sqrt_().to(alpha.dtype)  # rounding can leave a vanishing square below zero
        out[rows, columns] = norms if row_scale is None else norms * row_scale[rows, None]
    return out


def ff_norms(
    alpha: Tensor,
    position: Tensor,
    features: Tensor,
    slope: Tensor,
    down: Tensor,
    down_scale: Tensor | None,
    residual: Tensor,
    residual_scale: Tensor | None,
    gamma: Tensor | None,
    norm_scale: Tensor | None,
    centre: bool,
    sequences: Tensor | None = None,
    reduction: Reduction = "l2",
    totals: Tensor | None = None,
    triangular: bool = False,
) -> Tensor:
    if down_scale is not None:  # what float8 stands for; its product is as accurate as alpha's dtype
        down = down.to(alpha.dtype) * down_scale

    def feed_forward(weights: Tensor, rows: slice, keys: slice) -> Tensor:
        neurons: Tensor | None = None
        for stream, factor in zip(features[:, keys], slope[:, rows], strict=True):
            part = mix_heads(weights, stream).mul_(factor[:, None])
            neurons = part if neurons is None else neurons.add_(part)
        assert neurons is not None
        multiply = _multiply_triangular if triangular else multiply_matrices
        return multiply(neurons.to(down.dtype), down).to(alpha.dtype)

    tail = (residual, residual_scale, gamma, norm_scale, centre, reduction, totals)
    check_reduction("ff_norms", reduction, totals, alpha, residual, norm_scale)
    per_key = down.shape[0] + _TEMPORARIES[reduction] * down.shape[1]
    parts = split_queries("ff_norms", alpha, len(residual), sequences, per_key)
    return _wide_norms(parts, feed_forward, alpha, position, *tail)


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
    sequences: Tensor | None = None,
    reduction: Reduction = "l2",
    totals: Tensor | None = None,
    triangular: bool = False,
) -> Tensor:
    def feed_forward(weights: Tensor, rows: slice, keys: slice) -> Tensor:
        operator = _make_operators(maps, slope[:, rows], down)
        scaled = (weights[..., :-1, None] * values[keys]).flatten(2)  # [n, m, H * dh]
        wide = multiply_matrices(scaled.to(down.dtype), operator).to(alpha.dtype)
        itself = weights[..., -1]  # [n, m], not zero where the key is the query itself
        n, m = itself.nonzero(as_tuple=True)
        by_itself = (slope[:, rows][:, n] * own[:, rows][:, n]).sum(0)
        wide[n, m] += itself[n, m, None] * multiply_matrices(by_itself.to(down.dtype), down).to(alpha.dtype)
        return wide

    inner, width = maps.shape[1], down.shape[1]
    tail = (residual, residual_scale, gamma, norm_scale, centre, reduction, totals)
    check_reduction("operator_norms", reduction, totals, alpha, residual, norm_scale)
    per_key, per_query = inner + _TEMPORARIES[reduction] * width, inner * (down.shape[0] + width)
    parts = split_queries("operator_norms", alpha, len(residual), sequences, per_key, per_query)
    return _wide_norms(parts, feed_forward, alpha, position, *tail)


def _make_operators(maps: Tensor, slope: Tensor, down: Tensor) -> Tensor:
    """Returns ``J_n = (sum_s maps[s] * slope[s, n]) @ down`` ``[n, H * dh, d]`` of the queries of ``slope`` ``[S, n,
    F]``.

    It leaves out the neurons whose slope is zero in every stream, which add nothing.
    """
    # On a GPU the list of the others would have to be waited for, query by query.
    if slope.device.type == "cpu":
        active = (slope != 0).any(0)  # NaN too
        if active.count_nonzero() <= SPARSE * active.numel():
            lists = [query.nonzero()[:, 0] for query in active]
            return torch.stack(
                [
                    multiply_matrices((maps[..., some] * slope[:, n, None, some]).sum(0).to(down.dtype), down[some])
                    for n, some in enumerate(lists)
                ]
            )
    return multiply_matrices((maps[:, None] * slope[:, :, None]).sum(0).to(down.dtype), down)


def sequence_bounds(operator: str, sequences: Tensor | None, alpha: Tensor, keys: int) -> list[tuple[int, int]]:
    """Returns ``[B + 1]`` pairs (first query, first key) of the argument ``sequences``; None is one sequence.

    ``keys``: rows of the key-wise arguments. Raises ValueError where they, ``alpha`` and ``sequences`` do not agree.
    """
    queries, columns = alpha.shape[1:]
    if sequences is None:
        if columns != keys:
            raise ValueError(f"{operator}: alpha has {columns} columns, expected {keys}, one for each key")
        return [(0, 0), (queries, keys)]
    if sequences.dtype != torch.int64 or sequences.device.type != "cpu":
        got = f"{sequences.dtype} on {sequences.device}"
        raise ValueError(f"{operator}: sequences is {got}, expected torch.int64 on the CPU")
    if sequences.dim() != 2 or sequences.shape[0] < 1 or sequences.shape[1] != 2:
        raise ValueError(f"{operator}: sequences has shape {list(sequences.shape)}, expected [B + 1, 2]")
    bounds = [(query, key) for query, key in sequences.tolist()]
    if bounds[0] != (0, 0) or bounds[-1] != (queries, keys):
        raise ValueError(
            f"{operator}: sequences goes from {list(bounds[0])} to {list(bounds[-1])}, expected from [0, 0] to "
            f"[{queries}, {keys}], the numbers of queries and keys"
        )
    for b, ((query, key), (next_query, next_key)) in enumerate(itertools.pairwise(bounds)):
        if next_query < query or next_key < key:
            raise ValueError(
                f"{operator}: sequences decreases from [{query}, {key}] in row {b} to [{next_query}, {next_key}]"
            )
        if next_key - key > columns:
            raise ValueError(
                f"{operator}: sequences has {next_key - key} keys in sequence {b}, but alpha only {columns} columns"
            )
    return bounds


def check_reduction(
    operator: str,
    reduction: str,
    totals: Tensor | None,
    alpha: Tensor,
    residual: Tensor,
    norm_scale: Tensor | None,
) -> None:
    """Raises ValueError where the arguments ``reduction`` and ``totals`` of a wide operator do not fit the others."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator}: reduction is {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}")
    if (totals is not None) != (reduction == "alti"):
        given = "without" if totals is None else "with"
        raise ValueError(f"{operator}: reduction is {reduction!r} {given} totals, which go with 'alti' alone")
    shape = [2 if norm_scale is None else 3, alpha.shape[1], residual.shape[-1]]
    if totals is not None and (list(totals.shape) != shape or totals.dtype != alpha.dtype):
        got = f"shape {list(totals.shape)} and dtype {totals.dtype}"
        raise ValueError(f"{operator}: totals has {got}, expected {shape} and {alpha.dtype}")


def split_queries(
    operator: str,
    alpha: Tensor,
    keys: int,
    sequences: Tensor | None,
    per_key: int,
    per_query: int = 0,
    limit: int | None = None,
) -> Iterator[tuple[slice, slice, slice]]:
    """Yields queries of one sequence at a time, the columns of ``alpha`` that they need, and the keys that these are.

    There are as many queries at a time as keep temporaries of ``per_key`` elements for a pair, and those of
    ``per_query`` for a query, below ``limit`` elements (None: `CHUNK`).
    """
    bounds = sequence_bounds(operator, sequences, alpha, keys)
    for (query, key), (next_query, next_key) in itertools.pairwise(bounds):
        count = next_key - key
        step = max(1, (limit or CHUNK) // max(1, count * per_key, per_query))
        for start in range(query, next_query, step):
            yield slice(start, min(start + step, next_query)), slice(count), slice(key, next_key)


def with_residual(alpha: Tensor, position: Tensor) -> Tensor:
    """Returns ``[N, M, H + 1]``: the attention weights and, as one more head, the residual's."""
    keys = torch.arange(alpha.shape[2], device=alpha.device)
    itself = (position[:, None] == keys).to(alpha.dtype)
    return torch.cat([alpha, itself[None]]).permute(1, 2, 0)


def mix_heads(weights: Tensor, features: Tensor) -> Tensor:
    """Returns ``sum_h weights[n, m, h] features[m, h]``: ``[N, M, width]``."""
    return multiply_matrices(weights.transpose(0, 1), features).transpose(0, 1)


def multiply_matrices(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``a @ b``, over an even number of terms where they are of a half type.

    On CPUs with a matrix unit for bfloat16 (AMX), the library behind PyTorch takes the terms of a row two at a time: of
    an odd number it reads one beyond the row's end, whose product with zero is NaN where that is NaN or infinite.
    """
    if a.dtype.itemsize == 2 and a.shape[-1] % 2 and a.device.type == "cpu":
        pad = torch.nn.functional.pad
        a, b = pad(a, (0, 1)), pad(b, (0, 0, 0, 1))
    return a @ b


def _multiply_triangular(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``a @ b`` without products of what is right of the diagonal of ``b``, but for those beside it."""
    parts = [
        multiply_matrices(a[..., first:], b[first:, first : first + _COLUMNS])
        for first in range(0, b.shape[1], _COLUMNS)
    ]
    return torch.cat(parts, -1)


def _divide_by_largest(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Returns weights as ``dtype``, and where that is narrower, what they were divided by: the pair's largest, ``[N,
    M]``.

    Every pair then uses the whole of a narrow range, however small its weights are. Pairs without weight stay zero.
    """
    if dtype.itemsize >= weights.dtype.itemsize:
        return weights, None
    largest = weights.abs().amax(-1)
    return (weights / torch.where(largest == 0, 1, largest)[..., None]).to(dtype), largest


def _wide_norms(
    parts: Iterator[tuple[slice, slice, slice]],
    feed_forward: Callable[[Tensor, slice, slice], Tensor],
    alpha: Tensor,
    position: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    gamma: Tensor | None,
    norm_scale: Tensor | None,
    centre: bool,
    reduction: Reduction,
    totals: Tensor | None,
) -> Tensor:
    """Computes what both wide maps share, ``[2 or 3, N, M]``.

    ``feed_forward(weights [n, m, H + 1], queries, keys)`` makes ``[n, m, d]`` like ``alpha``.
    """
    out = alpha.new_zeros((2 if norm_scale is None else 3, *alpha.shape[1:]))
    for rows, columns, keys in parts:
        whole = with_residual(alpha[:, rows, columns], position[rows])
        weights, largest = _divide_by_largest(whole, residual.dtype)

        def reduce(scope: int, vectors: Tensor, rows: slice = rows, largest: Tensor | None = largest) -> Tensor:
            if totals is None:
                norms = reduce_vectors(vectors, reduction)
                return norms if largest is None else norms * largest
            # What is compared with the whole has to be as large as it is.
            whole = vectors if largest is None else vectors * largest[..., None]
            return reduce_vectors(whole, reduction, totals[scope, rows, None])

        total = feed_forward(weights, rows, keys)
        found = [reduce(0, total)]
        mixed = mix_heads(weights, residual[keys]).to(alpha.dtype)
        total += mixed if residual_scale is None else mixed * residual_scale[rows, None, None]
        found.append(reduce(1, total))
        if norm_scale is not None:
            if centre:
                total = total - total.mean(-1, keepdim=True)
            if gamma is not None:
                total = total * gamma
            found.append(reduce(2, total * norm_scale[rows, None, None]))
        out[:, rows, columns] = torch.stack(found)
    return out
