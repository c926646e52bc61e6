"""What a forward pass leaves of a model's layers, kept until the way back has come to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...decomposition.attention import Attention, LayerRecord, QueryKey
from ...decomposition.layer import Edit
from ...engine.pack import OneSequence
from ...errors import UnsupportedModel
from ...models.capture.user_hooks import list_user_hooks, name_hook
from ...models.inputs.prepare import Inputs
from ..assemble import CapturedSequence, layer_tolerance
from ..request import Request
from ..stack import Stack

__all__ = ["Recorded", "Records"]


class Recorded(NamedTuple):
    """One layer of one sequence: the sequence at its input, the model's own output ``[T, d]``, and the largest relative
    error of a recomputed output that rounding explains. ``edits`` and ``changed`` are what hooks did (`LayerRecord`).
    """

    sequence: OneSequence
    output: Tensor
    tolerance: float
    edits: tuple[Edit, ...]
    changed: tuple[str, ...]


class Records:
    """Runs a model on one batch and keeps what its layers leave: of all of them, or of as many as fit ``budget``.

    ``output`` is what the model returned in the last run.
    """

    def __init__(
        self, request: Request, model: nn.Module, inputs: Inputs, batch: Sequence[int], check: bool, budget: int | None
    ) -> None:
        self.request, self.model, self.inputs, self.batch, self.check = request, model, inputs, batch, check
        self.budget = budget
        self.output: Any = None
        self._kept: dict[tuple[int, int], CapturedSequence] = {}
        self._of_layer: dict[int, tuple[float, tuple[Edit, ...], tuple[str, ...]]] = {}
        self._expected: dict[int, tuple[int, Tensor]] = {}  # of each sequence, a layer and its input

    def split_layers(self, stack: Stack) -> list[list[int]]:
        """The layers of a stack, counted in it, in parts that are recorded in one run: the last one first."""
        layers = list(reversed(range(len(stack.specs))))
        if self.budget is None:
            return [layers]
        at_once = max(1, self.budget // max(1, self._count_bytes(stack)))
        return [layers[start : start + at_once] for start in range(0, len(layers), at_once)]

    def load_layers(self, stack: Stack, layers: Sequence[int]) -> None:
        """Sees to it that these layers are there. Everything is recorded in one run where memory does not matter."""
        wanted = [stack.first + layer for layer in layers]
        if all((layer, row) in self._kept for layer in wanted for row in self.batch):
            return
        self._kept.clear()
        everything = self.request.recorded if self.budget is None else wanted
        self.output = self.request.run_model(self.inputs, self._keep_layer, self.check, self.model, everything)
        self.check = False  # what was seen once need not be seen again
        self._check_chain(everything)

    def read_layer(self, stack: Stack, layer: int, row: int) -> Recorded:
        """One layer of a stack, of sequence ``row``."""
        number = stack.first + layer
        one = self._kept[number, row]
        return Recorded(one.sequence, one.output, *self._of_layer[number])

    def _keep_layer(self, captured: LayerRecord) -> None:
        stack = self.request.stack_of_layer(captured.index)
        tolerance = layer_tolerance(stack, captured, self.request.dtype)
        self._of_layer[captured.index] = tolerance, captured.edits, captured.changed
        for place, row in enumerate(self.batch):
            one = CapturedSequence.from_record(self.request, stack, captured, place, row)
            before = self._kept.get((captured.index - 1, row))
            shared = None if before is None else before.sequence.attention
            attention = _share_mask(one.sequence.attention, shared)
            self._kept[captured.index, row] = replace(one, sequence=replace(one.sequence, attention=attention))

    def _check_chain(self, layers: Sequence[int]) -> None:
        """Raises `UnsupportedModel` where a layer reads something else than the layer before has returned."""
        starts = {stack.first for stack in self.request.stacks}
        for row in self.batch:
            for layer in sorted(layers, reverse=True):
                one = self._kept[layer, row]
                after = self._expected.get(row)
                if after is not None and after[0] == layer + 1 and after[0] not in starts:
                    if not torch.equal(one.output, after[1].to(one.output.device)):
                        raise UnsupportedModel(
                            f"between layers {layer} and {layer + 1} of {type(self.request.description.base).__name__} "
                            f"something else changes the hidden states{self._name_hooks(layer)}; contributions through "
                            "it are not known"
                        )
                    self._kept[layer, row] = replace(one, output=after[1])  # the same numbers need no memory twice
                self._expected[row] = layer, one.sequence.x

    def _name_hooks(self, layer: int) -> str:
        """Names the hooks on a layer and on the next one that may have done so."""
        before, after = (self.request.description.layers[number].module for number in (layer, layer + 1))
        hooks = [*list_user_hooks(before._forward_hooks).values(), *list_user_hooks(after._forward_pre_hooks).values()]
        return f" (a hook: {', '.join(name_hook(hook) for hook in hooks)})" if hooks else ""

    def _count_bytes(self, stack: Stack) -> int:
        """About what a record of one layer takes."""
        tokens = int(self.inputs.mask.sum())
        weights = self.request.weights_of_layer(stack, 0)
        heads = (weights.heads + weights.kv_heads) * weights.head_dim
        return tokens * (2 * weights.width + heads) * self.request.dtype.itemsize


def _share_mask(attention: Attention, before: Attention | None) -> Attention:
    """Returns an attention without a mask that masks nothing, and with that of the layer before where they are equal:
    one of ``[T, T]`` for each layer would be more than all else."""
    if not isinstance(attention, QueryKey) or attention.mask is None:
        return attention
    if attention.mask.dtype == torch.bool and bool(attention.mask.all()):
        return replace(attention, mask=None)
    other = before.mask if isinstance(before, QueryKey) else None
    if other is not None and other.shape == attention.mask.shape and torch.equal(other, attention.mask):
        return replace(attention, mask=other)
    return attention
