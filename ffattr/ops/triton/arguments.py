"""Checks of operator arguments, and what the two wide maps have in common; the contract is `ffattr.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import MOST_HEADS

__all__ = ["WIDE", "WideArguments", "check"]

WIDE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of wide operands that kernels take; float8 is one of ``down`` alone."""


def check(op: str, name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raises ValueError naming operator and argument where ``tensor`` is given and not of this shape and dtype."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@dataclass(frozen=True)
class WideArguments:
    """What `ff_norms` and `operator_norms` share, checked and contiguous; ``wide`` is the dtype of wide operands."""

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
    def of(
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
        check(op, "alpha", alpha, (heads, queries, columns), torch.float32)
        check(op, "position", position, (queries,), torch.int64)
        check(op, "residual", residual, (keys, heads + 1, width), wide)
        check(op, "residual_scale", residual_scale, (queries,), torch.float32)
        check(op, "gamma", gamma, (width,), torch.float32)
        check(op, "norm_scale", norm_scale, (queries,), torch.float32)
        return cls(
            alpha.contiguous(),
            position.contiguous(),
            residual.contiguous(),
            contiguous(residual_scale),
            contiguous(gamma),
            contiguous(norm_scale),
            wide,
            heads,
            queries,
            columns,
            keys,
            width,
        )

    def output(self) -> Tensor:
        """Zeros, which pairs without any weight keep: ``[2 or 3, N, M]``."""
        scopes = 2 if self.norm_scale is None else 3
        return self.alpha.new_zeros(scopes, self.queries, self.columns)
