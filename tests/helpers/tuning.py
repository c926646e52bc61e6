"""A GPU that is only pretended, for the search for configs of Triton's kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ffattr.bench import tune
from ffattr.bench.cases import SHAPES, Case
from ffattr.ops import torch_kernels

triton_ops = pytest.importorskip("ffattr.ops.triton")
configs = sys.modules["ffattr.ops.triton.configs"]

SIZE = replace(SHAPES["bert-base"], width=24, heads=3, ff_width=40)
CASE = Case.draw_random(SIZE, 3)


class Pretended:
    """A GPU on which plain PyTorch runs as Triton's kernels, and every config takes ``seconds`` of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setenv("FFATTR_CACHE", str(folder))
        configs._read_tuned.cache_clear()
        self.used: Any = None
        self.seconds: Callable[[Any], float] = lambda config: 1.0
        monkeypatch.setattr(configs.Shape, "from_operands", classmethod(self._shape))
        remember = configs.remember_config

        def remembering(shape: Any, kernel: str, config: Any) -> None:
            self.used = config
            remember(shape, kernel, config)

        monkeypatch.setattr(configs, "remember_config", remembering)
        monkeypatch.setattr(triton_ops, "ff_norms", torch_kernels.ff_norms)
        monkeypatch.setattr(triton_ops, "operator_norms", torch_kernels.operator_norms)
        monkeypatch.setattr(tune, "time_median", lambda run, device, rounds, limit: self.seconds(self.used))

    @staticmethod
    def _shape(cls: Any, alpha: torch.Tensor, down: torch.Tensor, streams: int) -> Any:
        return cls(alpha.shape[0], streams, down.shape[1], alpha.shape[1], down.dtype, (9, 0), "A GPU")
