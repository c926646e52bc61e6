"""Values that a norm divides head by head before attention mixes them: which norm, of which projection."""

from __future__ import annotations

from itertools import product

from torch import Tensor

from ..spec.norms import is_norm, read_norm
from .rows import LayerRows
from .watch import Call

__all__ = ["find_normed_values"]


def find_normed_values(rows: LayerRows) -> tuple[Call, Call, list[int], Call] | None:
    """Returns the norm of every head's values, the projection that makes these, where the values of each head begin
    in what it returns, and the output projection; None where there are none."""
    for norm, out in product(rows.by_head, rows.linears):
        if not _is_norm_without_bias(norm):
            continue
        for made, read in zip(_arrange(rows, norm.output), _arrange(rows, norm.input), strict=True):
            starts = rows.find_value_starts(rows.alpha, made, out.input)
            for value in rows.linears if starts is not None else ():
                for first in range(value.output.shape[1] - read.shape[1] + 1):
                    if value is not out and rows.are_equal(value.output[:, first : first + read.shape[1]], read):
                        return norm, value, [first + start for start in starts or ()], out
    return None


def _arrange(rows: LayerRows, by_head: Tensor) -> tuple[Tensor, ...]:
    """Returns rows of heads as rows of tokens ``[B * T, H * dh]``: where heads of a token are neighbours, and where
    tokens of a head are."""
    apart = by_head.view(rows.batch, -1, rows.length, by_head.shape[1]).transpose(1, 2)
    apart = apart if rows.batch_first else apart.transpose(0, 1)
    return by_head.reshape(len(rows.x), -1), apart.reshape(len(rows.x), -1)


def _is_norm_without_bias(call: Call) -> bool:
    width = call.input.shape[1]
    if call.input.shape != call.output.shape or not is_norm(call.module, width):
        return False
    norm = read_norm(call.module, None, width)
    return norm is not None and norm.bias is None
