"""Layers of a shape, and what is planned for them."""

from __future__ import annotations

import torch

from ffattr.engine.planning.choose import plan_layer
from ffattr.engine.planning.costs import LayerShape
from ffattr.engine.planning.plan import EngineOptions, LayerPlan
from ffattr.ops.backends import BACKENDS

CPU = torch.device("cpu")
MiB = 1 << 20


def shape(
    tokens: int, width: int = 64, queries: int | None = None, causal: bool = False, streams: int = 1, forms: int = 0
) -> LayerShape:
    queries = tokens if queries is None else queries
    pairs = tokens * (tokens + 1) // 2 if causal else queries * tokens
    levels = min(forms, 2)
    return LayerShape(
        queries,
        tokens,
        pairs,
        width,
        4 * width,
        8,
        width // 8,
        streams,
        maps_per_pair=forms or 1,
        attention_scopes=forms,
        stages=levels,
    )


def planned(
    given: LayerShape,
    method: str = "auto",
    budget: int | None = 1 << 40,
    backend: str = "torch",
    layer: int = 0,
    wide: bool = True,
    dtype: torch.dtype = torch.float32,
) -> LayerPlan:
    return plan_layer(layer, given, wide, EngineOptions(BACKENDS[backend], method, dtype, CPU, budget))
