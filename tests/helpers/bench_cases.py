"""Small layers of the shapes that are timed, and operators that are wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ffattr.bench.cases import SHAPES
from ffattr.ops import backends, torch_kernels

TINY = {name: replace(size, width=24, heads=3, ff_width=40) for name, size in SHAPES.items()}
"""Each of `ffattr.bench.cases.SHAPES`, small."""


class Off:
    """Plain PyTorch, but for a factor of the wide maps, or a NaN in a row that no sample meets."""

    def __init__(self, factor: float, row: int | None = None) -> None:
        self.factor, self.row = factor, row

    def __getattr__(self, name: str) -> Any:
        return getattr(torch_kernels, name)

    def ff_norms(self, *arguments: Any) -> torch.Tensor:
        out = torch_kernels.ff_norms(*arguments)
        out[:, slice(None) if self.row is None else self.row] *= self.factor
        return out


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, operators: Any) -> None:
    """Makes ``operators`` those of the backend ``name``."""
    monkeypatch.setitem(backends.BACKENDS, name, replace(backends.BACKENDS["torch"], name=name, load=lambda: operators))
