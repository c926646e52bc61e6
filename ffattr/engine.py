"""One layer of one sequence, from weights and attention to the norms of every scope asked for: in blocks of query
tokens, and in smaller ones where memory runs out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import Tensor

from . import reference
from .attention import Attention
from .backends import Backend
from .errors import NonFiniteError, OutOfMemory
from .layer import LayerWeights
from .memory import Refusals
from .plan import LayerPlan, free_bytes
from .reference import Rule
from .tiles import Layer, LayerMaps

__all__ = ["LayerMaps", "layer_maps"]

_log = logging.getLogger("ffattr")


def layer_maps(
    weights: LayerWeights,
    x: Tensor,
    attention: Attention,
    rows: Tensor,
    scopes: Collection[str],
    rule: Rule,
    value_bias: str,
    backend: Backend,
    plan: LayerPlan,
) -> LayerMaps:
    """Norm maps of the query tokens ``rows`` ``[N]`` of one sequence ``x`` ``[T, d]`` without padding.

    In the blocks of ``plan``, or where memory runs out in halves of them, quarters and so on. Raises `OutOfMemory`
    where the smallest do not fit, and `NonFiniteError` where the range of float16 does not do.
    """
    while True:
        refusals = Refusals(x.device)
        try:
            result = _in_blocks(weights, x, attention, rows, scopes, rule, value_bias, backend, plan)
            break
        except RuntimeError as error:
            if not refusals.caused(error):
                raise
            _log.debug("layer %d ran out of memory in blocks %s: %s", plan.layer, plan.blocks, str(error))
        # Out of the handler, where the error's traceback still holds the tensors of the run that failed.
        if x.is_cuda:
            torch.cuda.empty_cache()
        smaller = plan.halved()
        if smaller is None:
            raise OutOfMemory(_too_large(plan, x.device))
        plan = smaller
    if plan.dtype == torch.float16 and not all(bool(tile.isfinite().all()) for tile in result.maps.values()):
        raise NonFiniteError(
            f"layer {plan.layer}: its wide products exceed the range of float16; pass dtype=torch.bfloat16 or "
            "dtype=torch.float32"
        )
    return result


def _too_large(plan: LayerPlan, device: torch.device) -> str:
    narrower = {torch.float64: "torch.float32", torch.float32: "torch.bfloat16"}.get(plan.dtype)
    return (
        f"layer {plan.layer} ran out of memory: the smallest blocks need {plan.bytes} bytes by the plan, "
        f"{free_bytes(device)} are free on {device}. Ask for fewer layers or queries, pass shorter inputs"
        + (f" or dtype={narrower}" if narrower else "")
        + ", or free what else the device holds."
    )


def _in_blocks(
    weights: LayerWeights,
    x: Tensor,
    attention: Attention,
    rows: Tensor,
    scopes: Collection[str],
    rule: Rule,
    value_bias: str,
    backend: Backend,
    plan: LayerPlan,
) -> LayerMaps:
    shape = (len(rows), len(x))
    result = LayerMaps(
        {name: x.new_empty((weights.heads, *shape) if name == "attn_heads" else shape) for name in scopes},
        {name: x.new_zeros(len(rows)) for name in scopes},
        x.new_empty(len(rows), weights.width),
        plan,
    )
    layer = None if backend.is_reference else Layer(weights, x, scopes, rule, value_bias, backend, plan)
    for start in range(0, len(rows), plan.blocks.queries):
        part = slice(start, min(start + plan.blocks.queries, len(rows)))
        if layer is None:
            _materialised(weights, x, attention, rows[part], part, rule, value_bias, result)
        else:
            layer.run(attention, rows[part], part, result)
    return result


def _materialised(
    weights: LayerWeights,
    x: Tensor,
    attention: Attention,
    rows: Tensor,
    part: slice,
    rule: Rule,
    value_bias: str,
    result: LayerMaps,
) -> None:
    for name, stream in reference.decompose(weights, x, attention, rows, rule, value_bias):
        if name in result.maps:
            result.maps[name][..., part, :] = stream.vectors.norm(dim=-1)
        if name in result.bias and name != "attn_heads":
            result.bias[name][part] = stream.bias.norm(dim=-1)
        output = stream.total
    result.output[part] = output
