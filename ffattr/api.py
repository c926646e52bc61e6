"""`attribute`, `vectors` and `explain`: from a loaded model and its inputs to maps, vectors or a plan."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from . import reference
from ._version import __version__
from .attention import LayerRecord
from .capture import record
from .collect import Collector, Placed, shape_of
from .inputs import Inputs
from .keep import Dense, Keep
from .keep import of as keeping
from .layer import CROSS, LayerWeights
from .maps import Attribution, StackedAttribution
from .plan import LayerShape, Plan
from .request import IG, Indices, Request, Stack
from .sketch import Sketch

__all__ = ["Vectors", "attribute", "explain", "vectors"]


def attribute(
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
    check: bool = True,
    progress: Callable[[int, int], None] | None = None,
    keep: str | Keep = "dense",
    keys: Indices = None,
    groups: Any = None,
) -> Attribution:
    """How much each token contributes to each token, in every layer: the norms of the decomposed vectors.

    Runs the model's own forward pass once (twice with ``check``) and leaves the model as it was.

    model: a loaded transformers model, ``nn.TransformerEncoder`` or ``nn.TransformerEncoderLayer``, in eval mode.
    inputs: what the model takes (a mapping of tensors, ids ``[B, T]``, a float tensor), or text with ``tokenizer``.
    scopes: ``"layer"`` (the last), ``"all"``, a name or names: how far through the layer the vectors are carried.
        A mixture of experts has one more, which ``"all"`` leaves out: ``"atb_ln_ff_experts"``, by expert.
    layers, queries: indices (negative ones from the end), a slice, or None for all. A query is a position of the
        padded input; rows of padding are zero. The cost is proportional to the number of queries.
    ig: ``"exact"``, `ffattr.Riemann` or `ffattr.GaussLegendre`: Integrated Gradients through the FF activation.
    baseline: start of its path: ``"zero"``, ``"bias"``, or pre-activations ``[F]`` (gated: ``[F]`` or ``[2, F]``), in a
        mixture those of every expert.
    value_bias: ``"token"`` (b_V stays with its token, as in the papers) or ``"separate"`` (goes to the bias).
    dtype: precision of the wide products, those with the feed-forward matrices: ``torch.float64``, ``float32``,
        ``bfloat16``, ``float16`` or ``float8_e4m3fn``; None: float64 for a float64 model, a half model's own on a GPU,
        else float32. Everything else, the maps included, is float64 with float64 and float32 otherwise.
    backend: ``"auto"``, ``"cpu"`` (C++), ``"triton"`` or ``"cuda"`` (GPU), ``"torch"`` or ``"reference"``; ``ffattr
        info`` says which run here and in which dtypes. ``"auto"`` never picks ``"cuda"``.
    method: ``"auto"``, ``"direct"``, ``"operator"`` or ``"pairs"``, all exact; `explain` says which one is chosen, and
        why. `ffattr.Sketch` is approximate, and cheaper where a layer is wide; ``attr.sketch_error[scope]`` says by how
        much it is wrong.
    memory_budget: bytes of working memory besides the maps. Where memory runs out all the same, a layer is computed
        again in smaller blocks; `OutOfMemory` says that the smallest do not fit.
    progress: called with (layers done, layers in all), layers of every batch that texts are cut into.
    check: compare the recomputed layer outputs with the model's; a difference raises `ArchitectureMismatch`.

    keep: what becomes of the maps: ``"dense"``, or `ffattr.Dense` (another dtype, a memory-mapped file), `ffattr.TopK`
        (``attr.largest``), `ffattr.Pool` (block means) or `ffattr.Reduce` (``attr.reduced``). Of long sequences nothing
        else is ever held.
    keys: which tokens' contributions are wanted, as ``queries``; None for all.
    groups: tokens whose vectors are added up before their norm is taken: ``"words"``, column numbers ``[B, T]`` (-1:
        left out), or for each sequence a list of spans ``(start, stop)``. Columns of the maps are then groups.

    Returns an `Attribution`; ``maps[scope]`` is ``[layers, B, queries, T]`` (``attn_heads``: heads before queries). Of
    a model with an encoder and a decoder a `StackedAttribution`: ``maps["cross.atb"]`` and so on; ``layers`` and
    ``queries`` are then counted in each stack, and ``scopes`` may name one ("cross.layer", "encoder.all").
    Method: Kobayashi et al. 2024 (arXiv 2302.00456). Raises ValueError, TypeError, IndexError or an `FfattrError`.
    """
    request = Request.of(
        model,
        inputs,
        tokenizer,
        scopes,
        layers,
        queries,
        ig,
        baseline,
        value_bias,
        dtype,
        backend,
        method,
        memory_budget,
        keys,
        groups,
    )
    kept = keeping(keep)
    if isinstance(kept, Dense) and kept.path is not None and request.adapted.stacks:
        raise ValueError("keep=Dense(path=...) holds one stack of layers, not an encoder and a decoder; use save()")
    arguments = {
        "model": request.adapted.family,
        "ig": str(ig),
        "baseline": baseline if isinstance(baseline, str) else f"tensor {list(baseline.shape)}",
        "value_bias": value_bias,
        "dtype": str(request.wide_dtype).removeprefix("torch."),
        "backend": request.backend.name,
        "method": str(method),
        "keep": str(keep),
        "ffattr": __version__,
        "torch": str(torch.__version__),
    }
    batches = request.batches()
    collectors: list[Collector] = []  # one after the other, so that those before one that fails can be discarded
    reached = 0

    def on_layer(captured: LayerRecord, batch: Sequence[int]) -> None:
        nonlocal reached
        stack = request.stack_of(captured.index)
        collectors[request.stacks.index(stack)].add(captured, batch)
        reached += len(stack.places(captured.index - stack.first))
        if progress is not None:
            progress(reached, len(batches) * len(request.recorded))

    try:
        collectors.extend(Collector(request, stack, kept, dict(arguments), check) for stack in request.stacks)
        for batch, of_batch in batches:
            _record(request, of_batch, functools.partial(on_layer, batch=batch), check)
        found = {name: result for collector in collectors for name, result in collector.results().items()}
    except BaseException:  # an interrupt as well: no half a file stays
        for collector in collectors:
            collector.discard()
        raise
    return found[""] if "" in found else StackedAttribution.of(found)


@dataclass(frozen=True)
class Vectors:
    """The decomposed vectors of one scope: ``values.sum(-2) + bias == total``.

    ``values`` ``[layers, B, queries, T, d]`` (told apart by head or expert: ``[layers, B, heads, queries, T, d]``),
    ``bias`` and ``total`` ``[layers, B, queries, d]`` (zero where told apart). Padding is zero. Of a scope of
    cross-attention the ``T`` tokens are the encoder's, ``key_tokens``; from ``atb`` on, the decoder's are missing from
    its sum, and the encoder's from that of a decoder's scope. ``mask`` ``[B, T]`` is True at real tokens, ``key_mask``
    at those of the encoder where keys are its tokens.
    """

    values: Tensor
    bias: Tensor
    total: Tensor
    tokens: list[list[str]]
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scope: str
    mask: Tensor
    key_tokens: list[list[str]] | None = None
    key_mask: Tensor | None = None


def vectors(
    model: nn.Module,
    inputs: Any,
    *,
    scope: str = "layer",
    tokenizer: Any = None,
    layers: Indices = None,
    queries: Indices = None,
    ig: IG = "exact",
    baseline: str | Tensor = "zero",
    value_bias: str = "token",
    dtype: torch.dtype | None = None,
) -> Vectors:
    """The vectors themselves, materialised: what each token contributes to each query token, before any norm.

    Arguments as for `attribute`; ``scope`` is one name. Meant for a few queries and layers: raises ValueError where
    the result would not fit the free memory.
    """
    request = Request.of(model, inputs, tokenizer, scope, layers, queries, ig, baseline, value_bias, dtype, "reference")
    count = sum(len(stack.scopes) for stack in request.stacks)
    if count != 1:
        raise ValueError(f"scope={scope!r} names {count} scopes, expected one of them")
    (stack,) = request.stacks
    (name,) = stack.scopes
    width = stack.specs[0].weights(request.dtype).width
    across = name.startswith(CROSS)
    values = _reserve(request, stack, name, width)
    shape = (len(stack.layers), len(stack.mask), len(stack.queries), width)
    bias, total = values.new_zeros(shape), values.new_zeros(shape)

    def on_layer(captured: LayerRecord) -> None:
        layer = captured.index - stack.first
        weights = stack.specs[layer].weights(request.dtype)
        if name.endswith(weights.expert_scope) and not weights.mixture:
            return  # a dense layer among mixtures
        for row in range(len(stack.mask)):
            placed = Placed.of(request, stack, captured, row, row)
            one, keys = placed.sequence, placed.encoder_places if across else placed.places
            given = (request.rule, value_bias, one.routing, one.encoder)
            for n, query in zip(placed.filled.tolist(), one.rows, strict=True):
                streams = dict(reference.decompose(weights, one.x, one.attention, query[None], *given))
                if name in streams:
                    stream = streams[name]
                    of_keys = stream.vectors if across else stream.vectors[..., : len(one.x), :]
                else:  # from atb on the encoder's tokens are in one stream with the others
                    stream = streams[name.removeprefix(CROSS)]
                    of_keys = stream.vectors[..., len(one.x) :, :]
                for at in stack.places(layer):
                    values[at, row, ..., n, keys, :] = of_keys.squeeze(-3).to(values.device)
                    if stream.bias.numel():
                        bias[at, row, n], total[at, row, n] = stream.bias[0], stream.total[0]

    _record(request, request.inputs, on_layer)
    key_tokens, key_mask = (stack.encoder_tokens, stack.encoder_mask) if across else (None, None)
    return Vectors(values, bias, total, stack.tokens, stack.layers, stack.queries, name, stack.mask, key_tokens, key_mask)


def explain(
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
) -> Plan:
    """The plan that `attribute` would follow for the same arguments, without running the model."""
    request = Request.of(
        model,
        inputs,
        tokenizer,
        scopes,
        layers,
        queries,
        ig,
        baseline,
        value_bias,
        dtype,
        backend,
        method,
        memory_budget,
        keys,
        groups,
    )
    plan = Plan(request.backend.name, request.wide_dtype, request.device)
    for stack in request.stacks:
        for layer in stack.layers:
            spec = stack.specs[layer]
            weights = spec.weights(None)
            causal = stack.name == "decoder" or bool(getattr(spec.attention, "is_causal", False))
            for batch, _ in request.batches():
                for together in request.packs(stack, layer, weights, batch):
                    shapes = [_expected(request, stack, layer, weights, batch[place], causal) for place in together]
                    joined = LayerShape.joined(shapes)
                    experts = math.comb(len(weights.down.weight), spec.active) if weights.mixture else 1
                    joined = replace(joined, sets=max(1, min(joined.queries, experts)))
                    plan.layers.append(request.plan(stack, layer, weights, joined))
    return plan


def _expected(
    request: Request, stack: Stack, layer: int, weights: LayerWeights, batch: int, causal: bool
) -> LayerShape:
    """What is known of one sequence's cost before the model has run."""
    shape = request.shape(stack, layer, weights, batch)
    if not causal:
        return shape
    tokens, rows, _ = stack.sequence(batch)
    masked = len(rows) * len(tokens) - int((rows + 1).sum())
    return request.shape(stack, layer, weights, batch, len(rows) * shape.longest - masked)


def _reserve(request: Request, stack: Stack, name: str, width: int) -> Tensor:
    """Room for the vectors ``[..., T, d]`` of a scope. Raises ValueError where there is not enough."""
    shape = shape_of(stack, name)
    needed = math.prod(shape) * width * request.dtype.itemsize
    if needed > psutil.virtual_memory().available:
        raise ValueError(
            f"the vectors would take {needed / 2**30:.1f} GiB, more than is free; ask for fewer layers or queries, or "
            "for norms with ffattr.attribute"
        )
    return torch.zeros((*shape, width), dtype=request.dtype, device=request.inputs.mask.device)


def _record(request: Request, inputs: Inputs, on_layer: Callable[[LayerRecord], None], check: bool = True) -> None:
    """Run the model on ``inputs``: the request's, or one batch of them."""
    encoder = None if inputs.encoder is None else inputs.encoder.mask
    record(request.adapted, inputs.kwargs, on_layer, request.recorded, check, inputs.mask, encoder)
