"""From the records of a forward pass to the result: packs of sequences, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..decomposition.attention import LayerRecord
from ..decomposition.precision import output_tolerance
from ..decomposition.reference import Encoder
from ..decomposition.routing import Routing
from ..decomposition.scopes import CROSS
from ..decomposition.sketch import Sketch
from ..engine import run as engine
from ..engine.layer_maps import Layer
from ..engine.pack import OneSequence, Pack
from ..engine.plan import LayerShape, Plan
from ..errors import ArchitectureMismatch
from ..results import Attribution
from ..results.keep import Keep
from ..results.kept.policy import Sink
from ..results.serialise import to_parts
from .request import Request, Stack

__all__ = ["Collector", "Placed", "shape_of", "tolerance"]


class Collector:
    """The results of one stack of layers, filled layer by layer."""

    def __init__(self, request: Request, stack: Stack, keep: Keep, arguments: dict[str, Any], check: bool) -> None:
        self.request, self.stack, self.check = request, stack, check
        self.plan = Plan(request.backend.name, request.wide_dtype, request.device)
        rows = (len(stack.layers), len(stack.mask), len(stack.queries))
        self.bias = {name: _empty(request, rows) for name in stack.scopes}
        self.error = _empty(request, rows[:2])
        self.sketch_error: dict[str, Tensor] = {}
        if isinstance(request.method, Sketch):
            wide = stack.specs[0].wide_scopes
            sketched = [name for name in stack.scopes if _bare(name) in wide]
            self.sketch_error = {name: _empty(request, rows[:2]) for name in sketched}
        self.arguments = arguments
        active = max(spec.active for spec in stack.specs)
        mixture = any(spec.experts is not None for spec in stack.specs)
        self.experts = torch.full((*rows, active), -1, device=stack.mask.device) if mixture else None
        self.shares = _empty(request, (*rows, active)) if mixture else None
        own = tuple(name for name in stack.scopes if not name.startswith(CROSS))
        cross = tuple(name for name in stack.scopes if name.startswith(CROSS))
        self.sinks: dict[tuple[str, ...], Sink] = {}  # those of a kind of keys together
        for scopes in (own, cross):
            if scopes:
                shapes = {_bare(name): shape_of(stack, name) for name in scopes}
                device = request.inputs.mask.device
                numbers = [stack.first + layer for layer in stack.layers]
                self.sinks[scopes] = keep.open(shapes, request.dtype, device, numbers, stack.queries)

    def add(self, captured: LayerRecord, batch: Sequence[int]) -> None:
        """Compute and keep the maps of a layer that has just run on the sequences ``batch``."""
        request, stack = self.request, self.stack
        layer = captured.index - stack.first
        weights = stack.specs[layer].weights(request.dtype)
        # A dense layer among mixtures has no scope told apart by expert.
        scopes = [name for name in stack.scopes if weights.mixture or not name.endswith(weights.expert_scope)]
        wanted = Layer(weights, scopes, request.rule, request.value_bias, request.backend, request.wide_dtype)
        for together in request.packs(stack, layer, weights, batch):
            placed = [Placed.of(request, stack, captured, place, batch[place]) for place in together]
            pack = Pack(tuple(one.sequence for one in placed))
            shapes = [request.shape(stack, layer, weights, one.batch, one.sequence.pairs) for one in placed]
            plan = request.plan(stack, layer, weights, replace(LayerShape.joined(shapes), sets=pack.sets))

            def emit(number: int, rows: Tensor, found: dict[str, Tensor], placed: list[Placed] = placed) -> None:
                for at in stack.places(layer):
                    self._keep(placed[number], at, rows, found)

            done = engine.run(wanted, pack, plan, emit)
            self.plan.layers.append(done.plan)
            for number, one in enumerate(placed):
                self._finish(captured, one, done, slice(*pack.query_starts[number : number + 2]))
            self._check_errors(captured, [one.batch for one in placed])

    def results(self) -> dict[str, Attribution]:
        """By the name of the stack, and "cross" for the maps whose keys are the encoder's tokens."""
        stack = self.stack
        found = {}
        for scopes, sink in self.sinks.items():
            cross = scopes[0].startswith(CROSS)
            result = Attribution(
                kept=sink.finish(),
                bias={_bare(scope): self.bias[scope] for scope in scopes},
                sketch_error={_bare(s): self.sketch_error[s] for s in scopes if s in self.sketch_error},
                tokens=stack.tokens,
                layers=stack.layers,
                queries=stack.queries,
                scopes=tuple(map(_bare, scopes)),
                mask=stack.mask,
                error=self.error,
                plan=self.plan,
                arguments={**self.arguments, "causal": False} if cross or stack.groups is not None else self.arguments,
                experts=self.experts,
                shares=self.shares,
            )
            if cross:
                result = replace(result, key_tokens=stack.encoder_tokens, key_mask=stack.encoder_mask)
            elif stack.groups is not None:
                result = replace(
                    result, key_tokens=stack.groups.texts, key_mask=stack.groups.mask, groups=stack.groups.index
                )
            sink.seal_file(*to_parts(result))
            found[CROSS.rstrip(".") if cross else stack.name] = result
        return found

    def discard(self) -> None:
        """Leave nothing behind of a run that ended early."""
        for sink in self.sinks.values():
            sink.discard_file()

    def _keep(self, one: Placed, at: int, rows: Tensor, found: dict[str, Tensor]) -> None:
        for scopes, sink in self.sinks.items():
            keys = one.encoder_places if scopes[0].startswith(CROSS) else one.columns
            tiles = {_bare(name): found[name] for name in scopes if name in found}
            if tiles:
                sink.add_rows(at, one.batch, one.filled[rows.to(one.filled.device)], keys, tiles)

    def _finish(self, captured: LayerRecord, one: Placed, done: engine.Done, queries: slice) -> None:
        """What does not go by pairs, of one sequence: ``queries`` of the pack's."""
        layer = captured.index - self.stack.first
        error = one.error(done.output[queries])
        routing = one.sequence.routing
        for at in self.stack.places(layer):
            for name, bias in done.bias.items():
                self.bias[name][at, one.batch, one.filled] = bias[queries].to(self.error.device)
            self.error[at, one.batch] = error
            for name, estimates in self.sketch_error.items():
                estimates[at, one.batch] = done.sketch_error.get(_bare(name), 0.0)
            if routing is not None and self.experts is not None and self.shares is not None:
                chosen = routing.of(one.sequence.rows)
                self.experts[at, one.batch, one.filled] = chosen.index.to(self.experts.device)
                self.shares[at, one.batch, one.filled] = chosen.weight.to(self.shares)
        # Of the sequence alone: rows of padding may look anywhere.
        self.arguments["causal"] = self.arguments.get("causal", True) and not one.sequence.attention.looks_ahead

    def _check_errors(self, captured: LayerRecord, batch: list[int]) -> None:
        request, stack = self.request, self.stack
        layer = captured.index - stack.first
        errors = self.error[stack.places(layer)[0]].tolist()
        for row in batch if self.check else ():
            if not errors[row] <= tolerance(stack, captured, request.dtype):
                raise ArchitectureMismatch(
                    f"{stack.label(layer)}, batch row {row}: the recomputed output differs from the model's by "
                    f"{errors[row]:.1e} (relative), more than rounding explains. The {request.adapted.family!r} "
                    "adapter does not describe this layer; see ffattr.register_adapter. (check=False goes on at your "
                    "own risk.)"
                )


@dataclass(frozen=True)
class Placed:
    """One batch row of one captured layer without its padding, in the dtype of the result, and its place there.

    ``places`` are the tokens, ``filled`` the queries, ``columns`` the keys or groups of them and ``encoder_places`` the
    encoder's tokens of sequence ``batch`` of the padded input. These are on the device of the result and all else where
    the layer is: a model may lie on several. ``output`` ``[n, d]`` is the model's own.
    """

    batch: int
    places: Tensor
    filled: Tensor
    columns: Tensor
    encoder_places: Tensor
    sequence: OneSequence
    output: Tensor

    @classmethod
    def of(cls, request: Request, stack: Stack, captured: LayerRecord, row: int, batch: int) -> Placed:
        """Row ``row`` of what was captured, which is sequence ``batch`` of the input."""
        device = captured.output.device  # its input may have come from the device of the layer before
        places, rows, filled = stack.sequence(batch)
        tokens, rows = places.to(device), rows.to(device)
        x = captured.input[row].to(device).index_select(0, tokens).to(request.dtype)
        output = captured.output[row].index_select(0, tokens[rows]).to(request.dtype)
        attention = captured.attention.sequence(row, tokens, request.dtype)
        routing = encoder = groups = None
        if captured.routing is not None:
            first = row * captured.input.shape[1]  # of all sequences one after the other
            whole = Routing(captured.routing.index.to(device), captured.routing.weight.to(device, request.dtype))
            routing = whole.of(tokens + first)
        keys = stack.keys(batch)
        if captured.cross is not None and captured.states is not None and keys is not None:
            at = keys.to(device)
            states = captured.states[row].to(device).index_select(0, at).to(request.dtype)
            encoder = Encoder(states, captured.cross.sequence(row, tokens, request.dtype, at))
        columns = places
        if stack.groups is not None:
            asked = stack.groups.index[batch][places]
            columns = asked[asked >= 0].unique()  # sorted
            groups = torch.where(asked >= 0, torch.searchsorted(columns, asked), -1).to(device)
        sequence = OneSequence(x, attention, rows, routing, encoder, groups)
        return cls(batch, places, filled, columns, places if keys is None else keys, sequence, output)

    def error(self, recomputed: Tensor) -> Tensor:
        """Largest relative difference of a token's recomputed and recorded layer output."""
        if len(self.output) == 0:
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
    keys = stack.encoder_mask if scope.startswith(CROSS) else stack.mask if stack.groups is None else stack.groups.mask
    assert keys is not None
    shape = [len(stack.layers), len(stack.mask), len(stack.queries), keys.shape[1]]
    spec = stack.specs[0]
    if scope.endswith("attn_heads"):
        shape.insert(2, spec.cross.heads if scope.startswith(CROSS) and spec.cross is not None else spec.heads)
    elif scope.removeprefix(CROSS) == spec.expert_scope:
        shape.insert(2, max(spec.active for spec in stack.specs))
    return tuple(shape)


def _bare(scope: str) -> str:
    return scope.removeprefix(CROSS)


def _empty(request: Request, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=request.dtype, device=request.inputs.mask.device)
