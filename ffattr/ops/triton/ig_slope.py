"""``ig_slope`` (contract: `ffattr.ops`) in Triton: each pre-activation is read once, each factor written once.

Whatever a rule evaluates between the two stays in registers, so that rules with few steps run at memory speed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...decomposition import integrated_gradients as ig
from .activations import derivative, gated, path, rise, slope, value
from .arguments import check_argument, make_contiguous
from .runtime import on_device_of

__all__ = ["ig_slope"]

_BLOCK = 1024  # elements: eight for each of 128 threads
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# As in ffattr.decomposition.integrated_gradients: a path in z no longer than _NEAR is integrated: a quotient of
# differences would cancel. On a path of that length the error of n nodes is about 6.4^-2n for tanh, whose poles are the
# nearest.
_NEAR = tl.constexpr(1.0)
_NEAR_NODES = 6


@triton.jit
def _quadrature(u, v, u0, v0, nodes_ptr, steps, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Returns both factors by the points ``nodes[0]`` with the weights ``nodes[1]``; the second is of use only if
    gated."""
    first = tl.zeros_like(u)
    second = tl.zeros_like(u)
    for k in range(steps):
        at = tl.load(nodes_ptr + k)
        weight = tl.load(nodes_ptr + steps + k)
        at_u = u0 + at * (u - u0)
        if GATED:
            first += weight * (derivative(at_u, ACTIVATION) * (v0 + at * (v - v0)))
            second += weight * value(at_u, ACTIVATION)
        else:
            first += weight * derivative(at_u, ACTIVATION)
    return first, second


@triton.jit
def _exact(u, v, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    if GATED:
        second, moment = gated(u, ACTIVATION)
        first = moment * v
    else:
        first = slope(u, ACTIVATION)
        second = first
    return first, second


@triton.jit
def _exact_from(
    u, v, u0, v0, nodes_ptr, steps, ACTIVATION: tl.constexpr, GATED: tl.constexpr, POLYNOMIAL: tl.constexpr
):
    if GATED:
        first, second = path(u, v, u0, v0, ACTIVATION)
    else:
        first = rise(u, u0, ACTIVATION)
        second = first
    if not POLYNOMIAL:
        near_first, near_second = _quadrature(u, v, u0, v0, nodes_ptr, steps, ACTIVATION, GATED)
        near = tl.abs(u - u0) <= _NEAR
        first = tl.where(near, near_first, first)
        second = tl.where(near, near_second, second)
    return first, second


@triton.jit
def _ig_slope(
    z_ptr,  # [S, elements]
    base_ptr,  # [S, elements], [S, neurons] if ONE_BASE_ROW, or None
    row_scale_ptr,  # [elements / neurons] or None
    nodes_ptr,  # [2, steps] float32: points and weights
    out_ptr,  # [S, elements]
    elements,
    neurons,
    steps,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    GATED: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    ONE_BASE_ROW: tl.constexpr,
    WIDE: tl.constexpr,  # neurons >= BLOCK
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < elements - start
    u = tl.load(z_ptr + start + lane, mask=inside, other=0).to(tl.float32)
    v = u
    if GATED:
        v = tl.load(z_ptr + elements + start + lane, mask=inside, other=0).to(tl.float32)

    first_row = start // neurons
    first_column = start % neurons
    # A block within two rows needs no division for each element.
    rows_on = (lane >= neurons - first_column).to(tl.int32) if WIDE else (first_column.to(tl.int32) + lane) // neurons

    u0 = tl.zeros_like(u)
    v0 = u0
    if base_ptr is not None:
        if ONE_BASE_ROW:
            at_base = base_ptr + first_column + lane - rows_on * neurons
            next_stream = neurons
        else:
            at_base = base_ptr + start + lane
            next_stream = elements
        u0 = tl.load(at_base, mask=inside, other=0).to(tl.float32)
        if GATED:
            v0 = tl.load(at_base + next_stream, mask=inside, other=0).to(tl.float32)

    if not EXACT:
        first, second = _quadrature(u, v, u0, v0, nodes_ptr, steps, ACTIVATION, GATED)
    elif base_ptr is None:
        first, second = _exact(u, v, ACTIVATION, GATED)
    else:
        first, second = _exact_from(u, v, u0, v0, nodes_ptr, steps, ACTIVATION, GATED, POLYNOMIAL)

    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + first_row + rows_on, mask=inside, other=0).to(tl.float32)
        first *= scale
        second *= scale
    tl.store(out_ptr + start + lane, first.to(out_ptr.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(out_ptr + elements + start + lane, second.to(out_ptr.dtype.element_ty), mask=inside)


def ig_slope(
    z: Tensor, base: Tensor | None, row_scale: Tensor | None, activation: str, rule: str, steps: int
) -> Tensor:
    """Computes what the operator does, for ``z`` ``[S, N, F]`` in float32, bfloat16 or float16, in float32.

    ``base`` ``[S, N or 1, F]`` has ``z``'s dtype, ``row_scale`` ``[N]`` that or float32. Raises ValueError.
    """
    _check_arguments(z, base, row_scale, activation)
    exact, polynomial = rule == "exact", ig.ACTIVATIONS[activation].polynomial
    nodes = None
    if not exact:
        nodes = _make_nodes(rule, steps, z.device)
    elif base is not None and not polynomial:
        nodes = _make_nodes("gauss-legendre", _NEAR_NODES, z.device)
    z = z.contiguous()
    out = torch.empty_like(z)
    streams, rows, neurons = z.shape
    if out.numel() == 0:
        return out
    with on_device_of(z):
        _ig_slope[(triton.cdiv(rows * neurons, _BLOCK),)](
            z,
            make_contiguous(base),
            make_contiguous(row_scale),
            nodes,
            out,
            rows * neurons,
            neurons,
            0 if nodes is None else nodes.shape[1],
            ACTIVATION=activation,
            EXACT=exact,
            GATED=streams == 2,
            POLYNOMIAL=polynomial,
            ONE_BASE_ROW=base is not None and base.shape[1] == 1,
            WIDE=neurons >= _BLOCK,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,  # the default changes with Triton 3.10
        )
    return out


@lru_cache(maxsize=64)
def _make_nodes(rule: str, steps: int, device: torch.device) -> Tensor:
    """Returns ``[2, steps]`` float32: kept, because a copy to the GPU for each call would wait for the work queued
    there."""
    return torch.stack(ig.nodes(rule, steps)).float().to(device)


def _check_arguments(z: Tensor, base: Tensor | None, row_scale: Tensor | None, activation: str) -> None:
    if z.dtype not in _DTYPES:
        remedy = '; use backend="torch"' if z.dtype == torch.float64 else ""
        raise ValueError(
            f"ig_slope: z has dtype {z.dtype}, the Triton kernel computes in float32 and expects float32, bfloat16 or "
            f"float16{remedy}"
        )
    if z.dim() != 3 or z.shape[0] not in (1, 2):
        raise ValueError(
            f"ig_slope: z has shape {list(z.shape)}, expected [S, N, F] with S = 1 (dense) or 2 (gate, up)"
        )
    if activation not in ig.ACTIVATIONS:
        raise ValueError(
            f"ig_slope: unknown activation {activation!r}, expected one of {', '.join(map(repr, ig.ACTIVATIONS))}"
        )
    streams, rows, neurons = z.shape
    base_rows = 1 if base is not None and base.dim() == 3 and base.shape[1] == 1 else rows
    check_argument("ig_slope", "base", base, (streams, base_rows, neurons), z.dtype)
    as_z = row_scale is not None and row_scale.dtype == z.dtype
    check_argument("ig_slope", "row_scale", row_scale, (rows,), z.dtype if as_z else torch.float32)
