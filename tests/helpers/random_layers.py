"""Random layers as data, without a model: mixtures of experts, and decoder layers that also attend to an encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ffattr.bench.run import run_dense
from ffattr.decomposition.activations import ACTIVATIONS
from ffattr.decomposition.affine import Linear, Norm
from ffattr.decomposition.attention import QueryKey
from ffattr.decomposition.clamp import Clamp
from ffattr.decomposition.layer import Branch, CrossWeights, LayerWeights
from ffattr.decomposition.reference import Encoder, Rule, ScopeVectors, decompose
from ffattr.decomposition.routing import Routing
from ffattr.engine.layer_maps import LayerTask
from ffattr.engine.pack import OneSequence
from ffattr.engine.planning.choose import plan_layer
from ffattr.engine.planning.costs import BY_QUERY, Blocks, LayerShape
from ffattr.engine.planning.plan import EngineOptions, LayerPlan
from ffattr.ops.backends import BACKENDS

WIDTH, HEADS, HEAD_DIM, NEURONS, TOKENS = 12, 3, 5, 7, 9


@dataclass(frozen=True)
class Computed:
    """All that the engine makes of a layer and one sequence."""

    maps: dict[str, Tensor]
    bias: dict[str, Tensor]
    output: Tensor
    plan: LayerPlan


@dataclass(frozen=True)
class RandomLayer:
    """A layer and one input, in float64: nine tokens, and eleven of an encoder where it has one."""

    weights: LayerWeights
    x: Tensor
    attention: QueryKey
    routing: Routing | None
    encoder: Encoder | None

    def streams(self, rows: Tensor, rule: Rule, value_bias: str = "token") -> dict[str, ScopeVectors]:
        given = (self.weights, self.x, self.attention, rows, rule, value_bias, self.routing, self.encoder)
        return {str(scope): stream for scope, stream in decompose(*given)}

    def maps(
        self,
        scopes: tuple[str, ...],
        backend: str = "torch",
        method: str = "direct",
        rows: Tensor | None = None,
        rule: Rule | None = None,
        small: bool = False,
        value_bias: str = "token",
        rotated: bool = False,
    ) -> Computed:
        rows = torch.arange(len(self.x)) if rows is None else rows
        keys = len(self.x) + (0 if self.encoder is None else len(self.encoder.states))
        active = 1 if self.routing is None else self.routing.index.shape[1]
        shape = LayerShape.from_weights(self.weights, len(rows), keys, len(rows) * keys, active)
        picked = self.weights.pick_scopes(scopes)
        chosen = BACKENDS[backend]
        options = EngineOptions(chosen, method, torch.float64, torch.device("cpu"))
        plan = plan_layer(0, shape, any(scope.needs_ff for scope in picked), options)
        plan = replace(plan, shape=replace(plan.shape, rotated=rotated))
        if small:  # blocks of a few queries and keys
            plan = replace(plan, blocks=Blocks(2, 4, plan.blocks.ff_keys if method in BY_QUERY else 4))
        wanted = LayerTask(self.weights, picked, rule or Rule(), value_bias, chosen, torch.float64)
        sequence = OneSequence(self.x, self.attention, rows, self.routing, self.encoder)
        maps, done = run_dense(wanted, sequence, plan)
        return Computed(maps, {str(scope): bias for scope, bias in done.bias.items()}, done.output, done.plan)


def layer(
    *,
    norms: str = "pre",
    gated: bool = True,
    experts: int = 0,
    active: int = 2,
    decoder: bool = False,
    clamp: Clamp | None = None,
    seed: int = 0,
    **more: Any,
) -> RandomLayer:
    """``norms``: "pre" (RMSNorm), "post" (LayerNorm) or "of" (on what blocks return, RMSNorm)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def linear(inputs: int, outputs: int, stack: bool = False) -> Linear:
        first = (experts,) if stack and experts else ()
        return Linear(random(*first, inputs, outputs) / inputs**0.5, random(*first, outputs))

    def norm() -> Norm:
        return (
            Norm("layer", random(WIDTH), random(WIDTH), 1e-6)
            if norms == "post"
            else Norm("rms", random(WIDTH), None, 1e-6)
        )

    places = {
        "pre": ("norm_before_attn", "norm_before_ff"),
        "post": ("norm_after_attn", "norm_after_ff"),
        "of": ("norm_of_attn", "norm_of_ff"),
    }[norms]
    cross = None
    if decoder:
        cross = CrossWeights(
            HEADS,
            HEADS,
            linear(WIDTH, HEADS * HEAD_DIM),
            linear(HEADS * HEAD_DIM, WIDTH),
            norm_after_attn=norm() if norms == "post" else None,
        )
    weights = LayerWeights(
        heads=HEADS,
        kv_heads=HEADS,
        value=linear(WIDTH, HEADS * HEAD_DIM),
        out=linear(HEADS * HEAD_DIM, WIDTH),
        branches=(
            Branch(
                up=linear(WIDTH, NEURONS, stack=True),
                gate=linear(WIDTH, NEURONS, stack=True) if gated else None,
                down=linear(NEURONS, WIDTH, stack=True),
                activation=ACTIVATIONS["silu"],
                clamp=clamp,
            ),
        ),
        cross=cross,
        **{place: norm() for place in places},
        **more,
    )
    routing = None
    if experts:
        index = torch.stack([torch.randperm(experts, generator=generator)[:active] for _ in range(TOKENS)])
        routing = Routing(index, torch.rand(TOKENS, active, generator=generator, dtype=torch.float64) + 0.1)
    query, key = random(2, HEADS, TOKENS, HEAD_DIM)
    attention = QueryKey(query, key, HEAD_DIM**-0.5, causal=decoder)
    encoder = None
    if decoder:
        states, keys = random(TOKENS + 2, WIDTH), random(HEADS, TOKENS + 2, HEAD_DIM)
        allowed = torch.ones(TOKENS + 2, dtype=torch.bool)
        allowed[4] = False
        encoder = Encoder(states, QueryKey(random(HEADS, TOKENS, HEAD_DIM), keys, HEAD_DIM**-0.5, allowed[None, None]))
    return RandomLayer(weights, random(TOKENS, WIDTH), attention, routing, encoder)
