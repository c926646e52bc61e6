"""From the records of a forward pass to the result: sequence by sequence, without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import engine
from .attention import Attention, LayerRecord
from .dtypes import output_tolerance
from .errors import ArchitectureMismatch
from .experts import Routing
from .layer import CROSS
from .maps import Attribution
from .plan import Plan
from .reference import Encoder
from .request import Request, Stack

__all__ = ["Collector", "OneSequence", "shape_of", "tolerance"]


class Collector:
    """The results of one stack of layers, filled layer by layer."""

    def __init__(self, request: Request, stack: Stack, arguments: dict[str, Any], check: bool) -> None:
        self.request, self.stack, self.check = request, stack, check
        self.plan = Plan(request.backend.name, request.wide_dtype, request.device)
        rows = (len(stack.layers), len(stack.mask), len(stack.queries))
        self.maps = {name: _empty(request, shape_of(stack, name)) for name in stack.scopes}
        self.bias = {name: _empty(request, rows) for name in stack.scopes}
        self.error = _empty(request, rows[:2])
        self.arguments = arguments
        active = max(spec.active for spec in stack.specs)
        mixture = any(spec.experts is not None for spec in stack.specs)
        self.experts = torch.full((*rows, active), -1, device=stack.mask.device) if mixture else None
        self.shares = _empty(request, (*rows, active)) if mixture else None

    def add(self, captured: LayerRecord) -> None:
        """Compute and keep the maps of a layer that has just run."""
        request, stack = self.request, self.stack
        layer = captured.index - stack.first
        weights = stack.specs[layer].weights(request.dtype)
        places = stack.places(layer)
        # A dense layer among mixtures has no scope told apart by expert.
        scopes = [name for name in stack.scopes if weights.mixture or not name.endswith(weights.expert_scope)]
        for batch in range(len(stack.mask)):
            sequence = OneSequence.of(request, stack, captured, batch)
            # Of the sequence alone: rows of padding may look anywhere.
            self.arguments["causal"] = self.arguments.get("causal", True) and not sequence.attention.looks_ahead
            plan = request.plan(stack, layer, weights, len(sequence.rows), sequence.keys, sequence.pairs, sequence.sets)
            done = engine.layer_maps(
                weights,
                sequence.x,
                sequence.attention,
                sequence.rows,
                scopes,
                request.rule,
                request.value_bias,
                request.backend,
                plan,
                sequence.routing,
                sequence.encoder,
            )
            self.plan.layers.append(done.plan)
            error = sequence.error(done.output)
            for at in places:
                for name in scopes:
                    sequence.fill(self.maps[name][at, batch], done.maps[name], name)
                    self.bias[name][at, batch, sequence.filled] = done.bias[name].to(self.error.device)
                self.error[at, batch] = error
                if sequence.routing is not None and self.experts is not None and self.shares is not None:
                    chosen = sequence.routing.of(sequence.rows)
                    self.experts[at, batch, sequence.filled] = chosen.index.to(self.experts.device)
                    self.shares[at, batch, sequence.filled] = chosen.weight.to(self.shares)
            if self.check:
                self._check_error(captured, batch, float(error))

    def results(self) -> dict[str, Attribution]:
        """By the name of the stack, and "cross" for the maps whose keys are the encoder's tokens."""
        stack = self.stack
        own = tuple(name for name in stack.scopes if not name.startswith(CROSS))
        cross = tuple(name for name in stack.scopes if name.startswith(CROSS))
        found = {}
        for name, scopes in ((stack.name, own), (CROSS.rstrip("."), cross)):
            if not scopes:
                continue
            short = {scope: scope.removeprefix(CROSS) for scope in scopes}
            found[name] = Attribution(
                maps={short[scope]: self.maps[scope] for scope in scopes},
                bias={short[scope]: self.bias[scope] for scope in scopes},
                tokens=stack.tokens,
                layers=stack.layers,
                queries=stack.queries,
                scopes=tuple(short.values()),
                mask=stack.mask,
                error=self.error,
                plan=self.plan,
                arguments=self.arguments if scopes is own else {**self.arguments, "causal": False},
                experts=self.experts,
                shares=self.shares,
            )
            if scopes is cross:
                found[name] = replace(found[name], key_tokens=stack.encoder_tokens, key_mask=stack.encoder_mask)
        return found

    def _check_error(self, captured: LayerRecord, batch: int, error: float) -> None:
        request, stack = self.request, self.stack
        layer = captured.index - stack.first
        if not error <= tolerance(stack, captured, request.dtype):
            raise ArchitectureMismatch(
                f"{stack.label(layer)}, batch row {batch}: the recomputed output differs from the model's by "
                f"{error:.1e} (relative), more than rounding explains. The {request.adapted.family!r} adapter does not "
                "describe this layer; see ffattr.register_adapter. (check=False goes on at your own risk.)"
            )


@dataclass(frozen=True)
class OneSequence:
    """One batch row of one captured layer without its padding, in the dtype of the result.

    ``places`` are the ``tokens``, ``filled`` the queries and ``encoder_places`` the encoder's tokens of the padded
    input. These are on the device of the result and all else where the layer is: a model may lie on several.
    """

    places: Tensor
    filled: Tensor
    encoder_places: Tensor | None
    rows: Tensor
    x: Tensor
    output: Tensor
    attention: Attention
    routing: Routing | None
    encoder: Encoder | None

    @classmethod
    def of(cls, request: Request, stack: Stack, captured: LayerRecord, batch: int) -> OneSequence:
        device = captured.output.device  # its input may have come from the device of the layer before
        places, rows, filled = stack.sequence(batch)
        tokens, rows = places.to(device), rows.to(device)
        x = captured.input[batch].to(device).index_select(0, tokens).to(request.dtype)
        output = captured.output[batch].index_select(0, tokens[rows]).to(request.dtype)
        attention = captured.attention.sequence(batch, tokens, request.dtype)
        routing = encoder = None
        if captured.routing is not None:
            first = batch * captured.input.shape[1]  # of all sequences one after the other
            whole = Routing(captured.routing.index.to(device), captured.routing.weight.to(device, request.dtype))
            routing = whole.of(tokens + first)
        keys = stack.keys(batch)
        if captured.cross is not None and captured.states is not None and keys is not None:
            at = keys.to(device)
            states = captured.states[batch].to(device).index_select(0, at).to(request.dtype)
            encoder = Encoder(states, captured.cross.sequence(batch, tokens, request.dtype, at))
        return cls(places, filled, keys, rows, x, output, attention, routing, encoder)

    @property
    def keys(self) -> int:
        """How many tokens are keys, the encoder's included."""
        return len(self.x) + (0 if self.encoder is None else len(self.encoder.states))

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs are not masked."""
        across = 0 if self.encoder is None else self.encoder.attention.pairs(self.rows)
        return self.attention.pairs(self.rows) + across

    @property
    def sets(self) -> int:
        """How many different sets of experts the queries go to."""
        return 1 if self.routing is None else len(self.routing.of(self.rows).by_set())

    def fill(self, to: Tensor, tile: Tensor, scope: str) -> None:
        """Spread a map ``[..., n, t]`` of the real tokens over the padded one ``[..., N, T]``."""
        if tile.shape == to.shape:
            to.copy_(tile)
            return
        keys = self.encoder_places if scope.startswith(CROSS) else self.places
        assert keys is not None
        to[..., self.filled[:, None], keys] = tile.to(to.device)

    def error(self, recomputed: Tensor) -> Tensor:
        """Largest relative difference of a token's recomputed and recorded layer output."""
        if len(self.rows) == 0:
            return self.output.new_zeros(())
        scale = self.output.norm(dim=-1).clamp_min(torch.finfo(self.output.dtype).tiny)
        difference: Tensor = (recomputed - self.output).norm(dim=-1) / scale
        return difference.max()


def tolerance(stack: Stack, captured: LayerRecord, dtype: torch.dtype) -> float:
    """The largest relative error of a layer's output, recomputed in ``dtype``, that rounding explains."""
    attentions = [part for part in (captured.attention, captured.cross) if part is not None]
    single = stack.specs[captured.index - stack.first].single or any(part.single for part in attentions)
    return output_tolerance(captured.output.dtype, dtype, single)


def shape_of(stack: Stack, scope: str) -> tuple[int, ...]:
    """Of the maps of a scope, ``[L, B, N, T]``, with an axis before the last two for heads or experts."""
    keys = stack.encoder_mask if scope.startswith(CROSS) else stack.mask
    assert keys is not None
    shape = [len(stack.layers), len(stack.mask), len(stack.queries), keys.shape[1]]
    spec = stack.specs[0]
    if scope.endswith("attn_heads"):
        shape.insert(2, spec.cross.heads if scope.startswith(CROSS) and spec.cross is not None else spec.heads)
    elif scope.removeprefix(CROSS) == spec.expert_scope:
        shape.insert(2, max(spec.active for spec in stack.specs))
    return tuple(shape)


def _empty(request: Request, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=request.dtype, device=request.inputs.mask.device)
