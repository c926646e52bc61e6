"""Checks of operator arguments, and what the two wide maps have in common; the contract is `ffattr.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import MOST_HEADS

__all__ = ["WIDE", "WideArguments", "check_argument"]

WIDE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of wide operands that kernels take; float8 is one of ``down`` alone."""


def check_argument(op: str, name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raises ValueError naming operator and argument where ``tensor`` is given and not of this shape and dtype."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")


def make_contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@dataclass(frozen=True)
class WideArguments:
    """Holds what `ff_norms` and `operator_norms` share, checked and contiguous; ``wide`` is the wide operands'
    dtype."""

    alpha: Tensor
    position: Tensor
    residual: Tensor
    residual_scale: Tensor | None
    gamma: Tensor | None
    norm_scale: Tensor | None
    wide: torch.dtype
    heads: int
    queries: int
    columns: int
    keys: int
    width: int

    @classmethod
    def from_tensors(
        cls,
        op: str,
        alpha: Tensor,
        position: Tensor,
        residual: Tensor,
        residual_scale: Tensor | None,
        gamma: Tensor | None,
        norm_scale: Tensor | None,
    ) -> WideArguments:
        if alpha.dim() != 3 or residual.dim() != 3:
            raise ValueError(
                f"{op}: alpha has shape {list(alpha.shape)}, expected [H, N, M]; "
                f"residual {list(residual.shape)}, expected [K, H + 1, d]"
            )
        heads, queries, columns = alpha.shape
        keys, _, width = residual.shape
        wide = residual.dtype
        if wide not in WIDE:
            raise ValueError(
                f"{op}: residual has dtype {wide}, expected one of {', '.join(map(str, WIDE))}; "
                'backend="torch" computes in float64'
            )
        if heads > MOST_HEADS:
            raise ValueError(f"{op}: alpha has {heads} heads, expected at most {MOST_HEADS}")
        check_argument(op, "alpha", alpha, (heads, queries, columns), torch.float32)
        check_argument(op, "position", position, (queries,), torch.int64)
        check_argument(op, "residual", residual, (keys, heads + 1, width), wide)
        check_argument(op, "residual_scale", residual_scale, (queries,), torch.float32)
        check_argument(op, "gamma", gamma, (width,), torch.float32)
        check_argument(op, "norm_scale", norm_scale, (queries,), torch.float32)
        return cls(
            alpha.contiguous(),
            position.contiguous(),
            residual.contiguous(),
            make_contiguous(residual_scale),
            make_contiguous(gamma),
            make_contiguous(norm_scale),
            wide,
            heads,
            queries,
            columns,
            keys,
            width,
        )

    def allocate_output(self) -> Tensor:
        """Returns zeros ``[2 or 3, N, M]``, which pairs without any weight keep."""
        scopes = 2 if self.norm_scale is None else 3
        return self.alpha.new_zeros(scopes, self.queries, self.columns)
