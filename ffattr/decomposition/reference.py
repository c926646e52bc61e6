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

from . import integrated_gradients as ig
from .attention import Attention
from .layer import Block, Branch, CrossWeights, LayerWeights
from .routing import Routing
from .scopes import Scope, Source
from .walk import Station, Stream, add_streams, scale_stream, select_rows, walk

__all__ = [
    "Baseline",
    "Encoder",
    "Path",
    "Rule",
    "ScopeVectors",
    "apply_activation",
    "attention_stream",
    "branch_stream",
    "branch_streams",
    "compute_output",
    "context",
    "decompose",
    "enter_block",
    "feed_forward",
    "head_vectors",
    "leave_block",
    "own_values",
    "path_start",
    "preactivations",
    "slopes",
    "start_value",
    "weigh_heads",
    "weigh_values",
]

Baseline = str | Tensor
"""The start of the path of Integrated Gradients: ``"zero"``, ``"bias"`` (only the bias stream present) or a tensor."""


@dataclass(frozen=True)
class Rule:
    """How Integrated Gradients are computed: a rule of `ffattr.decomposition.integrated_gradients` with its steps, and
    the path's start."""

    name: str = "exact"
    steps: int = 0
    baseline: Baseline = "zero"


@dataclass(frozen=True)
class Path:
    """The tokens' paths through the activation of a network: ``z`` and its start ``base`` ``[S, N, F]``, ``bias`` too.

    ``S`` = 1 in a dense network, 2 in a gated one (gate, up). ``bias`` is the bias stream's share of ``z``, ``vectors``
    ``[S, P, F]`` are those of its vectors.
    """

    z: Tensor
    bias: Tensor
    base: Tensor | None
    vectors: Tensor


@dataclass(frozen=True)
class Encoder:
    """What cross-attention reads: the encoder's output ``states`` ``[T, d]``, and the attention to its tokens."""

    states: Tensor
    attention: Attention


def own_values(weights: LayerWeights | CrossWeights, x: Tensor, value_bias: str) -> tuple[Tensor, Tensor | None]:
    """The value vectors that belong to each token, ``[T, H, dh]``, and the constant that belongs to none, ``[H, dh]``
    (None: zero).

    ``value_bias="token"`` (2020, equation 4): ``in_j W_V + b_V`` with ``in_j`` the layer input, normed in pre-LN
    layers, belongs to token ``j`` whole. ``"separate"``: ``b_V`` and the shift ``beta`` of a pre-norm are split off;
    of values made of a latent vector, ``b_V`` and the shift of the latent's norm, which alone are the same for all
    tokens. Query head ``h`` reads key/value head ``h // (H / Hkv)``. Of a gated attention, every feature of a query
    head is a head of width 1.
    """
    norm, value = weights.norm_before_attn, weights.value
    constant = value.bias
    if weights.latent is not None:
        x, norm = weights.latent.down(x if norm is None else norm(x)), weights.latent.norm
    if norm is None:
        linear = x @ value.weight
    else:
        linear = (norm.linear(x) * norm.scale(x)[:, None]) @ value.weight
        if norm.bias is not None:
            shift = norm.bias @ value.weight
            constant = shift if constant is None else constant + shift
    if value_bias == "token" and constant is not None:
        linear, constant = linear + constant, None
    return _split_heads(weights, linear), None if constant is None else _split_heads(weights, constant)


def _split_heads(weights: LayerWeights | CrossWeights, values: Tensor) -> Tensor:
    """``[..., H, dh]`` of what a projection gives for the key/value heads, ``[..., Hkv * dh]``."""
    by_head: Tensor = values.unflatten(-1, (weights.kv_heads, -1))
    groups = weights.heads // weights.head_features // weights.kv_heads
    if groups > 1:
        by_head = by_head.repeat_interleave(groups, dim=-2)
    return by_head.flatten(-2)[..., None] if weights.head_features > 1 else by_head


def head_vectors(weights: LayerWeights | CrossWeights, values: Tensor) -> Tensor:
    """``f_h(x_j) = v_jh W_O^h``: ``[T, H, d]`` from values ``[T, H, dh]``."""
    out = weights.out.weight.unflatten(0, (weights.heads, -1))  # [H, dh, d]
    vectors: Tensor = values.transpose(0, 1) @ out
    return vectors.transpose(0, 1)


def weigh_heads(weights: LayerWeights | CrossWeights, alpha: Tensor, values: Tensor) -> Tensor:
    """``alpha[h, i, j] f_h(x_j)`` of each of the model's heads, ``[H, N, T, d]``, where gated: summed over the features
    of a head; of ``alpha`` and ``values`` as of `context`."""
    if weights.head_features == 1:
        return alpha[..., None] * head_vectors(weights, values).transpose(0, 1)[:, None]
    mixed = alpha.permute(1, 2, 0) * values[..., 0]  # [N, T, H * dh]
    by_head = mixed.unflatten(-1, (-1, weights.head_features)).movedim(2, 0)
    found: Tensor = by_head @ weights.out.weight.unflatten(0, (-1, weights.head_features))[:, None]
    return found


def context(alpha: Tensor, values: Tensor) -> Tensor:
    """What the heads read, ``sum_j alpha[h, i, j] v_jh``: ``[N, H, dh]`` of ``alpha`` ``[H, N, T]``."""
    return (alpha @ values.transpose(0, 1)).transpose(0, 1)


def weigh_values(alpha: Tensor, values: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What the heads read of single tokens, ``alpha[h, i, j] v_jh``: ``[P, H * dh]`` of the pairs ``(query, key)``.
    ``values`` ``[P, H, dh]`` are those of the pairs' keys."""
    return (alpha[:, query, key].T[..., None] * values).flatten(1)


def attention_stream(
    weights: LayerWeights | CrossWeights,
    alpha: Tensor,
    read: Tensor,
    constant: Tensor | None,
    of_pairs: tuple[Tensor, Tensor] | None = None,
) -> Stream:
    """After attention: vectors ``sum_h alpha[h, i, j] v_jh W_O^h``; ``b_O`` and the values' constant are bias.

    ``read`` is the `context`; ``of_pairs``: what `weigh_values` gives of ``P`` pairs, and their queries ``[P]``. Rows
    of ``alpha`` may sum to less than one (attention sinks).
    """
    whole = read.flatten(1)
    shared = torch.zeros_like(whole) if constant is None else (alpha.sum(-1).T[..., None] * constant).flatten(1)
    whole = whole if constant is None else whole + shared
    weighted, query = of_pairs or (whole[:0], torch.empty(0, dtype=torch.int64, device=whole.device))
    stream = Stream.from_parts(weighted, query, shared, whole)
    return stream.with_rows(stream.rows @ weights.out.weight, weights.out.bias)


def preactivations(branch: Branch, stream: Stream, baseline: Baseline) -> Path:
    """The path of Integrated Gradients: from ``base`` to ``z = t W1 + b1`` (gated: ``t Wg``, ``t Wu``)."""
    found = [stream.with_rows(stream.rows @ part.weight, part.bias) for part in branch.projections]
    rows = found[0].rows[None] if len(found) == 1 else torch.stack([one.rows for one in found])
    vectors, bias, z = rows.split([stream.pairs, stream.queries, stream.queries], 1)
    return Path(z, bias, path_start(branch, z, bias, baseline), vectors)


def path_start(branch: Branch, z: Tensor, bias: Tensor | None, baseline: Baseline) -> Tensor | None:
    """The start of the path to ``z``, ``[S, N or 1, F]``, None: at zero. Only ``"bias"`` asks for ``bias``."""
    if isinstance(baseline, Tensor):
        base = baseline.to(z).view(-1, 1, z.shape[-1])
        if branch.gate is not None and base.shape[0] == 1:
            base = torch.cat([base, torch.zeros_like(base)])  # a gate's baseline alone: up starts at zero
        return base
    return bias if baseline == "bias" else None


def slopes(branch: Branch, path: Path, rule: Rule) -> Tensor:
    """The factors ``S`` ``[S, N, F]`` that Integrated Gradients multiply every input's pre-activation by (2024)."""
    if branch.clamp is not None:
        return branch.clamp.slopes(path.z, branch.activation, rule.name, rule.steps, path.base)
    return ig.slopes(path.z, branch.activation, rule.name, rule.steps, path.base)


def branch_stream(branch: Branch, stream: Stream, path: Path, slope: Tensor) -> Stream:
    """After a feed-forward network: vectors ``(sum_s S_i * (t_ij W_s)) W2``.

    The bias takes its own share of the path, the value where the path starts, and ``b2``.
    """
    vectors = path.vectors[0]
    if stream.pairs:
        vectors = _add_up(path.vectors * slope.index_select(1, stream.query))
    bias = _add_up(slope * (path.bias if path.base is None else path.bias - path.base))
    start = start_value(branch, path.base)
    bias = bias if isinstance(start, float) and start == 0 else bias + start
    neurons = torch.cat([vectors, bias, apply_activation(branch, path.z)])
    return stream.with_rows(neurons @ branch.down.weight, branch.down.bias)


def _add_up(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def start_value(branch: Branch, base: Tensor | None) -> Tensor | float:
    """The neurons where the path starts, of a number each, ``[N or 1, F]``, or the same number of all: at zero."""
    if base is not None:
        return apply_activation(branch, base)
    up = 1.0 if branch.gate is None else 0.0 if branch.clamp is None else branch.clamp.offset
    return branch.activation.at_zero * up


def branch_streams(
    weights: LayerWeights, stream: Stream, rule: Rule, routing: Routing | None
) -> Iterator[tuple[int | None, Stream]]:
    """After each network of the feed-forward block, which returns their sum: ``(expert, w_ie FF_e)``, zero at tokens
    that do not go to the expert; None stands for a network that all tokens go through.

    ``routing`` is that of the stream's tokens.
    """
    for block in weights.blocks(routing):
        read, index = enter_block(block, stream)
        path = preactivations(block.branch, read, rule.baseline)
        ff = leave_block(block, branch_stream(block.branch, read, path, slopes(block.branch, path, rule)))
        if index is not None:
            ff = stream.with_rows(torch.zeros_like(stream.rows).index_copy(0, index, ff.rows))
        yield block.number, ff


def enter_block(block: Block, stream: Stream) -> tuple[Stream, Tensor | None]:
    """What a network reads: the stream of the tokens that go through it, times their shares where these multiply
    what experts read; and which of the rows those are (None: all)."""
    index = None
    if block.tokens is not None:
        stream, index = select_rows(stream, block.tokens)
    return (scale_stream(stream, block.share) if block.branch.scales_input else stream), index


def leave_block(block: Block, returned: Stream) -> Stream:
    """What a network adds to those tokens: what it returned, times their shares."""
    return returned if block.branch.scales_input else scale_stream(returned, block.share)


def feed_forward(weights: LayerWeights, t: Tensor, routing: Routing | None) -> Tensor:
    """The feed-forward block itself: ``[N, d]`` to ``[N, d]``."""
    total: Tensor | None = None
    for block in weights.blocks(routing):
        branch, share = block.branch, None if block.share is None else block.share[:, None]
        read = t if block.tokens is None else t[block.tokens]
        read = read if share is None or not branch.scales_input else read * share
        returned = branch.down(
            apply_activation(branch, torch.stack([projection(read) for projection in branch.projections]))
        )
        returned = returned if share is None or branch.scales_input else returned * share
        if block.tokens is not None:
            total = torch.zeros_like(t) if total is None else total
            total = total.index_add(0, block.tokens, returned)
        else:
            total = returned if total is None else total + returned
    return torch.zeros_like(t) if total is None else total


def apply_activation(branch: Branch, z: Tensor) -> Tensor:
    """The neurons ``[..., F]`` of pre-activations ``[S, ..., F]``."""
    if branch.clamp is not None:
        return branch.clamp.value(z, branch.activation)
    hidden = branch.activation.value(z[0])
    return hidden if branch.gate is None else hidden * z[1]


def compute_output(
    weights: LayerWeights,
    x: Tensor,
    attention: Attention,
    rows: Tensor,
    routing: Routing | None = None,
    encoder: Encoder | None = None,
) -> Tensor:
    """The layer's output ``[N, d]`` at the queries ``rows``, without any decomposition; arguments of `decompose`."""
    chosen = None if routing is None or not weights.mixture else routing.of(rows)

    def attend(source: Source) -> Stream:
        part, keys, to_keys = _choose_source(weights, x, attention, encoder, source)
        alpha, (values, constant) = to_keys.attention_weights(rows), own_values(part, keys, "token")
        return attention_stream(part, alpha, context(alpha, values), constant)

    def through_networks(read: Stream) -> Stream:
        return read.with_total(feed_forward(weights, read.total, chosen))

    *_, last = walk(weights, Stream.of_total(x[rows]), attend, through_networks)
    return last.stream.total


@dataclass(frozen=True)
class ScopeVectors:
    """A scope's vectors ``[N, T, d]``, one per input token, its bias and what the model computes, ``[N, d]``.

    Of scopes per head or expert ``[H, N, T, d]`` and ``[k, N, T, d]``, with a bias and total of zero size.
    """

    vectors: Tensor
    bias: Tensor
    total: Tensor


def decompose(
    weights: LayerWeights,
    x: Tensor,
    attention: Attention,
    rows: Tensor,
    rule: Rule,
    value_bias: str = "token",
    routing: Routing | None = None,
    encoder: Encoder | None = None,
) -> Iterator[tuple[Scope, ScopeVectors]]:
    """Every scope of one layer in order: ``x`` ``[T, d]`` one sequence, ``rows`` ``[N]`` queries.

    With an ``encoder`` of ``T'`` tokens, vectors from ``atb`` on are ``[N, T + T', d]``, its tokens last; before, they
    are those of one source. A mixture of experts needs the ``routing`` of all ``T`` tokens; its `expert_scope` has
    vectors ``[k, N, T, d]``, one for each of the experts in a token's row of ``routing``, and behind them one for each
    branch that all tokens go through.
    """
    chosen = None if routing is None or not weights.mixture else routing.of(rows)
    apart: dict[Scope, Tensor] = {}  # what is summed at the station of the same point
    count, every = len(rows), torch.arange(len(rows), device=rows.device)
    across = 0 if encoder is None else len(encoder.states)

    def pair_up(keys: int) -> tuple[Tensor, Tensor]:
        return every.repeat_interleave(keys), torch.arange(keys, device=rows.device).repeat(count)

    def fold_pairs(vectors: Tensor, scope: Scope) -> Tensor:
        """The vectors ``[N, keys, d]`` of all pairs at a scope, which are the last of those that there are."""
        sizes = [across] if scope.source == "cross" else [len(x), across]
        sizes = sizes[:1] if scope.point in ("attn", "attn_res") else sizes
        parts = vectors[len(vectors) - count * sum(sizes) :].split([count * size for size in sizes])
        return torch.cat([part.view(count, size, weights.width) for part, size in zip(parts, sizes, strict=True)], 1)

    def attend(source: Source) -> Stream:
        part, keys, to_keys = _choose_source(weights, x, attention, encoder, source)
        alpha = to_keys.attention_weights(rows)
        values, constant = own_values(part, keys, value_bias)
        apart[weights.own_scopes[0].seen_from(source)] = weigh_heads(part, alpha, values)
        query, key = pair_up(len(keys))
        weighted = weigh_values(alpha, values[key], query, key)
        return attention_stream(part, alpha, context(alpha, values), constant, (weighted, query))

    def sum_branches(ff_input: Stream) -> Stream:
        total, shared = ff_input.with_rows(torch.zeros_like(ff_input.rows)), []
        by_expert = None if chosen is None else x.new_zeros(len(chosen.index.T), *ff_input.vectors.shape)
        for number, ff in branch_streams(weights, ff_input, rule, chosen):
            total = add_streams(total, ff)
            if number is None:
                shared.append(ff.vectors)
            elif chosen is not None and by_expert is not None:
                taken = (chosen.index == number)[ff.query]
                by_expert += taken.T[..., None] * ff.vectors
        if by_expert is not None:
            parts = torch.cat([by_expert, torch.stack(shared)]) if shared else by_expert
            apart[weights.expert_scope] = torch.stack([fold_pairs(part, weights.expert_scope) for part in parts])
        return total

    query, key = pair_up(len(x))
    for station in walk(weights, Stream.of_pairs(x[rows], rows, query, key), attend, sum_branches):
        if station.scope is None:
            continue
        yield from _parts_first(weights, station, station.scope, apart)
        stream = station.stream
        yield station.scope, ScopeVectors(fold_pairs(stream.vectors, station.scope), stream.bias, stream.total)


def _choose_source(
    weights: LayerWeights, x: Tensor, attention: Attention, encoder: Encoder | None, source: Source
) -> tuple[LayerWeights | CrossWeights, Tensor, Attention]:
    """The parameters of the attention to ``source``, the tokens that are its keys, and how it sees them."""
    if source == "own":
        return weights, x, attention
    assert weights.cross is not None
    assert encoder is not None
    return weights.cross, encoder.states, encoder.attention


def _parts_first(
    weights: LayerWeights, station: Station, scope: Scope, apart: dict[Scope, Tensor]
) -> Iterator[tuple[Scope, ScopeVectors]]:
    """What is summed at a station, per head or per expert."""
    norm = weights.norm_of_ff if scope.point == "ff" else dict(weights.attentions)[scope.source].norm_of_attn
    for other in [name for name in apart if name.point == scope.point]:
        vectors = apart.pop(other)
        if norm is not None and station.norm_scale is not None:
            vectors = norm.linear(vectors) * station.norm_scale[:, None, None]
        yield other, ScopeVectors(vectors, vectors.new_empty(0), vectors.new_empty(0))
