"""``ff_norms`` (contract: `ffattr.ops`), *direct*: two chained products for each pair, of which only norms are written.

A program owns one key and a block of queries, so that the key's features are one matrix ``[H, F]`` for all its rows:

    for a block of columns of ``down``:
        for a block of neurons:
            z = alpha @ features[key]
            o += (z * slope) @ down         # z * slope never leaves the registers
        sum o^2
        o += alpha @ residual[key]          # in place: a second accumulator would not fit the registers
        sum o^2, ...                        # see epilogue.py

``z`` is made one step ahead: it is scaled while the matrix unit is busy with ``o``. Attention weights are read, ``4 H``
bytes for a pair that costs ``2 F d`` operations; making them anew would take ``2 H dh`` operations and an exponential
for each head. The residual, a head that only a query's own key has, is left to a second launch (``OWN``) over the few
blocks that hold such a pair: the first has the registers that this would take.

A row of weights is divided by its largest, and its norms multiplied by it: one dominant head then suffers no rounding
of its weight in bfloat16, and tiny weights do not vanish in float16. In float8 the divisor bounds ``z * slope``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..reduction import Reduction
from ..torch_kernels import check_reduction, sequence_bounds
from . import configs
from .arguments import WideArguments, check_argument, make_contiguous
from .blocks import find_block, query_blocks
from .epilogue import add_terms, centre_apart, column_sums, store_norms, store_terms, sum_terms
from .runtime import on_device_of
from .tiles import add_product, describe_matrix, load_rows, load_slab, product_precision, scale_tile, tma_fits

__all__ = ["direct_kernel", "ff_norms"]

LARGEST = tl.constexpr(440.0)
"""Rows in float8_e4m3fn are scaled to this: their bound is met to bfloat16's rounding, and the type ends at 448."""


@triton.jit
def mix_features(
    rows,
    features,
    slab,
    start,
    heads,
    neurons,
    pitch,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    NEURONS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns ``rows @ features[slab, :, start:]``: what all heads bring to a block of neurons, ``[QUERIES,
    NEURONS]``."""
    tile = load_slab(features, slab, start, heads, neurons, pitch, HEADS, NEURONS, TMA)
    return add_product(rows, tile, tl.zeros([QUERIES, NEURONS], tl.float32), PRECISION)


# A size of 1 would be a constant, which has no dtype to widen, and a short last block of keys a kernel of its own.
@triton.jit(do_not_specialize=["queries", "keys", "columns"])
def direct_kernel(
    alpha,  # [H, N, M]
    position,  # [N]
    features,  # [S * K, H + 1, F], of which a descriptor shows the first H
    own_features,  # [S * K, F], the last of them: of the residual
    slope,  # [S * N, F]
    down,  # [d, F]
    residual,  # [K, H + 1, d], likewise
    own_residual,  # [K, d], likewise
    residual_scale,  # [N] or None
    gamma,  # [d] or None
    norm_scale,  # [N] or None
    down_scale,  # [d] of float8, else None
    slope_size,  # [N] of float8, else None: what slopes were divided by
    feature_bound,  # [K, H + 1] of float8, else None: the largest feature, summed over streams
    totals,  # [2 or 3, N, d] of ALTI, else None
    blocks,  # [., 4], or None of one sequence
    out,  # [2 or 3, N, M]
    queries,
    columns,
    keys,
    neurons,
    width,
    heads,
    L2: tl.constexpr,
    OWN: tl.constexpr,
    TRIANGULAR: tl.constexpr,
    STREAMS: tl.constexpr,
    CENTRE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    index = tl.program_id(0) // (QUERIES if OWN else columns)  # neighbours share the slopes, which then stay in L2
    first, count, first_key, key_count = find_block(blocks, index, queries, keys, QUERIES)
    if OWN:
        if tl.program_id(0) % QUERIES >= count:
            return
        column = tl.load(position + first + tl.program_id(0) % QUERIES)
    else:
        column = (tl.program_id(0) % columns).to(tl.int64)
    if column < 0 or column >= key_count:
        return
    key = first_key + column.to(tl.int32)
    row = tl.arange(0, QUERIES)
    live = row < count
    n = first + row
    h = tl.arange(0, HEADS)
    at = (h[None, :].to(tl.int64) * queries + n[:, None]) * columns + column
    weights = tl.load(alpha + at, mask=live[:, None] & (h < heads)[None, :], other=0.0)
    own = tl.where(tl.load(position + n, mask=live, other=-1) == column, 1.0, 0.0)
    if not OWN:
        if tl.max(own) > 0:  # left to the other launch
            return
        if tl.max(tl.max((weights != 0).to(tl.int32), 1)) == 0:  # beyond the causal diagonal or outside a window
            return

    if feature_bound is None:
        size = tl.max(tl.abs(weights), 1)
        if OWN:
            size = tl.maximum(size, own)
    else:
        bounds = feature_bound + key.to(tl.int64) * (heads + 1)
        bound = tl.load(bounds + h, mask=h < heads, other=0.0)
        size = tl.sum(tl.abs(weights) * bound[None, :], 1) / LARGEST
        if OWN:
            size += own * (tl.load(bounds + heads) / LARGEST)
    size = tl.where(size > 0, size, 1.0)
    rows = (weights / size[:, None]).to(own_features.dtype.element_ty)
    own = own / size

    known, whole = tl.where(live, row, 0), first.to(tl.int64)  # the first row of a scope's totals
    key64, up = key.to(tl.int64), keys + key  # the second stream's features lie behind those of the first
    feature_pitch, residual_pitch = (heads + 1) * neurons, (heads + 1) * width
    own_gate_at = own_features + key64 * feature_pitch + tl.arange(0, NEURONS)
    own_up_at = own_gate_at + keys.to(tl.int64) * feature_pitch
    squares = tl.zeros([QUERIES], tl.float32)
    total_squares, total, weighted_squares, weighted = squares, squares, squares, squares
    gamma_squares = 0.0
    for c in range(0, width, COLUMNS):
        acc = tl.zeros([QUERIES, COLUMNS], tl.float32)
        begin = c // NEURONS * NEURONS if TRIANGULAR else 0
        z = mix_features(
            rows, features, key, begin, heads, neurons, feature_pitch, HEADS, QUERIES, NEURONS, TMA, PRECISION
        )
        if STREAMS == 2:
            z_up = mix_features(
                rows, features, up, begin, heads, neurons, feature_pitch, HEADS, QUERIES, NEURONS, TMA, PRECISION
            )
        for start in range(begin, neurons, NEURONS):
            inside = tl.arange(0, NEURONS) < neurons - start
            factor = load_rows(slope, first, start, STREAMS * queries, neurons, QUERIES, NEURONS, TMA)
            if OWN:
                z += own[:, None] * tl.load(own_gate_at + start, mask=inside, other=0.0).to(tl.float32)[None, :]
            p = scale_tile(z, factor)
            if STREAMS == 2:
                factor = load_rows(slope, queries + first, start, STREAMS * queries, neurons, QUERIES, NEURONS, TMA)
                if OWN:
                    z_up += own[:, None] * tl.load(own_up_at + start, mask=inside, other=0.0).to(tl.float32)[None, :]
                p += scale_tile(z_up, factor)
            ahead = start + NEURONS  # beyond the last neuron features read as zero
            z = mix_features(
                rows, features, key, ahead, heads, neurons, feature_pitch, HEADS, QUERIES, NEURONS, TMA, PRECISION
            )
            if STREAMS == 2:
                z_up = mix_features(
                    rows, features, up, ahead, heads, neurons, feature_pitch, HEADS, QUERIES, NEURONS, TMA, PRECISION
                )
            down_tile = load_rows(down, c, start, width, neurons, COLUMNS, NEURONS, TMA)
            if down_scale is None:
                acc = add_product(p, down_tile.T, acc, PRECISION)
            else:  # the matrix unit adds float8 products with some 14 bits: a step's at most
                acc += add_product(
                    p.to(down_tile.dtype), down_tile.T, tl.zeros([QUERIES, COLUMNS], tl.float32), PRECISION
                )

        col = c + tl.arange(0, COLUMNS)
        if down_scale is not None:
            by_column = tl.load(down_scale + col, mask=col < width, other=0.0)
            acc = acc * by_column[None, :] * tl.load(slope_size + n, mask=live, other=0.0)[:, None]
        if L2:
            squares += tl.sum(acc * acc, 1)
        else:
            squares += sum_terms(acc * size[:, None], totals, whole, known, c, width, COLUMNS)
        if residual_scale is not None:  # o / scale + r: scaling the weights would round them once more
            acc = acc * (1 / tl.load(residual_scale + n, mask=live, other=1.0))[:, None]
        residual_tile = load_slab(residual, key, c, heads, width, residual_pitch, HEADS, COLUMNS, TMA)
        acc = add_product(rows, residual_tile, acc, PRECISION)
        if OWN:
            own_row = tl.load(own_residual + key64 * residual_pitch + col, mask=col < width, other=0.0).to(tl.float32)
            acc += own[:, None] * own_row[None, :]
        if L2:
            s0, s1, s2, s3, s4 = column_sums(acc, gamma, c, width, COLUMNS)
            total_squares += s0
            total += s1
            weighted_squares += s2
            weighted += s3
            gamma_squares += s4
        else:
            t = acc * size[:, None]
            if residual_scale is not None:
                t = t * tl.load(residual_scale + n, mask=live, other=1.0)[:, None]
            after = None
            if norm_scale is not None:
                after = tl.load(norm_scale + n, mask=live, other=0.0)[:, None]
            total_squares, weighted_squares = add_terms(
                t, after, gamma, totals, whole, queries, known, c, width, total_squares, weighted_squares, COLUMNS
            )

    if L2:
        total_size = size
        if residual_scale is not None:
            total_size = size * tl.abs(tl.load(residual_scale + n, mask=live, other=1.0))
        after_size = None
        if norm_scale is not None:
            after_size = total_size * tl.load(norm_scale + n, mask=live, other=0.0)
        store_norms(
            out + n.to(tl.int64) * columns + column,
            queries.to(tl.int64) * columns,
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
            CENTRE,
        )
    else:  # addresses once more: made before the branch, they cost the float8 kernel above a register too many
        at, scope = out + n.to(tl.int64) * columns + column, queries.to(tl.int64) * columns
        store_terms(at, scope, live, squares, total_squares, weighted_squares, norm_scale, totals)


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
    """Returns ``[2 or 3, N, M]``, see `ffattr.ops`. Raises ValueError for arguments that no kernel takes."""
    op = "ff_norms"
    check_reduction(op, reduction, totals, alpha, residual, norm_scale)
    given = WideArguments.from_tensors(op, alpha, position, residual, residual_scale, gamma, norm_scale)
    streams, neurons = (2 if len(features) == 2 else 1), features.shape[-1]
    check_argument(op, "features", features, (streams, given.keys, given.heads + 1, neurons), given.wide)
    check_argument(op, "slope", slope, (streams, given.queries, neurons), given.wide)
    check_argument(op, "down_scale", down_scale, (given.width,), torch.float32)
    check_argument(op, "down", down, (neurons, given.width), given.wide if down_scale is None else torch.float8_e4m3fn)
    out = given.allocate_output()
    if out.numel() == 0 or given.keys == 0 or given.width == 0:
        return out
    if neurons == 0:  # kernels want one, and it may be zero
        features, slope, down = (F.pad(part, (0, 1)) for part in (features, slope, down.T))
        down, neurons = down.T, 1
    if reduction != "l2" and centre and norm_scale is not None:
        if down_scale is not None:  # centred numbers would have to be rounded to float8 once more
            down, down_scale = (down.float() * down_scale).to(given.wide), None

        def run(down: Tensor, residual: Tensor, norm_scale: Tensor | None, totals: Tensor | None) -> Tensor:
            tail = (residual, residual_scale, gamma, norm_scale, False, sequences, reduction, totals)
            return ff_norms(alpha, position, features, slope, down, None, *tail)

        return centre_apart(run, down, residual, norm_scale, totals)

    config = configs.choose_direct(configs.Shape.from_operands(alpha, down, streams))
    config = config if totals is None else configs.halve_columns(config)
    slope_size = feature_bound = None
    if down_scale is not None:
        slope_size = slope.abs().amax((0, 2)).float()
        slope = slope / slope_size.clamp_min(torch.finfo(torch.float32).tiny)[:, None].to(slope.dtype)
        feature_bound = torch.maximum(features.amax(-1), -features.amin(-1)).float().sum(0)
    features, residual = features.contiguous().flatten(0, 1), given.residual
    slope, down = slope.contiguous().flatten(0, 1), down.T.contiguous()  # every type has a product of such operands
    heads = configs.padded_heads(given.heads)
    tma = config.tma and tma_fits(features, slope, down, residual)
    count, blocks = query_blocks(sequence_bounds(op, sequences, alpha, given.keys), config.queries, alpha.device)
    with on_device_of(alpha):
        for own, programs in ((False, given.columns), (True, config.queries)):
            direct_kernel[(count * programs,)](
                given.alpha,
                given.position,
                describe_matrix(features[:, : given.heads], [1, heads, config.neurons], tma),
                features[:, given.heads],
                describe_matrix(slope, [config.queries, config.neurons], tma),
                describe_matrix(down, [config.columns, config.neurons], tma),
                describe_matrix(residual[:, : given.heads], [1, heads, config.columns], tma),
                residual[:, given.heads],
                given.residual_scale,
                given.gamma,
                given.norm_scale,
                make_contiguous(down_scale),
                slope_size,
                feature_bound,
                make_contiguous(totals),
                blocks,
                out,
                given.queries,
                given.columns,
                given.keys,
                neurons,
                given.width,
                given.heads,
                L2=reduction == "l2",
                OWN=own,
                TRIANGULAR=triangular,
                STREAMS=streams,
                CENTRE=centre,
                TMA=tma,
                PRECISION=product_precision(given.wide),
                HEADS=heads,
                QUERIES=config.queries,
                COLUMNS=config.columns,
                NEURONS=config.neurons,
                num_warps=config.warps,
                num_stages=config.stages,
                enable_fp_fusion=True,  # the default changes with Triton 3.10
            )
    return out
