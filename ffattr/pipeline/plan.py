"""`plan`: what `attribute` would do and cost, without running the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..decomposition.layer import LayerWeights
from ..decomposition.sketch import Sketch
from ..engine.planning.costs import LayerShape
from ..engine.planning.plan import LayerPlan, Plan
from ..ops.reduction import Reduction
from ..selection import Indices
from .entrance import accept_containers, name_broken_weights
from .options import IG, Options
from .request import Request
from .stack import Stack

__all__ = ["plan"]


@accept_containers
@name_broken_weights
def plan(
    model: nn.Module,
    inputs: Any,
    *,
    tokenizer: Any = None,
    scopes: str | Sequence[str] = "layer",
    layers: Indices = None,
    queries: Indices = None,
    ig: IG = "exact",
    baseline: str | Tensor = "zero",
    value_bias: str = "token",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    method: str | Sketch = "auto",
    memory_budget: int | None = None,
    keys: Indices = None,
    groups: Any = None,
    reduce: Reduction = "l2",
) -> Plan:
    """The plan that `attribute` would follow for the same arguments, without running the model.

    >>> options = {"tokenizer": tokenizer, "scopes": ["attn", "atb"], "backend": "torch"}
    >>> print(ffattr.plan(model, "The cat sat.", **options))
    torch backend, float64 on cpu
    3 x layer 0-2: attention, 6 queries x 6 tokens ... (no scope takes d-wide work for a pair)
    total: ... GFLOP, working memory ... MiB
    """
    options = Options(
        *(scopes, layers, queries, keys, groups, ig, baseline, value_bias, dtype, backend, method, memory_budget),
        reduce,
    )
    request = Request.from_options(model, inputs, tokenizer, options)
    engine = request.engine
    found = Plan(engine.backend.name, engine.matmul_dtype, engine.device, reduction=reduce)
    batches = request.batches()
    for stack in request.stacks:
        of_batches: list[list[LayerPlan]] = [[] for _ in batches]
        for layer in sorted(set(stack.layers)):  # as the model reaches them, each once however often it is asked for
            spec = stack.specs[layer]
            weights = spec.weights(None)
            causal = stack.name == "decoder" or bool(getattr(spec.attention, "is_causal", False))
            routed = [len(branch.down.weight) for branch in weights.branches if branch.routed]
            sets = math.prod(math.comb(experts, spec.active) for experts in routed)
            for planned, (batch, _) in zip(of_batches, batches, strict=True):
                for together in request.group_into_packs(stack, layer, weights, batch):
                    shapes = [_expect_shape(request, stack, layer, weights, batch[row], causal) for row in together]
                    joined = LayerShape.join(shapes)
                    joined = replace(joined, expert_sets=max(1, min(joined.queries, sets)))
                    planned.append(request.plan_layer(stack, layer, weights, joined))
        found.layers.extend(itertools.chain.from_iterable(of_batches))
    return found


def _expect_shape(
    request: Request, stack: Stack, layer: int, weights: LayerWeights, batch: int, causal: bool
) -> LayerShape:
    """What is known of one sequence's cost before the model has run."""
    shape = request.shape_of_layer(stack, layer, weights, batch)
    if not causal:
        return shape
    tokens, queries, _ = stack.index_sequence(batch)
    masked = len(queries) * len(tokens) - int((queries + 1).sum())
    return request.shape_of_layer(stack, layer, weights, batch, len(queries) * shape.longest - masked)
