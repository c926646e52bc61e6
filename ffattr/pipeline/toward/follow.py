"""One batch: the model is run, and its numbers are followed back through its layers, from the last to the first."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ...decomposition.adjoint.head import Head, pull_states
from ...decomposition.layer import edit_weights
from ...decomposition.precision import output_tolerance, without_autocast
from ...engine.query_pass import Slopes
from ...errors import UnsupportedModel
from ...models.heads import HeadSpec, list_final_norms, list_heads
from ...models.inputs.prepare import Inputs
from ..assemble import require_reproduced
from ..stack import Stack
from .gather import Gathered
from .question import Question
from .read_head import HeadReader, Row, read_row
from .records import Recorded, Records
from .walk_back import FlowAsked, Method, walk_back

__all__ = ["Follower"]

_AT_ONCE = 1 << 25
"""Numbers of the directions ``[K, T, d]`` that are followed at the same time."""


@dataclass
class _Way:
    """How far the numbers of one sequence have come: the ``directions`` ``[k, T, d]`` that read the boundary, the
    ``constant`` ``[k]`` so far, and the ``value`` ``[k]`` that all must add up to.

    ``states``: an encoder's, as the layers read them, and the directions ``[k, T', d]`` in which they have.
    """

    directions: Tensor
    constant: Tensor
    value: Tensor
    states: tuple[Tensor, Tensor] | None = None


class Follower:
    """Follows a question back through all stacks of layers, and hands on what it finds to ``gathered`` by stack."""

    def __init__(self, question: Question, gathered: Mapping[str, Gathered], check: bool) -> None:
        self.question, self.gathered, self.check = question, gathered, check
        self.columns: dict[int, list[tuple[int, int | None]] | None] = {}
        self.reads_whole = False
        self._reader: HeadReader | None = None
        self._final_norm: Head | None = None
        request = question.request
        engine = request.engine
        slopes = Slopes(request.rule, engine.backend.require_operators())
        self._method = Method(request.rule, request.options.value_bias, slopes.compute)

    def follow(self, batch: Sequence[int], inputs: Inputs) -> Iterator[None]:
        """Follows the numbers of the sequences ``batch``; yields after every layer of all of them."""
        question, request = self.question, self.question.request
        given, kept_logits = question.prepare_inputs(inputs, batch)
        records = Records(request, question.model, given, batch, self.check, request.options.memory_budget)
        for numbers in self._numbers:
            ways: dict[int, _Way] = {}
            for stack in reversed(request.stacks):
                for part in records.split_layers(stack):
                    records.load_layers(stack, part)
                    for layer in part:
                        with without_autocast():
                            if layer == len(stack.specs) - 1:
                                self._enter_stack(stack, batch, kept_logits, records, ways, numbers)
                            self._cross_layer(stack, layer, records, ways, numbers)
                        yield

    @property
    def layers(self) -> int:
        """How many layers are walked through in each batch."""
        return len(self._numbers) * sum(len(stack.specs) for stack in self.question.request.stacks)

    @cached_property
    def _numbers(self) -> list[slice]:
        """The ``K`` numbers in parts that are followed together."""
        stack, count = self.question.request.stacks[-1], self.question.count
        width = self.question.request.weights_of_layer(stack, 0).width
        at_once = max(1, _AT_ONCE // (width * int(stack.mask.sum(1).max())))
        return [slice(start, min(count, start + at_once)) for start in range(0, count, at_once)]

    def _enter_stack(
        self,
        stack: Stack,
        batch: Sequence[int],
        kept_logits: Mapping[int, int] | None,
        records: Records,
        ways: dict[int, _Way],
        numbers: slice,
    ) -> None:
        """Brings every sequence to the output of a stack's last layer."""
        for place, row in enumerate(batch):
            recorded = records.read_layer(stack, len(stack.specs) - 1, row)
            if stack is self.question.request.stacks[-1]:
                own = read_row(self.question, records.output, place, row, kept_logits, recorded.output)
                ways[row] = self._read_numbers(stack, own, numbers)
            else:
                ways[row] = self._enter_encoder(stack, row, recorded, ways[row], numbers)

    def _read_numbers(self, stack: Stack, of_row: Row, numbers: slice) -> _Way:
        """Reads the model's own numbers, and finds the directions that read its last hidden states."""
        answer = self._find_reader().read_numbers(of_row, numbers)
        self.columns[of_row.number], self.reads_whole = answer.columns, of_row.whole
        gathered, row, value = self.gathered[stack.name], of_row.number, answer.own[numbers]
        gathered.value[numbers, row] = value.to(gathered.value)
        scores = (answer.out.directions * of_row.hidden).sum(-1)
        cross = None
        if stack.encoder_mask is not None:
            cross = scores.new_zeros(len(scores), int(stack.encoder_mask[row].sum()))
        gathered.add_boundary(numbers, len(stack.specs), row, scores, answer.out.constant, cross, value)
        return _Way(answer.out.directions, answer.out.constant, value)

    def _enter_encoder(self, stack: Stack, row: int, recorded: Recorded, way: _Way, numbers: slice) -> _Way:
        """Goes from the states that a decoder has read to the encoder's last layer."""
        assert way.states is not None
        states, directions = way.states
        head = self._find_final_norm(recorded.output, states)
        _, pulled, constant = pull_states(head.each, recorded.output, directions, self.question.request.rule)
        value = (directions * states).sum((1, 2))
        gathered = self.gathered[stack.name]
        gathered.value[numbers, row] = value.to(gathered.value)
        scores = (pulled * recorded.output).sum(-1)
        gathered.add_boundary(numbers, len(stack.specs), row, scores, constant, None, value)
        return _Way(pulled, constant, value)

    def _cross_layer(
        self, stack: Stack, layer: int, records: Records, ways: Mapping[int, _Way], numbers: slice
    ) -> None:
        """Goes from the output of a layer to its input, with every sequence."""
        question, gathered = self.question, self.gathered[stack.name]
        reads_encoder = stack.encoder_mask is not None and len(question.request.stacks) > 1
        if layer < min(question.layers[stack.name]) and not reads_encoder:  # nobody asks for what lies there
            return
        own = question.request.weights_of_layer(stack, layer)
        for row, way in ways.items():
            recorded, flow = records.read_layer(stack, layer, row), None
            weights = edit_weights(own, recorded.edits)
            if question.flow:
                take = functools.partial(gathered.add_flow, numbers, layer, row)
                flow = FlowAsked(stack.scopes[0].point, question.flow == "heads", take)
            boundary = walk_back(weights, recorded, way.directions, self._method, flow)
            if self.check:
                given = (boundary.error, recorded.tolerance, recorded.changed)
                require_reproduced(question.request, stack, layer, row, *given)
            way.directions, way.constant = boundary.directions, way.constant + boundary.constant
            cross = None
            if recorded.sequence.encoder is not None and boundary.states is not None:
                states = recorded.sequence.encoder.states
                reads = boundary.states if way.states is None else way.states[1] + boundary.states
                way.states = states, reads
                cross = (reads * states).sum(-1)
            gathered.add_boundary(numbers, layer, row, boundary.scores, way.constant, cross, way.value)

    def _find_reader(self) -> HeadReader:
        if self._reader is None:
            question, base = self.question, self.question.request.description.base
            directed = (HeadSpec(each) for each in list_final_norms(base))
            self._reader = HeadReader(question, directed if question.directed else list_heads(question.head, base))
        return self._reader

    def _find_final_norm(self, hidden: Tensor, states: Tensor) -> Head:
        """Returns what an encoder does to the output of its last layer, told by the states that its decoder reads."""
        if self._final_norm is not None:
            return self._final_norm
        none, rule = hidden.new_zeros(0, *hidden.shape), self.question.request.rule
        tolerance = output_tolerance(hidden.dtype, hidden.dtype, True)
        for each in list_final_norms(self.question.request.description.base):
            try:
                head = HeadSpec(each).weights(hidden.dtype)
                found, _, _ = pull_states(head.each, hidden, none, rule)
            except (UnsupportedModel, RuntimeError):  # of another width
                continue
            if found.shape == states.shape and float((found - states).norm()) <= tolerance * float(states.norm()):
                self._final_norm = head
                return head
        raise UnsupportedModel(
            f"what {type(self.question.head).__name__} does with the output of its encoder's last layer is not known; "
            'pass scope="decoder.layer" to follow numbers through the decoder alone'
        )
