"""Values that a norm divides head by head before attention mixes them: which norm, of which projection."""

from __future__ import annotations

from itertools import product

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
        made, read = (tensor.reshape(len(rows.x), -1) for tensor in (norm.output, norm.input))
        starts = rows.find_value_starts(rows.alpha, made, out.input)
        for value in rows.linears if starts is not None else ():
            for first in range(value.output.shape[1] - read.shape[1] + 1):
                if value is not out and rows.are_equal(value.output[:, first : first + read.shape[1]], read):
                    return norm, value, [first + start for start in starts or ()], out
    return None


def _is_norm_without_bias(call: Call) -> bool:
    width = call.input.shape[1]
    if call.input.shape != call.output.shape or not is_norm(call.module, width):
        return False
    norm = read_norm(call.module, None, width)
    return norm is not None and norm.bias is None
