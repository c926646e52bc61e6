"""The definition, in plain PyTorch of any dtype: one function per formula, everything materialised.

This is the ground truth of the tests and the ``reference`` backend; float64 in, float64 out. The engine computes the
norms of the same vectors without ever holding them, and carries its bias streams through the very functions below.

Sources: Kobayashi et al. 2020 (attention), 2021 (residual and norm), 2024 (feed-forward block).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import integrated_gradients as ig
from .affine import Norm
from .attention import Attention
from .layer import CrossWeights, LayerWeights
from .routing import Routing
from .scopes import CROSS

__all__ = [
    "Baseline",
    "Encoder",
    "FeedForward",
    "Rule",
    "Stream",
    "attention_rows",
    "attention_stream",
    "context",
    "decompose",
    "feed_forward",
    "feed_forward_stream",
    "head_vectors",
    "mixture_stream",
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
    """How Integrated Gradients are computed: a rule of `ffattr.decomposition.integrated_gradients` with its steps, and the path's start."""

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


@dataclass(frozen=True)
class Encoder:
    """What cross-attention reads: the encoder's output ``states`` ``[T, d]``, and the attention to its tokens."""

    states: Tensor
    attention: Attention


def attention_rows(attention: Attention, rows: Tensor) -> Tensor:
    """Attention weights ``alpha`` ``[H, N, T]`` of the query tokens ``rows`` ``[N]``."""
    return attention.weights(rows)


def own_values(weights: LayerWeights | CrossWeights, x: Tensor, value_bias: str) -> tuple[Tensor, Tensor]:
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


def head_vectors(weights: LayerWeights | CrossWeights, values: Tensor) -> Tensor:
    """``f_h(x_j) = v_jh W_O^h``: ``[T, H, d]`` from values ``[T, H, dh]``."""
    out = weights.out.weight.unflatten(0, (weights.heads, -1))  # [H, dh, d]
    vectors: Tensor = values.transpose(0, 1) @ out
    return vectors.transpose(0, 1)


def context(alpha: Tensor, values: Tensor) -> Tensor:
    """What the heads read, ``sum_j alpha[h, i, j] v_jh``: ``[N, H, dh]`` of ``alpha`` ``[H, N, T]``."""
    return (alpha @ values.transpose(0, 1)).transpose(0, 1)


def attention_stream(
    weights: LayerWeights | CrossWeights, alpha: Tensor, read: Tensor, constant: Tensor, vectors: Tensor
) -> Stream:
    """After attention: vectors ``sum_h alpha[h, i, j] f_h(x_j)``; ``b_O`` and the values' constant are bias.

    ``read`` is the `context`. Rows of ``alpha`` may sum to less than one (attention sinks).
    """
    mass = alpha.sum(-1).T[..., None]  # [N, H, 1]
    bias = (mass * constant).flatten(1) @ weights.out.weight
    if weights.out.bias is not None:
        bias = bias + weights.out.bias
    total = read.flatten(1) @ weights.out.weight + bias
    return Stream(vectors, bias, total)


def residual_stream(stream: Stream, other: Stream) -> Stream:
    """The sum of two streams: what a residual connection does."""
    return Stream(stream.vectors + other.vectors, stream.bias + other.bias, stream.total + other.total)


def norm_stream(norm: Norm, stream: Stream) -> tuple[Stream, Tensor]:
    """After a norm whose statistics are frozen (2021, section 3.3), and its scale ``1 / s_i`` ``[N]``."""
    scale = norm.scale(stream.total)
    vectors = norm.linear(stream.vectors) * scale[:, None, None]
    return Stream(vectors, norm.affine(stream.bias, scale), norm.affine(stream.total, scale)), scale


def feed_forward(weights: LayerWeights, t: Tensor) -> Tensor:
    """The feed-forward block itself: ``[N, d]`` to ``[N, d]``."""
    return weights.down(_activated(weights, torch.stack([projection(t) for projection in weights.projections])))


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
    if weights.clamp is not None:
        return weights.clamp.slopes(path.z, weights.activation, rule.name, rule.steps, path.base)
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


def mixture_stream(weights: LayerWeights, stream: Stream, rule: Rule, routing: Routing) -> Iterator[tuple[int, Stream]]:
    """After the feed-forward block of each expert that any token goes to: ``(expert, w_ie FF_e)``, zero for tokens that
    do not go to it. The block returns their sum; ``routing`` is that of the stream's tokens."""
    for number, tokens, slots in routing.by_expert():
        one = weights.expert(number)
        of_tokens = Stream(stream.vectors[tokens], stream.bias[tokens], stream.total[tokens])
        path = preactivations(one, of_tokens, rule.baseline)
        ff = feed_forward_stream(one, of_tokens, path, slopes(one, path, rule))
        shares = routing.weight[tokens, slots].to(ff.total)[:, None]
        yield (
            number,
            Stream(
                torch.zeros_like(stream.vectors).index_copy(0, tokens, ff.vectors * shares[..., None]),
                torch.zeros_like(stream.bias).index_copy(0, tokens, ff.bias * shares),
                torch.zeros_like(stream.total).index_copy(0, tokens, ff.total * shares),
            ),
        )


def _activated(weights: LayerWeights, z: Tensor) -> Tensor:
    if weights.clamp is not None:
        return weights.clamp.value(z, weights.activation)
    hidden = weights.activation.value(z[0])
    return hidden if weights.gate is None else hidden * z[1]


def decompose(
    weights: LayerWeights,
    x: Tensor,
    attention: Attention,
    rows: Tensor,
    rule: Rule,
    value_bias: str = "token",
    routing: Routing | None = None,
    encoder: Encoder | None = None,
) -> Iterator[tuple[str, Stream]]:
    """Every scope of one layer in order, with its stream: ``x`` ``[T, d]`` one sequence, ``rows`` ``[N]`` queries.

    ``attn_heads`` comes with vectors ``[H, N, T, d]`` and a bias and total of zero size. With an ``encoder`` of ``T'``
    tokens, vectors from ``atb`` on are ``[N, T + T', d]``, its tokens last; its other scopes are prefixed `CROSS`.
    A mixture of experts needs the ``routing`` of all ``T`` tokens; its `expert_scope` has vectors ``[k, N, T, d]``, one
    for each of the ``k`` experts in a token's row of ``routing``.
    """
    stream = yield from _attended(weights, x, attention, rows, value_bias, "")
    itself = torch.zeros(len(rows), len(x), weights.width).to(x)
    itself[torch.arange(len(rows), device=rows.device), rows] = x[rows]
    own = Stream(itself, torch.zeros_like(stream.bias), x[rows])
    stream = residual_stream(stream, own)
    if weights.norm_after_attn is not None:
        yield "attn_res", stream
        stream, _ = norm_stream(weights.norm_after_attn, stream)

    if weights.cross is not None:
        assert encoder is not None
        attended = yield from _attended(weights.cross, encoder.states, encoder.attention, rows, value_bias, CROSS)
        both = torch.cat([stream.vectors, attended.vectors], 1)
        stream = Stream(both, stream.bias + attended.bias, stream.total + attended.total)
        if weights.cross.norm_after_attn is not None:
            yield f"{CROSS}attn_res", Stream(attended.vectors, stream.bias, stream.total)
            stream, _ = norm_stream(weights.cross.norm_after_attn, stream)
    yield "atb", stream

    names = iter(weights.own_scopes[weights.own_scopes.index("atb") + 1 :])
    ff_input = own if weights.parallel else stream
    if weights.norm_before_ff is not None:
        ff_input, _ = norm_stream(weights.norm_before_ff, ff_input)
        yield next(names), ff_input

    if weights.mixture:
        assert routing is not None
        chosen = routing.of(rows)
        ff = Stream(*(torch.zeros_like(part) for part in (ff_input.vectors, stream.bias, stream.total)))
        by_expert = ff.vectors.new_zeros(chosen.index.shape[1], *ff.vectors.shape)
        for number, part in mixture_stream(weights, ff_input, rule, chosen):
            ff = residual_stream(ff, part)
            by_expert += (chosen.index == number).T[..., None, None] * part.vectors
    else:
        by_expert = None
        path = preactivations(weights, ff_input, rule.baseline)
        ff = feed_forward_stream(weights, ff_input, path, slopes(weights, path, rule))
    if weights.norm_of_ff is not None:
        ff, scale = norm_stream(weights.norm_of_ff, ff)
        by_expert = None if by_expert is None else weights.norm_of_ff.linear(by_expert) * scale[:, None, None]
    if by_expert is not None:
        yield weights.expert_scope, Stream(by_expert, by_expert.new_empty(0), by_expert.new_empty(0))
    yield next(names), ff

    stream = residual_stream(stream, ff)
    yield next(names), stream

    if weights.norm_after_ff is not None:
        stream, _ = norm_stream(weights.norm_after_ff, stream)
        yield next(names), stream


def _attended(
    weights: LayerWeights | CrossWeights,
    keys: Tensor,
    attention: Attention,
    rows: Tensor,
    value_bias: str,
    prefix: str,
) -> Generator[tuple[str, Stream], None, Stream]:
    """The scopes ``attn_heads`` and ``attn`` of one attention to the tokens ``keys`` ``[T, d]``; returns the latter."""
    alpha = attention_rows(attention, rows)
    values, constant = own_values(weights, keys, value_bias)
    per_head = alpha[..., None] * head_vectors(weights, values).transpose(0, 1)[:, None]
    stream = attention_stream(weights, alpha, context(alpha, values), constant, per_head.sum(0))
    norm = weights.norm_of_attn if isinstance(weights, LayerWeights) else None
    if norm is not None:
        stream, scale = norm_stream(norm, stream)
        per_head = norm.linear(per_head) * scale[:, None, None]
    yield f"{prefix}attn_heads", Stream(per_head, per_head.new_empty(0), per_head.new_empty(0))
    yield f"{prefix}attn", stream
    return stream
