"""Sequences of random layers side by side, what the engine makes of them step by step, and their definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from random_layers import RandomLayer
from torch import Tensor

from ffattr.decomposition.attention import QueryKey
from ffattr.decomposition.layer import LayerWeights
from ffattr.decomposition.reference import Encoder, Rule, ScopeVectors, decompose
from ffattr.decomposition.routing import Routing
from ffattr.decomposition.scopes import Scope
from ffattr.decomposition.walk import Stream
from ffattr.engine.key_tokens import KeyTokens, attention_paths
from ffattr.engine.pack import OneSequence, Pack, QueryBlock
from ffattr.engine.query_pass import QueryPass, Slopes, pass_queries
from ffattr.ops import torch_kernels

LENGTHS = (5, 1, 9, 3)


def cut(layer: RandomLayer, tokens: list[int], rows: list[int]) -> OneSequence:
    """Some tokens of a random layer's input as a sequence."""
    at = torch.tensor(tokens)
    attention = layer.attention
    own = QueryKey(attention.query[:, at], attention.key[:, at], attention.scale, causal=attention.causal)
    routing = None if layer.routing is None else layer.routing.of(at)
    encoder = None
    if layer.encoder is not None:
        seen, states = layer.encoder.attention, layer.encoder.states[len(tokens) // 2 :]
        assert isinstance(seen, QueryKey)
        assert seen.mask is not None
        part = slice(len(tokens) // 2, None)
        across = QueryKey(seen.query[:, at], seen.key[:, part], seen.scale, seen.mask[..., part])
        encoder = Encoder(states, across)
    return OneSequence(layer.x[at], own, torch.tensor(rows, dtype=torch.int64), routing, encoder)


def sequences(layer: RandomLayer) -> list[OneSequence]:
    """Of different lengths, with queries in any order, one without any."""
    queries = ([0, 4, 2], [0], [], [2, 0, 1])
    starts = (0, 7, 0, 4)
    return [
        cut(layer, list(range(start, start + length)), rows)
        for start, length, rows in zip(starts, LENGTHS, queries, strict=True)
    ]


@dataclass(frozen=True)
class PassedPack:
    """Some queries of a pack after their own way through a layer."""

    weights: LayerWeights
    sources: list[KeyTokens]
    queries: QueryBlock
    routing: Routing | None
    passed: QueryPass
    bias: dict[str, Tensor]


def pass_pack(layer: RandomLayer, pack: Pack, index: Tensor | None = None, ff: bool = True) -> PassedPack:
    """The queries ``index`` of the pack, all of them unless said otherwise; with slopes where ``ff``."""
    bias: dict[str, Tensor] = {}

    def keep(scope: Scope, stream: Stream) -> None:
        bias[str(scope)] = stream.bias

    sources = [path.key_tokens(pack, "token") for path in attention_paths(layer.weights)]
    queries = pack.choose_queries(torch.arange(len(pack.query_tokens)) if index is None else index)
    routing = None if pack.routing is None else pack.routing.of(queries.token_in_pack)
    slopes = Slopes(Rule(), torch_kernels) if ff else None
    passed = pass_queries(layer.weights, sources, queries, routing, slopes, keep)
    return PassedPack(layer.weights, sources, queries, routing, passed, bias)


def define(layer: RandomLayer, one: OneSequence) -> dict[str, ScopeVectors]:
    """The definition of one sequence."""
    given = (layer.weights, one.x, one.attention, one.query_tokens, Rule(), "token", one.routing, one.encoder)
    return {str(scope): stream for scope, stream in decompose(*given)}


def define_vectors(layer: RandomLayer, one: OneSequence, scope: Scope) -> Tensor:
    """The vectors ``[..., N, keys, d]`` of the scope's own source alone."""
    vectors, own = define(layer, one)[str(scope.seen_from("own"))].vectors, len(one.x)
    if scope.point in ("attn", "attn_res"):
        return define(layer, one)[str(scope)].vectors
    return vectors[..., own:, :] if scope.source == "cross" else vectors[..., :own, :]
