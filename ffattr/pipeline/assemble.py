"""Turns the records of a forward pass into the result: packs of sequences, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..decomposition.attention import LayerRecord
from ..decomposition.layer import edit_weights
from ..decomposition.precision import find_narrowest, output_tolerance
from ..decomposition.reference import Encoder
from ..decomposition.scopes import Scope, Source
from ..decomposition.sketch import Sketch
from ..engine.layer_maps import LayerTask
from ..engine.pack import OneSequence, Pack, concatenate
from ..engine.planning.costs import LayerShape
from ..engine.planning.plan import Plan
from ..engine.run import LayerResult, project_layer, run_layer
from ..errors import ArchitectureMismatch, UnsupportedModel
from ..results import Attribution
from ..results.contents import SHARED
from ..results.keep import Keep
from ..results.kept.policy import Sink
from ..results.serialise import to_parts
from .request import Request
from .stack import Stack

__all__ = ["CapturedSequence", "ResultBuilder", "find_errors", "layer_tolerance", "require_reproduced"]


class ResultBuilder:
    """The results of one stack of layers, filled layer by layer."""

    def __init__(self, request: Request, stack: Stack, keep: Keep, arguments: dict[str, Any], check: bool) -> None:
        self.request, self.stack, self.check = request, stack, check
        engine = request.engine
        self.plan = Plan(engine.backend.name, engine.matmul_dtype, engine.device, reduction=request.options.reduce)
        rows = (len(stack.layers), len(stack.mask), len(stack.queries))
        self.bias = {scope: self._zeros(rows) for scope in stack.scopes}
        self.error = self._zeros(rows[:2])
        self.sketch_error: dict[Scope, Tensor] = {}
        if isinstance(engine.method, Sketch):
            pairwise = stack.specs[0].pairwise_scopes
            sketched = [scope for scope in stack.scopes if scope.seen_from("own") in pairwise]
            self.sketch_error = {scope: self._zeros(rows[:2]) for scope in sketched}
        self.arguments = arguments
        networks_per_token = max(spec.networks_per_token for spec in stack.specs)
        mixture = any(spec.experts is not None for spec in stack.specs)
        self.experts = torch.full((*rows, networks_per_token), -1, device=stack.mask.device) if mixture else None
        self.shares = self._zeros((*rows, networks_per_token)) if mixture else None
        self.scopes: dict[Source, tuple[Scope, ...]] = {}
        self.sinks: dict[Source, Sink] = {}
        sources: tuple[Source, ...] = ("own", "cross")
        for source in sources:
            scopes = tuple(scope for scope in stack.scopes if scope.source == source)
            if scopes:
                shapes = {scope.name: stack.map_shape(scope) for scope in scopes}
                numbers = [stack.first + layer for layer in stack.model_layers]
                self.scopes[source] = scopes
                self.sinks[source] = keep.open(shapes, request.dtype, stack.mask.device, numbers, stack.queries)

    def add_layer(self, captured: LayerRecord, batch: Sequence[int]) -> None:
        """Compute and keep the maps of a layer that has just run on the sequences ``batch``."""
        request, stack, engine = self.request, self.stack, self.request.engine
        layer = captured.index - stack.first
        weights = edit_weights(request.weights_of_layer(stack, layer), captured.edits)
        # A dense layer among mixtures has no scope per expert.
        scopes = [scope for scope in stack.scopes if weights.mixture or scope.axis != "expert"]
        recall = request.recall_of_layer(stack, layer, as_read=not captured.edits)
        options = request.options
        given = (request.rule, options.value_bias, engine.backend, engine.matmul_dtype, recall, options.reduce)
        task = LayerTask(weights, scopes, *given)
        for together in request.group_into_packs(stack, layer, weights, batch):
            captives = [CapturedSequence.from_record(request, stack, captured, row, batch[row]) for row in together]
            pack = Pack(tuple(one.sequence for one in captives))
            shapes = [request.shape_of_layer(stack, layer, weights, one.batch, one.sequence.pairs) for one in captives]
            joined = replace(LayerShape.join(shapes), expert_sets=pack.expert_sets)

            def take(
                number: int, queries: Tensor, found: dict[Scope, Tensor], captives: list[CapturedSequence] = captives
            ) -> None:
                for place in stack.result_layers(layer):
                    self._keep_rows(captives[number], place, queries, found)

            plan = request.plan_layer(stack, layer, weights, joined)
            if options.toward is None:
                result = run_layer(task, pack, plan, take)
                self.plan.layers.append(result.plan)
            else:
                result = project_layer(task, pack, plan, options.toward, take)
            self._keep_numbers(captured, captives, result)
            for one in captives:
                self._finish_sequence(captured, one, result)
            self._check_errors(captured, [one.batch for one in captives])

    def results(self) -> dict[str, Attribution]:
        """The results by the name of the stack, and "cross" for the maps whose keys are the encoder's tokens."""
        stack = self.stack
        found = {}
        for source, sink in self.sinks.items():
            cross, scopes = source == "cross", self.scopes[source]
            result = Attribution(
                kept=sink.finish(),
                bias={scope.name: self.bias[scope] for scope in scopes},
                sketch_error={s.name: self.sketch_error[s] for s in scopes if s in self.sketch_error},
                tokens=stack.tokens,
                labels=stack.labels,
                layers=stack.model_layers,
                queries=stack.queries,
                scopes=tuple(scope.name for scope in scopes),
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
            found["cross" if cross else stack.name] = result
        return found

    def discard(self) -> None:
        """Leave nothing behind of a run that ended early."""
        for sink in self.sinks.values():
            sink.discard_file()

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self.request.dtype, device=self.stack.mask.device)

    def _keep_rows(self, one: CapturedSequence, place: int, queries: Tensor, found: Mapping[Scope, Tensor]) -> None:
        for source, sink in self.sinks.items():
            keys = one.encoder_positions if source == "cross" else one.columns
            tiles = {scope.name: found[scope] for scope in self.scopes[source] if scope in found}
            if tiles:
                sink.add_rows(place, one.batch, one.result_rows[queries.to(one.result_rows.device)], keys, tiles)

    def _keep_numbers(self, captured: LayerRecord, captives: list[CapturedSequence], result: LayerResult) -> None:
        """The biases and errors of a pack."""
        batch = torch.tensor([one.batch for one in captives], device=self.error.device)
        counts = torch.tensor([len(one.result_rows) for one in captives], device=self.error.device)
        rows = concatenate([one.result_rows for one in captives])
        errors = find_errors([one.output for one in captives], result.output).to(self.error.device)
        for place in self.stack.result_layers(captured.index - self.stack.first):
            for scope, bias in result.bias.items():
                self.bias[scope][place, batch.repeat_interleave(counts), rows] = bias.to(self.error.device)
            self.error[place, batch] = errors

    def _finish_sequence(self, captured: LayerRecord, one: CapturedSequence, result: LayerResult) -> None:
        """What else does not go by pairs, of one sequence."""
        layer, rows = captured.index - self.stack.first, one.result_rows
        routing = one.sequence.routing
        for place in self.stack.result_layers(layer):
            for scope, estimates in self.sketch_error.items():
                estimates[place, one.batch] = result.sketch_error.get(scope.seen_from("own"), 0.0)
            if routing is not None and self.experts is not None and self.shares is not None:
                chosen, active = routing.of(one.sequence.query_tokens), routing.index.shape[1]
                self.experts[place, one.batch, rows, :active] = chosen.index.to(self.experts.device)
                self.shares[place, one.batch, rows, :active] = chosen.weight.to(self.shares)
                if self.stack.specs[layer].shared is not None:
                    gain = torch.ones(len(rows)) if chosen.gain is None else chosen.gain
                    self.experts[place, one.batch, rows, active] = SHARED
                    self.shares[place, one.batch, rows, active] = gain.to(self.shares)
        # Of the sequence alone: rows of padding may look anywhere.
        self.arguments["causal"] = self.arguments.get("causal", True) and not one.sequence.attention.looks_ahead

    def _check_errors(self, captured: LayerRecord, batch: list[int]) -> None:
        request, stack = self.request, self.stack
        layer = captured.index - stack.first
        errors = self.error[stack.result_layers(layer)[0]].tolist()
        tolerance = layer_tolerance(stack, captured, request.dtype)
        for row in batch if self.check else ():
            require_reproduced(request, stack, layer, row, errors[row], tolerance, captured.changed)


@dataclass(frozen=True)
class CapturedSequence:
    """One batch row of one captured layer without its padding, in the dtype of the result, and its place there.

    ``token_positions`` are those of the tokens in the padded input, ``result_rows`` the rows of the maps that the
    queries fill, ``columns`` those of the keys or groups of them and ``encoder_positions`` those of the encoder's
    tokens of sequence ``batch``. These are on the device of the result and all else where the layer is: a model may lie
    on several. ``output`` ``[n, d]`` is the model's own.
    """

    batch: int
    token_positions: Tensor
    result_rows: Tensor
    columns: Tensor
    encoder_positions: Tensor
    sequence: OneSequence
    output: Tensor

    @classmethod
    def from_record(
        cls, request: Request, stack: Stack, captured: LayerRecord, row: int, batch: int
    ) -> CapturedSequence:
        """Row ``row`` of what was captured, which is sequence ``batch`` of the input."""
        device = captured.output.device  # its input may have come from the device of the layer before
        positions, query_tokens, result_rows = stack.index_sequence(batch)
        tokens, query_tokens = positions.to(device), query_tokens.to(device)
        x = captured.input[row].to(device).index_select(0, tokens).to(request.dtype)
        output = captured.output[row].index_select(0, tokens[query_tokens]).to(request.dtype)
        attention = captured.attention.sequence(row, tokens, request.dtype)
        routing = encoder = groups = None
        if captured.routing is not None:
            first = row * captured.input.shape[1]  # of all sequences one after the other
            routing = captured.routing.to(device, request.dtype).of(tokens + first)
        encoder_positions = stack.encoder_positions(batch)
        if captured.cross is not None and captured.states is not None and encoder_positions is not None:
            keys = encoder_positions.to(device)
            states = captured.states[row].to(device).index_select(0, keys).to(request.dtype)
            encoder = Encoder(states, captured.cross.sequence(row, tokens, request.dtype, keys))
        columns = positions
        if stack.groups is not None:
            asked = stack.groups.index[batch][positions]
            columns = asked[asked >= 0].unique()  # sorted
            groups = torch.where(asked >= 0, torch.searchsorted(columns, asked), -1).to(device)
        sequence = OneSequence(x, attention, query_tokens, routing, encoder, groups)
        across = positions if encoder_positions is None else encoder_positions
        return cls(batch, positions, result_rows, columns, across, sequence, output)


def find_errors(outputs: list[Tensor], recomputed: Tensor) -> Tensor:
    """Largest relative difference of a token's recomputed and recorded layer output, of every sequence of a pack.

    ``outputs`` ``[n, d]`` are those of the sequences, ``recomputed`` ``[N, d]`` those of all one after the other.
    """
    own = concatenate(outputs)
    scale = own.norm(dim=-1).clamp_min(torch.finfo(own.dtype).tiny)
    of_tokens = ((recomputed - own).norm(dim=-1) / scale).split([len(output) for output in outputs])
    return torch.stack([part.max() if len(part) else part.new_zeros(()) for part in of_tokens])


def require_reproduced(
    request: Request,
    stack: Stack,
    layer: int,
    row: int,
    error: float,
    tolerance: float,
    changed: Sequence[str] = (),
) -> None:
    """Raises `ArchitectureMismatch` where a layer's recomputed output of a sequence is off by more than rounding, and
    `UnsupportedModel` where hooks of the user have ``changed`` something inside the layer."""
    if not error <= tolerance and changed:
        raise UnsupportedModel(
            f"{stack.label_layer(layer)}, batch row {row}: {'; '.join(changed)}, by other than scaling "
            "and shifting each feature or taking directions out, every token's alike (a single token does not tell, "
            "two tell a shift, three a factor or a direction). The recomputed output differs by "
            f"{error:.1e} (relative) for it. Remove the hook for this call, or let it change the output of the whole "
            "layer, which may change in any way."
        )
    if not error <= tolerance:
        raise ArchitectureMismatch(
            f"{stack.label_layer(layer)}, batch row {row}: the recomputed output differs from the model's by "
            f"{error:.1e} (relative), more than rounding explains. The {request.description.family!r} adapter does not "
            "describe this layer; see ffattr.register_adapter. (check=False goes on at your own risk.)"
        )


def layer_tolerance(stack: Stack, captured: LayerRecord, dtype: torch.dtype) -> float:
    """The largest relative error of a layer's output, recomputed in ``dtype``, that rounding explains."""
    attentions = [part for part in (captured.attention, captured.cross) if part is not None]
    spec = stack.specs[captured.index - stack.first]
    single = spec.rounds_to_float32 or any(part.rounds_to_float32 for part in attentions)
    own = find_narrowest((captured.output.dtype, captured.computed, spec.narrowest_dtype))
    return output_tolerance(captured.output.dtype if own is None else own, dtype, single)
