"""The model's own numbers, and the head by which they follow from its last hidden states.

What a head may be is data (`ffattr.models.heads`); which of it is the model's own is told by the numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...decomposition.adjoint.head import Head, ReadOut, Reads, read_out
from ...decomposition.precision import output_tolerance
from ...errors import NonFiniteError, UnsupportedModel
from ...models.capture.run import read_hidden_states
from ...models.families.heads import Reading
from ...models.heads import HeadSpec
from .question import Question
from .targets import Column

__all__ = ["Answer", "HeadReader", "Row", "read_row"]

_COMPARED = 64
"""About how many of its numbers a head is told by, beside those that are asked for."""


@dataclass(frozen=True)
class Row:
    """Sequence ``number``: its last ``hidden`` states ``[T, d]`` as its last layer gave them, and what the model made
    of them.

    ``own`` is that of its tokens that are read, ``[P, C]`` (logits or hidden states), or ``[1, C]`` of the ``whole``.
    ``following`` ``[P]`` are the ids of the tokens after these, -1: there is none. Recomputed numbers differ from it by
    no more than ``tolerance``, relative to how large they might be.
    """

    number: int
    hidden: Tensor
    own: Tensor
    whole: bool
    following: Sequence[int]
    tolerance: float


@dataclass(frozen=True)
class Answer:
    """The numbers ``[K]`` as the model gave them, the columns that they are of (None: of directions), and how some of
    them follow from its last hidden states."""

    own: Tensor
    columns: list[tuple[int, int | None]] | None
    out: ReadOut


def read_row(
    question: Question, output: Any, place: int, number: int, kept: Mapping[int, int] | None, hidden: Tensor
) -> Row:
    """What the model made of one sequence, entry ``place`` of what it returned, where it is read.

    ``kept``: which of its logits are of which position, None: there are all. Raises NonFiniteError, and ValueError for
    a position where the model reads its whole input.
    """
    found = output.logits if hasattr(output, "logits") else read_hidden_states(output)
    if found.dim() == 3 and not question.request.description.batch_first:
        found = found.transpose(0, 1)
    if question.directed and found.dim() == 2:  # a single sequence without an axis of sequences
        found = found[None]
    own, following = found[place].to(hidden), [-1]
    whole = own.dim() == 1
    if question.positions == "mean":
        own = own[question.request.stacks[-1].mask[number].to(own.device)].mean(0, keepdim=True)
    elif not whole:
        places = question.locate(number)
        own = own[places if kept is None else [kept[one] for one in places]]
        following = question.find_following(number)
    elif question.is_default:
        own = own[None]
    else:
        raise ValueError(f"{type(question.head).__name__} reads its whole input, no position; leave position= out")
    if not own.isfinite().all():
        raise NonFiniteError(f"the model's own output of sequence {number} is NaN or infinite where it is read")
    return Row(number, hidden, own, whole, following, output_tolerance(found.dtype, hidden.dtype, True))


class HeadReader:
    """Reads numbers off the last hidden states by the one head, of ``candidates``, that gives the model's own."""

    def __init__(self, question: Question, candidates: Iterable[HeadSpec]) -> None:
        self.question, self.targets = question, question.targets
        self._candidates = list(candidates)
        self._head: tuple[HeadSpec, Head] | None = None

    def read_numbers(self, row: Row, numbers: slice) -> Answer:
        """The numbers of one sequence, ``numbers`` of them with their way. Raises `UnsupportedModel` where no head
        gives the model's own."""
        columns = self._find_columns(row)
        own = self._own_numbers(row, columns)
        if self._head is not None:
            out = self._read_out(*self._head, row, columns, numbers)
            error = _measure_error(own[numbers], out)
            if not error <= row.tolerance:
                raise UnsupportedModel(self._explain(1, error))
            return Answer(own, columns, out)
        nearest, tried, best = float("inf"), 0, None
        apart = float("inf")
        for spec in self._candidates:
            if row.whole == ("position" in spec.reads):
                continue
            tried += 1
            try:
                head = spec.weights(row.hidden.dtype)
                out = self._read_out(spec, head, row, columns, numbers)
                error, distance = _measure_error(own[numbers], out), self._measure_distance(spec, head, row)
            except (UnsupportedModel, RuntimeError, IndexError):  # of other shapes
                continue
            nearest = min(nearest, error)
            if error <= row.tolerance and distance < apart:  # the first of equals
                apart, best = distance, (spec, head, out)
        if best is None:
            raise UnsupportedModel(self._explain(tried, nearest))
        self._head = best[:2]
        return Answer(own, columns, best[2])

    def _measure_distance(self, spec: HeadSpec, head: Head, row: Row) -> float:
        """How far a head is from the model's own over many numbers at once, relative to these: half types leave room
        for more than one head that gives a single number."""
        own = row.own[0]
        chosen = list(range(0, len(own), max(1, len(own) // _COMPARED)))
        if head.last is None or self.targets[0].direction is not None:
            targets = torch.eye(len(own)).to(row.hidden)[chosen]
            shift = targets.new_zeros(len(chosen))
        else:
            targets, shift = _read_columns(head, [(column, None) for column in chosen], row.hidden)
        weights = tuple(self._weigh_tokens(reading, row) for reading in spec.reads)
        reads = Reads(weights, torch.zeros(len(chosen), dtype=torch.int64, device=row.hidden.device))
        found = read_out(head, row.hidden, reads, targets, shift, self.question.request.rule).value
        own = own[chosen].to(found)
        return float((found - own).norm() / own.norm().clamp_min(torch.finfo(found.dtype).tiny))

    def _explain(self, tried: int, nearest: float) -> str:
        found = f"{tried} known heads were tried" if tried else "no known head fits"
        if nearest < float("inf"):
            found += f", the nearest is off by {nearest:.1e} (relative)"
        return (
            f"what {type(self.question.head).__name__} does with the output of its last layer is not known: {found}. "
            "Pass the base model with a direction [d] as target, which is read off its last hidden states."
        )

    def _find_columns(self, row: Row) -> list[tuple[int, int | None]] | None:
        """Which logits each number is of."""
        if self.targets[0].direction is not None:
            return None
        found = []
        for own, following in zip(row.own, row.following, strict=True):
            for target in self.targets:
                plus = _find_column(target.plus, own, following)
                minus = None if target.minus is None else _find_column(target.minus, own, following)
                found.append((plus, minus))
        return found

    def _own_numbers(self, row: Row, columns: list[tuple[int, int | None]] | None) -> Tensor:
        if columns is None:
            for target in self.targets:
                if target.direction is not None and len(target.direction) != row.own.shape[-1]:
                    raise ValueError(
                        f"{target.label} has {len(target.direction)} entries, but the last hidden states have "
                        f"{row.own.shape[-1]}"
                    )
            return torch.cat([own @ self._stack_directions(own).T for own in row.own])
        each = row.own.repeat_interleave(len(self.targets), 0)
        found = [
            own[plus] - (0 if minus is None else own[minus]) for own, (plus, minus) in zip(each, columns, strict=True)
        ]
        return torch.stack(found)

    def _stack_directions(self, like: Tensor) -> Tensor:
        found = [target.direction for target in self.targets if target.direction is not None]
        return torch.stack(found).to(like)

    def _read_out(
        self, spec: HeadSpec, head: Head, row: Row, columns: list[tuple[int, int | None]] | None, numbers: slice
    ) -> ReadOut:
        weights = tuple(self._weigh_tokens(reading, row) for reading in spec.reads)
        reads = len(weights[0])
        of_target = torch.arange(reads, device=row.hidden.device).repeat_interleave(len(self.targets))[numbers]
        if columns is None or head.last is None:
            targets = self._stack_directions(row.hidden).repeat(reads, 1)[numbers]
            shift = targets.new_zeros(len(targets))
        else:
            targets, shift = _read_columns(head, columns[numbers], row.hidden)
        return read_out(head, row.hidden, Reads(weights, of_target), targets, shift, self.question.request.rule)

    def _weigh_tokens(self, reading: Reading, row: Row) -> Tensor:
        """The weights ``[R, T]`` of all tokens in what is read."""
        hidden, positions = row.hidden, self.question.positions
        tokens = len(hidden)
        if reading == "position" and positions != "mean":
            places = torch.tensor(positions[row.number], device=hidden.device)
            return hidden.new_zeros(len(places), tokens).scatter_(1, places[:, None], 1)
        weights = hidden.new_zeros(1, tokens)
        first = len(self.question.request.description.special_tokens) if reading == "rest" else 0
        chosen = {"first": slice(0, 1), "last": slice(tokens - 1, tokens)}.get(reading, slice(first, tokens))
        weights[:, chosen] = 1
        return weights / weights.sum()


def _read_columns(head: Head, columns: list[tuple[int, int | None]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns in which directions ``[K, c]`` logits read what the last projection reads, and their biases ``[K]``."""
    assert head.last is not None
    weight, bias = head.last.weight, head.last.bias
    plus = torch.tensor([first for first, _ in columns], device=weight.device)
    targets = weight[:, plus].T.to(like)
    shift = like.new_zeros(len(columns)) if bias is None else bias[plus].to(like)
    for number, (_, minus) in enumerate(columns):
        if minus is not None:
            targets[number] -= weight[:, minus].to(like)
            shift[number] -= 0 if bias is None else bias[minus].to(like)
    return targets * head.factor, shift * head.factor


def _find_column(column: Column, own: Tensor, following: int) -> int:
    if column == "predicted":
        return int(own.argmax())
    if column == "next":
        if following < 0:
            raise ValueError("target='next' at a sequence's last token, which none follows; read an earlier position")
        return following
    assert isinstance(column, int)
    if not 0 <= column < len(own):
        raise ValueError(f"target is {column}, but the model has {len(own)} logits")
    return column


def _measure_error(own: Tensor, out: ReadOut) -> float:
    scale = torch.maximum(own.abs().to(out.size), out.size).clamp_min(torch.finfo(out.size.dtype).tiny)
    return float(((out.value - own.to(out.value)).abs() / scale).max())
