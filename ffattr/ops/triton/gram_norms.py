"""``gram_norms`` (contract: `ffattr.ops`) in Triton: a quadratic form in float64 for each pair, no ``d``-wide work.

A program owns a block of queries and a block of keys. Keys are the lanes, so nothing is summed across them and a weight
or an entry of the Gram matrices is one coalesced load; two rows of the matrix at a time share the load of a weight and
its conversion to float64, which is slower than the product. What is left of the diagonal counts twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_kernels import sequence_bounds
from .arguments import check_argument, make_contiguous
from .blocks import find_block, query_blocks
from .runtime import on_device_of

__all__ = ["gram_norms"]

_QUERIES = 16
_KEYS = 64


# A size of 1 would be a constant, which has no dtype to widen. And a thread shall own one key and many queries, which
# share the entries it loads: were `columns` known to be a multiple of 16, it would get neighbouring keys.
@triton.jit(do_not_specialize=["queries", "columns", "keys"])
def _gram_norms(
    alpha_ptr,  # [heads, queries, columns]
    position_ptr,  # [queries]
    gram_ptr,  # [heads + RESIDUAL, heads + RESIDUAL, keys]: keys are neighbours
    row_scale_ptr,  # [queries] or None
    blocks_ptr,  # [blocks, 4], or None of one sequence
    out_ptr,  # [queries, columns]
    blocks,
    heads,
    queries,
    columns,
    keys,
    RESIDUAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    # Blocks of queries vary fastest: programs that run together share their keys' matrices.
    start, count, first_key, key_count = find_block(blocks_ptr, tl.program_id(0) % blocks, queries, keys, QUERIES)
    row = start + tl.arange(0, QUERIES)
    live = tl.arange(0, QUERIES) < count
    column = (tl.program_id(0) // blocks) * KEYS + tl.arange(0, KEYS)
    known = column < key_count
    inside = live[:, None] & known[None, :]

    pair = row[:, None].to(tl.int64) * columns + column[None, :]
    weight_ptr = alpha_ptr + pair
    head_pitch = queries.to(tl.int64) * columns
    entry_ptr = gram_ptr + first_key.to(tl.int64) + column[None, :]
    entry_pitch = keys.to(tl.int64)
    row_pitch = entry_pitch * (heads + RESIDUAL)

    used = tl.zeros([QUERIES, KEYS], tl.int1)
    for h in range(heads):
        used = used | (tl.load(weight_ptr + h * head_pitch, mask=inside, other=0.0) != 0)
    work = tl.where(tl.max(used.to(tl.int32)) > 0, heads, 0)  # none beyond a causal diagonal

    squared = tl.zeros([QUERIES, KEYS], tl.float64)
    for g in range(0, work, 2):
        first = tl.zeros([QUERIES, KEYS], tl.float64)
        second = tl.zeros([QUERIES, KEYS], tl.float64)
        after = tl.minimum(g + 1, heads - 1)
        # Each entry left of the diagonal counts for its mirror image too. Beyond the last head there is no second row.
        for k in range(after + 1):
            weight = tl.load(weight_ptr + k * head_pitch, mask=inside, other=0.0).to(tl.float64)
            at = entry_ptr + k * entry_pitch
            entry = tl.load(at + g * row_pitch, mask=known[None, :], other=0.0)
            first += weight * tl.where(k < g, 2 * entry, tl.where(k == g, entry, 0.0))
            entry = tl.load(at + after * row_pitch, mask=known[None, :], other=0.0)
            second += weight * tl.where(k <= g, 2 * entry, entry)
        squared += first * tl.load(weight_ptr + g * head_pitch, mask=inside, other=0.0).to(tl.float64)
        if after > g:
            squared += second * tl.load(weight_ptr + after * head_pitch, mask=inside, other=0.0).to(tl.float64)

    if RESIDUAL:
        own = inside & (tl.load(position_ptr + row, mask=live, other=-1)[:, None] == column[None, :])
        if tl.max(own.to(tl.int32)) > 0:
            at = entry_ptr + heads * row_pitch
            mixed = tl.zeros([QUERIES, KEYS], tl.float64)
            for k in range(heads):
                weight = tl.load(weight_ptr + k * head_pitch, mask=inside, other=0.0).to(tl.float64)
                mixed += 2 * weight * tl.load(at + k * entry_pitch, mask=known[None, :], other=0.0)
            mixed += tl.load(at + heads * entry_pitch, mask=known[None, :], other=0.0)
            squared += tl.where(own, mixed, 0.0)

    # Rounding can leave a vanishing square below zero; a NaN stays one.
    norm = tl.sqrt(tl.where(squared < 0, 0.0, squared)).to(tl.float32)
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + row, mask=live, other=0.0)
        norm = tl.where(known[None, :], norm * scale[:, None], 0.0)
    tl.store(out_ptr + pair, norm, mask=live[:, None] & (column < columns)[None, :])


def gram_norms(
    alpha: Tensor, position: Tensor, gram: Tensor, row_scale: Tensor | None, sequences: Tensor | None = None
) -> Tensor:
    """Returns ``[N, M]``, see `ffattr.ops`, for ``alpha`` in float32. Raises ValueError for what it does not take."""
    op = "gram_norms"
    if alpha.dtype != torch.float32:
        raise ValueError(f'{op}: alpha has dtype {alpha.dtype}, expected torch.float32; use backend="torch"')
    if alpha.dim() != 3 or gram.dim() != 3:
        raise ValueError(
            f"{op}: alpha has shape {list(alpha.shape)}, expected [H, N, M]; gram has shape {list(gram.shape)}, "
            "expected [keys, G, G]"
        )
    heads, queries, columns = alpha.shape
    keys = len(gram)
    size = heads + 1 if gram.shape[1] == heads + 1 else heads
    check_argument(op, "gram", gram, (keys, size, size), torch.float64)
    check_argument(op, "position", position, (queries,), torch.int64)
    check_argument(op, "row_scale", row_scale, (queries,), torch.float32)
    count, blocks = query_blocks(sequence_bounds(op, sequences, alpha, keys), _QUERIES, alpha.device)
    out = torch.empty(queries, columns, dtype=alpha.dtype, device=alpha.device)
    if out.numel() == 0:
        return out
    with on_device_of(alpha):
        _gram_norms[(count * triton.cdiv(columns, _KEYS),)](
            alpha.contiguous(),
            position.contiguous(),
            gram.permute(1, 2, 0).contiguous(),
            make_contiguous(row_scale),
            blocks,
            out,
            count,
            heads,
            queries,
            columns,
            keys,
            RESIDUAL=size > heads,
            QUERIES=_QUERIES,
            KEYS=_KEYS,
            num_warps=4,
            enable_fp_fusion=True,  # the default changes with Triton 3.10
        )
    return out
