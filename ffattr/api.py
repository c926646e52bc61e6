"""`attribute`, `vectors` and `explain`: from a loaded model and its inputs to maps, vectors or a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from . import engine, reference
from ._version import __version__
from .attention import Attention, LayerRecord
from .capture import record
from .errors import ArchitectureMismatch
from .maps import Attribution
from .plan import Plan
from .request import IG, Indices, Request

__all__ = ["Vectors", "attribute", "explain", "vectors"]

# Largest relative difference, over tokens, between the recomputed and the model's own layer output. Rounding alone
# gives 1e-6 in float32; erf-GELU taken for tanh-GELU, the smallest mistake known, gives 7e-5 and more.
_SINGLE = 1e-6  # of a float64 model whose attention weights were made in float32
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
    method: str = "auto",
    memory_budget: int | None = None,
    check: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """How much each token contributes to each token, in every layer: the norms of the decomposed vectors.

    Runs the model's own forward pass once (twice with ``check``) and leaves the model as it was.

    model: a loaded transformers model, ``nn.TransformerEncoder`` or ``nn.TransformerEncoderLayer``, in eval mode.
    inputs: what the model takes (a mapping of tensors, ids ``[B, T]``, a float tensor), or text with ``tokenizer``.
    scopes: ``"layer"`` (the last), ``"all"``, a name or names: how far through the layer the vectors are carried.
    layers, queries: indices (negative ones from the end), a slice, or None for all. A query is a position of the
        padded input; rows of padding are zero. The cost is proportional to the number of queries.
    ig: ``"exact"``, `ffattr.Riemann` or `ffattr.GaussLegendre`: Integrated Gradients through the FF activation.
    baseline: start of its path: ``"zero"``, ``"bias"``, or pre-activations ``[F]`` (gated: ``[F]`` or ``[2, F]``).
    value_bias: ``"token"`` (b_V stays with its token, as in the papers) or ``"separate"`` (goes to the bias).
    dtype: precision of the wide products, those with the feed-forward matrices: ``torch.float64``, ``float32``,
        ``bfloat16``, ``float16`` or ``float8_e4m3fn``; None: float64 for a float64 model, a half model's own on a GPU,
        else float32. Everything else, the maps included, is float64 with float64 and float32 otherwise.
    backend: ``"auto"``, ``"cpu"`` (C++), ``"triton"`` or ``"cuda"`` (GPU), ``"torch"`` or ``"reference"``; ``ffattr
        info`` says which run here and in which dtypes. ``"auto"`` never picks ``"cuda"``.
    method: ``"auto"``, ``"direct"`` or ``"operator"``; `explain` says which one is chosen, and why.
    memory_budget: bytes of working memory besides the maps. Where memory runs out all the same, a layer is computed
        again in smaller blocks; `OutOfMemory` says that the smallest do not fit.
    progress: called with (layers done, layers in all).
    check: compare the recomputed layer outputs with the model's; a difference raises `ArchitectureMismatch`.

    Returns an `Attribution`; ``maps[scope]`` is ``[layers, B, queries, T]`` (``attn_heads``: heads before queries).
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
    )
    mask = request.inputs.mask
    shape = (len(request.layers), len(mask), len(request.queries), mask.shape[1])
    plan = Plan(request.backend.name, request.wide_dtype, request.device)
    result = Attribution(
        maps={name: _zeros(request, shape, name) for name in request.scopes},
        bias={name: _zeros(request, shape[:3]) for name in request.scopes},
        tokens=request.inputs.tokens,
        layers=request.layers,
        queries=request.queries,
        scopes=request.scopes,
        mask=mask,
        error=_zeros(request, shape[:2]),
        plan=plan,
        arguments={
            "model": request.adapted.family,
            "ig": str(ig),
            "baseline": baseline if isinstance(baseline, str) else f"tensor {list(baseline.shape)}",
            "value_bias": value_bias,
            "dtype": str(request.wide_dtype).removeprefix("torch."),
            "backend": request.backend.name,
            "method": method,
            "ffattr": __version__,
            "torch": str(torch.__version__),
        },
    )

    reached = 0

    def on_layer(captured: LayerRecord) -> None:
        nonlocal reached
        weights = request.adapted.layers[captured.index].weights(request.dtype)
        places = request.places(captured.index)
        for batch in range(len(mask)):
            sequence = _Sequence.of(request, captured, batch)
            pairs = sequence.attention.pairs(sequence.rows)
            layer_plan = request.plan(captured.index, weights, len(sequence.rows), len(sequence.tokens), pairs)
            done = engine.layer_maps(
                weights,
                sequence.x,
                sequence.attention,
                sequence.rows,
                request.scopes,
                request.rule,
                value_bias,
                request.backend,
                layer_plan,
            )
            plan.layers.append(done.plan)
            error = sequence.error(done.output)
            for at in places:
                for name in request.scopes:
                    sequence.fill(result.maps[name][at, batch], done.maps[name])
                    result.bias[name][at, batch, sequence.filled] = done.bias[name]
                result.error[at, batch] = error
            if check:
                _check_error(request, captured, batch, float(error))
        result.arguments["causal"] = result.arguments.get("causal", True) and not captured.attention.looks_ahead
        reached += len(places)
        if progress is not None:
            progress(reached, len(request.layers))

    record(request.adapted, request.inputs.kwargs, on_layer, request.layers, verify=check)
    return result


@dataclass(frozen=True)
class Vectors:
    """The decomposed vectors of one scope: ``values.sum(-2) + bias == total``.

    ``values`` ``[layers, B, queries, T, d]`` (``attn_heads``: ``[layers, B, heads, queries, T, d]``), ``bias`` and
    ``total`` ``[layers, B, queries, d]`` (zero for ``attn_heads``). Padding is zero.
    """

    values: Tensor
    bias: Tensor
    total: Tensor
    tokens: list[list[str]]
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scope: str


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
    if len(request.scopes) != 1:
        raise ValueError(f"scope={scope!r} names {len(request.scopes)} scopes, expected one of them")
    (name,) = request.scopes
    width = request.adapted.layers[0].weights(request.dtype).width
    batch, tokens = request.inputs.mask.shape
    shape = (len(request.layers), batch, len(request.queries))
    values = _zeros(request, (*shape, tokens, width), name, reserve=True)
    bias, total = _zeros(request, (*shape, width)), _zeros(request, (*shape, width))

    def on_layer(captured: LayerRecord) -> None:
        weights = request.adapted.layers[captured.index].weights(request.dtype)
        places = request.places(captured.index)
        for row in range(batch):
            sequence = _Sequence.of(request, captured, row)
            for n, query in zip(sequence.filled.tolist(), sequence.rows, strict=True):
                streams = reference.decompose(
                    weights, sequence.x, sequence.attention, query[None], request.rule, value_bias
                )
                stream = next(stream for found, stream in streams if found == name)
                for at in places:
                    values[at, row, ..., n, sequence.tokens, :] = stream.vectors.squeeze(-3)
                    if name != "attn_heads":
                        bias[at, row, n], total[at, row, n] = stream.bias[0], stream.total[0]

    record(request.adapted, request.inputs.kwargs, on_layer, request.layers)
    return Vectors(values, bias, total, request.inputs.tokens, request.layers, request.queries, name)


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
    method: str = "auto",
    memory_budget: int | None = None,
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
    )
    plan = Plan(request.backend.name, request.wide_dtype, request.device)
    for index in request.layers:
        weights = request.adapted.layers[index].weights(request.dtype)
        causal = bool(getattr(request.adapted.layers[index].attention, "is_causal", False))
        for batch in range(len(request.inputs.mask)):
            tokens, rows, _ = request.sequence(batch)
            pairs = int((rows + 1).sum()) if causal else len(rows) * len(tokens)
            plan.layers.append(request.plan(index, weights, len(rows), len(tokens), pairs))
    return plan


@dataclass(frozen=True)
class _Sequence:
    """One batch row of one captured layer without its padding, in the dtype of the result."""

    tokens: Tensor
    rows: Tensor
    filled: Tensor
    x: Tensor
    output: Tensor
    attention: Attention

    @classmethod
    def of(cls, request: Request, captured: LayerRecord, batch: int) -> _Sequence:
        device = captured.input.device
        tokens, rows, filled = (part.to(device) for part in request.sequence(batch))
        x = captured.input[batch].index_select(0, tokens).to(request.dtype)
        output = captured.output[batch].index_select(0, tokens[rows]).to(request.dtype)
        attention = captured.attention.sequence(batch, tokens, request.dtype)
        return cls(tokens, rows, filled, x, output, attention)

    def fill(self, to: Tensor, tile: Tensor) -> None:
        """Spread a map ``[..., n, t]`` of the real tokens over the padded one ``[..., N, T]``."""
        if tile.shape == to.shape:
            to.copy_(tile)
        else:
            to[..., self.filled[:, None], self.tokens] = tile.to(to.device)

    def error(self, recomputed: Tensor) -> Tensor:
        """Largest relative difference of a token's recomputed and recorded layer output."""
        if len(self.rows) == 0:
            return self.output.new_zeros(())
        scale = self.output.norm(dim=-1).clamp_min(torch.finfo(self.output.dtype).tiny)
        difference: Tensor = (recomputed - self.output).norm(dim=-1) / scale
        return difference.max()


def _zeros(request: Request, shape: Sequence[int], scope: str = "", reserve: bool = False) -> Tensor:
    shape = list(shape)
    if scope == "attn_heads":
        shape.insert(2, request.adapted.layers[0].heads)
    count = 1
    for size in shape:
        count *= size
    if reserve and count * request.dtype.itemsize > psutil.virtual_memory().available:
        raise ValueError(
            f"the vectors would take {count * request.dtype.itemsize / 2**30:.1f} GiB, more than is free; "
            "ask for fewer layers or queries, or for norms with ffattr.attribute"
        )
    return torch.zeros(shape, dtype=request.dtype, device=request.inputs.mask.device)


def _check_error(request: Request, captured: LayerRecord, batch: int, error: float) -> None:
    dtype = captured.output.dtype if captured.output.dtype.itemsize < request.dtype.itemsize else request.dtype
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE[torch.float32])
    if not error <= (max(tolerance, _SINGLE) if captured.attention.single else tolerance):
        raise ArchitectureMismatch(
            f"layer {captured.index}, batch row {batch}: the recomputed output differs from the model's by {error:.1e} "
            f"(relative), more than rounding in {dtype} explains. The {request.adapted.family!r} adapter does not "
            "describe this layer; see ffattr.register_adapter. (check=False goes on at your own risk.)"
        )
