"""A layer of plain modules, any of them replaced, and random tensors for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffattr.models.spec.layer import LayerSpec

WIDTH, FF = 12, 20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spec(**parts: Any) -> LayerSpec:
    """A layer of plain modules, some of them replaced."""
    modules: dict[str, Any] = {
        "module": nn.Identity(),
        "attention": nn.Identity(),
        "value": nn.Linear(WIDTH, WIDTH),
        "out": nn.Linear(WIDTH, WIDTH),
        "up": nn.Linear(WIDTH, FF),
        "down": nn.Linear(FF, WIDTH),
    }
    return LayerSpec(**{"heads": 3, "kv_heads": 3, "activation": F.gelu, **modules, **parts})
