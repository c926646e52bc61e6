"""One layer of one sequence, from weights and attention to the norms of every scope asked for: in blocks of query
tokens, and in smaller ones where memory runs out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from . import reference
from .attention import Attention
from .backends import Backend
from .errors import NonFiniteError, OutOfMemory
from .experts import Routing
from .layer import CROSS, CrossWeights, LayerWeights
from .memory import Refusals
from .plan import LayerPlan, free_bytes
from .reference import Encoder, Rule, Stream
from .tiles import Layer, LayerMaps, Places

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
    routing: Routing | None = None,
    encoder: Encoder | None = None,
) -> LayerMaps:
    """Norm maps of the query tokens ``rows`` ``[N]`` of one sequence ``x`` ``[T, d]`` without padding.

    A mixture of experts needs the ``routing`` of the ``T`` tokens, cross-attention its ``encoder``.

    In the blocks of ``plan``, or where memory runs out in halves of them, quarters and so on. Raises `OutOfMemory`
    where the smallest do not fit, and `NonFiniteError` where the range of float16 does not do.
    """
    while True:
        refusals = Refusals(x.device)
        try:
            result = _in_blocks(weights, x, attention, rows, scopes, rule, value_bias, backend, plan, routing, encoder)
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
    routing: Routing | None,
    encoder: Encoder | None,
) -> LayerMaps:
    result = LayerMaps(
        {name: x.new_zeros(_shape(name, weights, len(rows), len(x), routing, encoder)) for name in scopes},
        {name: x.new_zeros(len(rows)) for name in scopes},
        x.new_empty(len(rows), weights.width),
        plan,
    )
    layer = None
    if not backend.is_reference:
        layer = Layer(weights, x, attention, scopes, rule, value_bias, backend, plan, routing, encoder)
    for places in _blocks(rows, plan.blocks.queries, routing):
        part = rows[places]
        if layer is None:
            streams = reference.decompose(weights, x, attention, part, rule, value_bias, routing, encoder)
            _materialised(streams, len(x), places, result)
        else:
            layer.run(part, places, result)
    return result


def _shape(
    name: str, weights: LayerWeights, queries: int, tokens: int, routing: Routing | None, encoder: Encoder | None
) -> tuple[int, ...]:
    part: LayerWeights | CrossWeights = weights
    if name.startswith(CROSS):
        assert weights.cross is not None
        assert encoder is not None
        part, tokens = weights.cross, len(encoder.states)
    if name.endswith("attn_heads"):
        return part.heads, queries, tokens
    if name.endswith("_experts"):
        assert routing is not None
        return routing.index.shape[1], queries, tokens
    return queries, tokens


def _blocks(rows: Tensor, queries: int, routing: Routing | None) -> Iterator[Places]:
    """Blocks of queries; of a mixture those together that go to the same experts, which then are prepared once."""
    if routing is None:
        for start in range(0, len(rows), queries):
            yield slice(start, min(start + queries, len(rows)))
    else:
        order = torch.cat([tokens for _, tokens, _ in routing.of(rows).by_set()] or [rows])
        yield from order.split(queries)


def _materialised(streams: Iterator[tuple[str, Stream]], tokens: int, places: Places, result: LayerMaps) -> None:
    for name, stream in streams:
        output = stream.total
        # Vectors of an encoder's tokens come last; before both attentions are through, on their own.
        parts = {name: stream.vectors}
        if stream.vectors.shape[-2] != tokens and not name.startswith(CROSS):
            parts = {name: stream.vectors[..., :tokens, :], CROSS + name: stream.vectors[..., tokens:, :]}
        for scope, vectors in parts.items():
            if scope in result.maps:
                result.maps[scope][..., places, :] = vectors.norm(dim=-1)
                if stream.bias.numel():  # told apart by head or expert, there is none
                    result.bias[scope][places] = stream.bias.norm(dim=-1)
    result.output[places] = output
