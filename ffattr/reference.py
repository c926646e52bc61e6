"""The definition, in plain PyTorch of any dtype: one function per formula, everything materialised.

This is the ground truth of the tests and the ``reference`` backend; float64 in, float64 out. The engine computes the
norms of the same vectors without ever holding them, and carries its bias streams through the very functions below.

Sources: Kobayashi et al. 2020 (attention), 2021 (residual and norm), 2024 (feed-forward block).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ig
from .attention import Attention
from .layer import LayerWeights
from .parameters import Norm

__all__ = [
    "Baseline",
    "FeedForward",
    "Rule",
    "Stream",
    "attention_rows",
    "attention_stream",
    "decompose",
    "feed_forward_stream",
    "head_vectors",
    "layer_output",
    "norm_stream",
    "own_values",
    "preactivations",
    "residual_stream",
    "slopes",
]

Baseline = str | Tensor
"""Where the path of Integrated Gradients starts: ``"zero"``, ``"bias"`` (only the bias stream present) or a tensor."""


@dataclass(frozen=True)
class Rule:
    """How Integrated Gradients are computed: a rule of `ffattr.ig` with its steps, and the path's start."""

    name: str = "exact"
    steps: int = 0
    baseline: Baseline = "zero"


@dataclass(frozen=True)
class Stream:
    """The residual stream of ``N`` query tokens at one point of a layer, decomposed: ``total = sum_j vectors + bias``.

    ``vectors`` ``[N, T, d]``, one per input token (the engine leaves them out: ``T`` = 0), ``bias`` and ``total``
    ``[N, d]``. ``total`` is what the model computes, not the sum, so that each is a check on the other.
    """

    vectors: Tensor
    bias: Tensor
    total: Tensor


@dataclass(frozen=True)
class FeedForward:
    """One token's path through the feed-forward activation: ``z`` and its start ``base`` ``[S, N, F]``, ``bias`` too.

    ``S`` = 1 for a dense block, 2 for a gated one (gate, up). ``bias`` is the bias stream's share of ``z``.
    """

    z: Tensor
    bias: Tensor
    base: Tensor | None


def attention_rows(attention: Attention, rows: Tensor) -> Tensor:
    """Attention weights ``alpha`` ``[H, N, T]`` of the query tokens ``rows`` ``[N]``."""
    logits = attention.logits(rows)
    if attention.sinks is None:
        return logits.softmax(-1)
    sinks = attention.sinks[:, None, None].expand(-1, len(rows), 1)
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


def own_values(weights: LayerWeights, x: Tensor, value_bias: str) -> tuple[Tensor, Tensor]:
    """The value vectors that belong to each token, ``[T, H, dh]``, and the constant that belongs to none, ``[H, dh]``.

    ``value_bias="token"`` (2020, equation 4): ``in_j W_V + b_V`` with ``in_j`` the layer input, normed in pre-LN
    layers, belongs to token ``j`` whole. ``"separate"``: ``b_V`` and the shift ``beta`` of a pre-norm are split off.
    Query head ``h`` reads key/value head ``h // (H / Hkv)``.
    """
    norm, value = weights.norm_before_attn, weights.value
    constant = torch.zeros_like(value.weight[0]) if value.bias is None else value.bias
    if norm is None:
        linear = x @ value.weight
    else:
        linear = (norm.linear(x) * norm.scale(x)[:, None]) @ value.weight
        if norm.bias is not None:
            constant = constant + norm.bias @ value.weight
    if value_bias == "token":
        linear, constant = linear + constant, torch.zeros_like(constant)
    groups = weights.heads // weights.kv_heads
    by_head = linear.unflatten(-1, (weights.kv_heads, -1)).repeat_interleave(groups, dim=1)
    return by_head, constant.unflatten(-1, (weights.kv_heads, -1)).repeat_interleave(groups, dim=0)


def head_vectors(weights: LayerWeights, values: Tensor) -> Tensor:
    """``f_h(x_j) = v_jh W_O^h``: ``[T, H, d]`` from values ``[T, H, dh]``."""
    out = weights.out.weight.unflatten(0, (weights.heads, -1))  # [H, dh, d]
    vectors: Tensor = values.transpose(0, 1) @ out
    return vectors.transpose(0, 1)


def attention_stream(weights: LayerWeights, alpha: Tensor, values: Tensor, constant: Tensor, vectors: Tensor) -> Stream:
    """After attention: vectors ``sum_h alpha[h, i, j] f_h(x_j)``; ``b_O`` and the values' constant are bias.

    Rows of ``alpha`` may sum to less than one (attention sinks).
    """
    mass = alpha.sum(-1).T[..., None]  # [N, H, 1]
    bias = (mass * constant).flatten(1) @ weights.out.weight
    if weights.out.bias is not None:
        bias = bias + weights.out.bias
    total = (alpha @ values.transpose(0, 1)).transpose(0, 1).flatten(1) @ weights.out.weight + bias
    return Stream(vectors, bias, total)


def residual_stream(stream: Stream, other: Stream) -> Stream:
    """The sum of two streams: what a residual connection does."""
    return Stream(stream.vectors + other.vectors, stream.bias + other.bias, stream.total + other.total)


def norm_stream(norm: Norm, stream: Stream) -> tuple[Stream, Tensor]:
    """After a norm whose statistics are frozen (2021, section 3.3), and its scale ``1 / s_i`` ``[N]``."""
    scale = norm.scale(stream.total)
    vectors = norm.linear(stream.vectors) * scale[:, None, None]
    return Stream(vectors, norm.affine(stream.bias, scale), norm.affine(stream.total, scale)), scale


def preactivations(weights: LayerWeights, stream: Stream, baseline: Baseline) -> FeedForward:
    """The path of Integrated Gradients: from ``base`` to ``z = t W1 + b1`` (gated: ``t Wg``, ``t Wu``)."""
    z = torch.stack([projection(stream.total) for projection in weights.projections])
    bias = torch.stack([projection(stream.bias) for projection in weights.projections])
    if isinstance(baseline, Tensor):
        base: Tensor | None = baseline.to(z).view(-1, 1, z.shape[-1])
        if weights.gate is not None and base is not None and base.shape[0] == 1:
            base = torch.cat([base, torch.zeros_like(base)])  # a gate's baseline alone: up starts at zero
    else:
        base = bias if baseline == "bias" else None
    return FeedForward(z, bias, base)


def slopes(weights: LayerWeights, path: FeedForward, rule: Rule) -> Tensor:
    """The factors ``S`` ``[S, N, F]`` that Integrated Gradients multiply every input's pre-activation by (2024)."""
    return ig.slopes(path.z, weights.activation, rule.name, rule.steps, path.base)


def feed_forward_stream(weights: LayerWeights, stream: Stream, path: FeedForward, slope: Tensor) -> Stream:
    """After the feed-forward block: vectors ``(sum_s S_i * (t_ij W_s)) W2``.

    The bias takes its own share of the path, the value where the path starts, and ``b2``.
    """
    vectors = stream.vectors.new_zeros((*stream.vectors.shape[:2], weights.ff_width))
    for projection, factor in zip(weights.projections, slope, strict=True):
        vectors = vectors + (stream.vectors @ projection.weight) * factor[:, None]
    away = path.bias if path.base is None else path.bias - path.base
    start = _activated(weights, torch.zeros_like(path.z) if path.base is None else path.base)
    bias = weights.down((slope * away).sum(0) + start)
    return Stream(vectors @ weights.down.weight, bias, weights.down(_activated(weights, path.z)))


def layer_output(weights: LayerWeights, stream: Tensor, ff_input: Tensor) -> Tensor:
    """What is left of the layer after its attention block, by the model's own computation: ``[N, d]``."""
    z = torch.stack([projection(ff_input) for projection in weights.projections])
    added = weights.down(_activated(weights, z))
    total = stream + (added if weights.norm_of_ff is None else weights.norm_of_ff(added))
    return total if weights.norm_after_ff is None else weights.norm_after_ff(total)


def _activated(weights: LayerWeights, z: Tensor) -> Tensor:
    hidden = weights.activation.value(z[0])
    return hidden if weights.gate is None else hidden * z[1]


def decompose(
    weights: LayerWeights, x: Tensor, attention: Attention, rows: Tensor, rule: Rule, value_bias: str = "token"
) -> Iterator[tuple[str, Stream]]:
    """Every scope of one layer in order, with its stream: ``x`` ``[T, d]`` one sequence, ``rows`` ``[N]`` queries.

    ``attn_heads`` comes with vectors ``[H, N, T, d]`` and a bias and total of zero size.
    """
    names = iter(weights.scopes)
    alpha = attention_rows(attention, rows)
    values, constant = own_values(weights, x, value_bias)
    per_head = alpha[..., None] * head_vectors(weights, values).transpose(0, 1)[:, None]
    stream = attention_stream(weights, alpha, values, constant, per_head.sum(0))
    if weights.norm_of_attn is not None:
        stream, scale = norm_stream(weights.norm_of_attn, stream)
        per_head = weights.norm_of_attn.linear(per_head) * scale[:, None, None]
    yield next(names), Stream(per_head, per_head.new_empty(0), per_head.new_empty(0))
    yield next(names), stream

    itself = torch.zeros_like(stream.vectors)
    itself[torch.arange(len(rows)), rows] = x[rows]
    own = Stream(itself, torch.zeros_like(stream.bias), x[rows])
    stream = residual_stream(stream, own)
    yield next(names), stream

    if weights.norm_after_attn is not None:
        stream, _ = norm_stream(weights.norm_after_attn, stream)
        yield next(names), stream

    ff_input = own if weights.parallel else stream
    if weights.norm_before_ff is not None:
        ff_input, _ = norm_stream(weights.norm_before_ff, ff_input)
        yield next(names), ff_input

    path = preactivations(weights, ff_input, rule.baseline)
    ff = feed_forward_stream(weights, ff_input, path, slopes(weights, path, rule))
    if weights.norm_of_ff is not None:
        ff, _ = norm_stream(weights.norm_of_ff, ff)
    yield next(names), ff

    stream = residual_stream(stream, ff)
    yield next(names), stream

    if weights.norm_after_ff is not None:
        stream, _ = norm_stream(weights.norm_after_ff, stream)
        yield next(names), stream
