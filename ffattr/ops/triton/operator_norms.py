"""``operator_norms`` (contract: `ffattr.ops`): the layer at one query token as a matrix ``J``, applied to all its keys.

For a batch of queries, two kernels and a product of the library's:

    J[n] = (maps * slope[n]) @ down                     # `build_kernel`: maps are scaled in the registers
    r[m, n] = alpha[:, n, m] @ residual[m]              # [K, batch, d], by torch
    norms of (alpha[:, n, m] * values[m]) @ J[n], + r   # `apply_kernel`: scaled in the registers, only norms written

Weights are divided by each pair's largest, as in `ffattr.ops.triton.ff_norms`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reduction import Reduction
from ..torch_kernels import check_reduction, mix_heads, split_queries, with_residual
from . import configs
from .arguments import WideArguments, check_argument, make_contiguous
from .epilogue import add_terms, centre_apart, column_sums, store_norms, store_terms, sum_terms
from .runtime import on_device_of
from .tiles import add_product, describe_matrix, load_rows, product_precision, scale_tile, tma_fits

__all__ = ["apply_kernel", "build_kernel", "operator_norms"]

_BATCH = 1 << 27
"""Elements of ``J``, or of ``r``, of a batch: at ``d`` = 4096 eight queries, so that every SM has a program or two."""


@triton.jit(do_not_specialize=["first", "queries"])  # 1 would be a constant, which has no dtype to widen
def build_kernel(
    maps,  # [S * H * dh, F]
    slope,  # [S, N, F]
    down,  # [d, F]
    out,  # [batch, H * dh, d]
    first,
    queries,
    inner,
    neurons,
    width,
    TRIANGULAR: tl.constexpr,
    STREAMS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    across, tiles = tl.cdiv(width, COLUMNS), tl.cdiv(width, COLUMNS) * tl.cdiv(inner, ROWS)
    slot, tile_index = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, c = tile_index // across * ROWS, tile_index % across * COLUMNS
    f = tl.arange(0, NEURONS)
    gate_at = slope + (first + slot).to(tl.int64) * neurons + f
    up_at = gate_at + queries.to(tl.int64) * neurons
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    begin = c // NEURONS * NEURONS if TRIANGULAR else 0
    for start in range(begin, neurons, NEURONS):
        inside = f < neurons - start
        tile = load_rows(maps, row, start, STREAMS * inner, neurons, ROWS, NEURONS, TMA)
        p = scale_tile(tile, tl.load(gate_at + start, mask=inside, other=0.0)[None, :])
        if STREAMS == 2:
            tile = load_rows(maps, inner + row, start, STREAMS * inner, neurons, ROWS, NEURONS, TMA)
            p += scale_tile(tile, tl.load(up_at + start, mask=inside, other=0.0)[None, :])
        down_tile = load_rows(down, c, start, width, neurons, COLUMNS, NEURONS, TMA)
        acc = add_product(p.to(down_tile.dtype), down_tile.T, acc, PRECISION)
    r, col = row + tl.arange(0, ROWS), c + tl.arange(0, COLUMNS)
    at = out + (slot.to(tl.int64) * inner + r[:, None]) * width + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(r < inner)[:, None] & (col < width)[None, :])


@triton.jit(do_not_specialize=["first", "batch", "queries", "keys", "columns"])
def apply_kernel(
    weights,  # [batch, H, K] float32, which loads ahead, unlike narrower numbers: divided by their sizes
    sizes,  # [batch, K]
    position,  # [N]
    values,  # [K, H * dh]
    operator,  # [batch * H * dh, d]
    own,  # [N, d]: what the residual brings to the query's own key
    residual,  # [K, batch, d]: mixed by the weights
    residual_scale,  # [N] or None
    gamma,  # [d] or None
    norm_scale,  # [N] or None
    totals,  # [2 or 3, N, d] of ALTI, else None
    out,  # [2 or 3, N, M]
    first,
    batch,
    queries,
    keys,
    columns,
    heads,
    head_dim,
    width,
    L2: tl.constexpr,
    CENTRE: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    key_blocks = tl.cdiv(keys, KEYS)
    slot, key = tl.program_id(0) // key_blocks, tl.program_id(0) % key_blocks * KEYS
    query = first + slot
    m = key + tl.arange(0, KEYS)
    live = m < keys
    size = tl.load(sizes + slot.to(tl.int64) * keys + m, mask=live, other=0.0)
    if tl.max((size != 0).to(tl.int32)) == 0:  # no weight at all; a NaN is one
        return
    itself = tl.where(m == tl.load(position + query), 1.0, 0.0) / tl.where(size > 0, size, 1.0)
    weights += slot.to(tl.int64) * heads * keys + m
    inner, steps = heads * head_dim, tl.cdiv(head_dim, DEPTH)
    scale = 1.0
    if residual_scale is not None:
        scale = tl.load(residual_scale + query)
    k = tl.arange(0, DEPTH)
    squares = tl.zeros([KEYS], tl.float32)
    total_squares, total, weighted_squares, weighted = squares, squares, squares, squares
    gamma_squares = 0.0
    only = tl.zeros([1], tl.int32)  # row of a scope's totals
    whole = query.to(tl.int64)
    for c in range(0, width, COLUMNS):
        acc = tl.zeros([KEYS, COLUMNS], tl.float32)
        for step in range(heads * steps):
            head, within = step // steps, (step % steps) * DEPTH
            start = head * head_dim + within
            tile = load_rows(values, key, start, keys, inner, KEYS, DEPTH, TMA)
            weight = tl.load(weights + head * keys, mask=live, other=0.0).to(tile.dtype)
            part = scale_tile(tile, weight[:, None])
            if not EVEN:  # what lies beyond belongs to the next head
                part = tl.where((k < head_dim - within)[None, :], part, 0.0)
            operator_tile = load_rows(operator, slot * inner + start, c, batch * inner, width, DEPTH, COLUMNS, TMA)
            if not EVEN:  # nor may a NaN there, which is the next query's where the heads end
                operator_tile = tl.where((k < head_dim - within)[:, None], operator_tile, 0.0)
            acc = add_product(part.to(operator_tile.dtype), operator_tile, acc, PRECISION)
        col = c + tl.arange(0, COLUMNS)
        inside = col < width
        own_row = tl.load(own + query.to(tl.int64) * width + col, mask=inside, other=0.0).to(tl.float32)
        acc += itself[:, None] * own_row[None, :]
        if L2:
            squares += tl.sum(acc * acc, 1)
        else:
            squares += sum_terms(acc * size[:, None], totals, whole, only, c, width, COLUMNS)
        at = residual + (m.to(tl.int64)[:, None] * batch + slot) * width + col[None, :]
        acc += scale * tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if L2:
            s0, s1, s2, s3, s4 = column_sums(acc, gamma, c, width, COLUMNS)
            total_squares += s0
            total += s1
            weighted_squares += s2
            weighted += s3
            gamma_squares += s4
        else:
            t = acc * size[:, None]
            after = None
            if norm_scale is not None:
                after = tl.load(norm_scale + query)
            total_squares, weighted_squares = add_terms(
                t, after, gamma, totals, whole, queries, only, c, width, total_squares, weighted_squares, COLUMNS
            )

    if L2:
        after_size = None
        if norm_scale is not None:
            after_size = size * tl.load(norm_scale + query)
        store_norms(
            out + query.to(tl.int64) * columns + m,
            queries.to(tl.int64) * columns,
            live,
            size,
            size,
            after_size,
            squares,
            total_squares,
            total,
            weighted_squares,
            weighted,
            gamma_squares,
            width,
            CENTRE,
        )
    else:
        at, scope = out + query.to(tl.int64) * columns + m, queries.to(tl.int64) * columns
        store_terms(at, scope, live, squares, total_squares, weighted_squares, norm_scale, totals)


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
    """Returns ``[2 or 3, N, M]``, see `ffattr.ops`. Raises ValueError for arguments that no kernel takes."""
    op = "operator_norms"
    check_reduction(op, reduction, totals, alpha, residual, norm_scale)
    given = WideArguments.from_tensors(op, alpha, position, residual, residual_scale, gamma, norm_scale)
    streams, neurons = (2 if len(maps) == 2 else 1), maps.shape[-1]
    head_dim = values.shape[-1]
    inner = given.heads * head_dim
    check_argument(op, "values", values, (given.keys, given.heads, head_dim), given.wide)
    check_argument(op, "maps", maps, (streams, inner, neurons), given.wide)
    check_argument(op, "own", own, (streams, given.queries, neurons), given.wide)
    check_argument(op, "slope", slope, (streams, given.queries, neurons), given.wide)
    check_argument(op, "down", down, (neurons, given.width), given.wide)
    out = given.allocate_output()
    if out.numel() == 0 or given.width == 0:
        return out
    if reduction != "l2" and centre and norm_scale is not None:

        def run(down: Tensor, residual: Tensor, norm_scale: Tensor | None, totals: Tensor | None) -> Tensor:
            tail = (residual, residual_scale, gamma, norm_scale, False, sequences, reduction, totals)
            return operator_norms(alpha, position, values, maps, own, slope, down, *tail)

        return centre_apart(run, down, residual, norm_scale, totals)

    own_rows = (slope * own).sum(0) @ down  # [N, d]
    values, maps, slope = values.contiguous().flatten(1), maps.contiguous().flatten(0, 1), slope.contiguous()
    shape = configs.Shape.from_operands(alpha, down, streams)
    build, apply = configs.choose_build(shape), configs.choose_apply(shape, head_dim)
    apply = apply if totals is None else configs.halve_columns(apply)
    down = down.T.contiguous()
    precision = product_precision(given.wide)
    build_tma = build.tma and tma_fits(maps, down)
    built_from = (
        describe_matrix(maps, [build.queries, build.neurons], build_tma),
        slope,
        describe_matrix(down, [build.columns, build.neurons], build_tma),
    )
    tiles = triton.cdiv(inner, build.queries) * triton.cdiv(given.width, build.columns)
    for rows, columns, keys in split_queries(
        op, alpha, given.keys, sequences, given.width, inner * given.width, _BATCH
    ):
        batch, count = rows.stop - rows.start, keys.stop - keys.start
        if count == 0:
            continue
        whole = with_residual(given.alpha[:, rows, columns], given.position[rows])
        sizes = whole.abs().amax(-1)  # [batch, count]
        weights = whole / torch.where(sizes == 0, 1, sizes)[..., None]
        # [count, batch, d]
        mixed = mix_heads(weights.to(given.wide), given.residual[keys]).transpose(0, 1).contiguous()
        operator = maps.new_empty(batch * inner, given.width)
        # A head starts where TMA can: at a multiple of 16 bytes.
        apply_tma = apply.tma and head_dim * values.element_size() % 16 == 0 and tma_fits(values, operator)
        with on_device_of(alpha):
            build_kernel[(tiles * batch,)](
                *built_from,
                operator,
                rows.start,
                given.queries,
                inner,
                neurons,
                given.width,
                TRIANGULAR=triangular,
                STREAMS=streams,
                TMA=build_tma,
                PRECISION=precision,
                ROWS=build.queries,
                COLUMNS=build.columns,
                NEURONS=build.neurons,
                num_warps=build.warps,
                num_stages=build.stages,
                enable_fp_fusion=True,
            )
            apply_kernel[(triton.cdiv(count, apply.queries) * batch,)](
                weights[..., :-1].transpose(1, 2).contiguous(),
                sizes,
                given.position,
                describe_matrix(values[keys], [apply.queries, apply.neurons], apply_tma),
                describe_matrix(operator, [apply.neurons, apply.columns], apply_tma),
                own_rows,
                mixed,
                given.residual_scale,
                given.gamma,
                given.norm_scale,
                make_contiguous(totals),
                out,
                rows.start,
                batch,
                given.queries,
                count,
                given.columns,
                given.heads,
                head_dim,
                given.width,
                L2=reduction == "l2",
                CENTRE=centre,
                EVEN=head_dim % apply.neurons == 0,
                TMA=apply_tma,
                PRECISION=precision,
                KEYS=apply.queries,
                COLUMNS=apply.columns,
                DEPTH=apply.neurons,
                num_warps=apply.warps,
                num_stages=apply.stages,
                enable_fp_fusion=True,
            )
    return out
