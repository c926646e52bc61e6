"""The numbers of a `Contributions` while they come in: of one stack of layers, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...decomposition.adjoint.layer import Flow
from ...decomposition.scopes import Source
from ...results.keep import Keep, Reduce
from ...results.kept.policy import Kept, Sink
from ...results.signed.contents import CROSS_FLOW, FLOW, measure_error
from ..stack import Stack

__all__ = ["Gathered"]


class Gathered:
    """``K`` numbers of one stack: scores and constants at the boundaries of ``layers``, and flow where it is asked for.

    ``slice`` arguments ``numbers`` say which of the ``K`` come in.
    """

    def __init__(
        self, stack: Stack, layers: Sequence[int], targets: int, dtype: torch.dtype, keep: Keep | None, by_head: bool
    ) -> None:
        self.stack, self.layers, self.by_head = stack, list(layers), by_head
        device, (batch, tokens) = stack.mask.device, stack.mask.shape
        boundaries = len(self.layers) + 1
        self.value = torch.zeros(targets, batch, dtype=dtype, device=device)
        self.scores = self.value.new_zeros(targets, boundaries, batch, tokens)
        self.bias = self.value.new_zeros(targets, boundaries, batch)
        self.error = self.value.new_zeros(targets, batch)
        self.cross_scores: Tensor | None = None
        if stack.encoder_mask is not None:
            self.cross_scores = self.value.new_zeros(targets, boundaries, *stack.encoder_mask.shape)
        self.residual: Tensor | None = None
        self.sinks: dict[Source, Sink] = {}
        self.names: dict[Source, str] = {}
        if keep is not None:
            self.residual = self.value.new_zeros(targets, len(self.layers), batch, tokens)
            numbers = [stack.first + layer for layer in self.layers] * targets
            sources: tuple[Source, ...] = ("own",) if stack.encoder_mask is None else ("own", "cross")
            for source in sources:
                mask = stack.key_mask(source)
                shape = (targets * len(self.layers), batch, *self._heads(source), tokens, mask.shape[1])
                # where nothing is kept, a function is handed rows of both sources and has to tell them apart
                self.names[source] = CROSS_FLOW if source == "cross" and isinstance(keep, Reduce) else FLOW
                self.sinks[source] = keep.open({self.names[source]: shape}, dtype, device, numbers, range(tokens))

    def add_boundary(
        self,
        numbers: slice,
        layer: int,
        row: int,
        scores: Tensor,
        constant: Tensor,
        cross: Tensor | None,
        value: Tensor,
    ) -> None:
        """Takes what the tokens ``[k, T]`` of sequence ``row`` give at the input of ``layer`` (at the output of the
        last one: one more than it), what comes from none ``[k]``, and from the encoder's ``cross`` ``[k, T']``."""
        error = measure_error(value, constant, [scores] if cross is None else [scores, cross])
        self.error[numbers, row] = torch.maximum(self.error[numbers, row], error.to(self.error.device))
        last = layer == len(self.stack.specs)
        if layer not in self.layers and not last:
            return
        place = len(self.layers) if last else self.layers.index(layer)
        device = self.scores.device
        self.scores[numbers, place, row] = _spread_tokens(scores.to(device), self.stack.mask[row])
        self.bias[numbers, place, row] = constant.to(device)
        if cross is not None and self.cross_scores is not None and self.stack.encoder_mask is not None:
            self.cross_scores[numbers, place, row] = _spread_tokens(cross.to(device), self.stack.encoder_mask[row])

    def add_flow(self, numbers: slice, layer: int, row: int, rows: Tensor, flow: Flow | None) -> None:
        """Takes what passes to the query tokens ``rows`` of a layer, None: nothing."""
        if layer not in self.layers or not self.sinks:
            return
        place, mask = self.layers.index(layer), self.stack.mask[row]
        positions = mask.nonzero()[:, 0]
        at = positions[rows.to(positions.device)]
        count = len(range(*numbers.indices(len(self.value))))
        if flow is not None and self.residual is not None:
            self.residual[numbers, place, row] = self.residual[numbers, place, row].index_copy(
                -1, at, flow.residual.to(self.residual)
            )
        for source, sink in self.sinks.items():
            keys = positions if source == "own" else self.stack.encoder_positions(row)
            assert keys is not None
            nothing = self.value.new_zeros(*self._heads(source), len(rows), len(keys))
            for number in range(count):
                tile = nothing if flow is None else flow.tiles[source][number]
                index = ((numbers.start or 0) + number) * len(self.layers) + place
                sink.add_rows(index, row, at, keys, {self.names[source]: tile})

    def _heads(self, source: Source) -> tuple[int, ...]:
        """The axis of heads of a source's flow, where it is by head."""
        spec = self.stack.specs[0]
        heads = spec.cross.heads if source == "cross" and spec.cross is not None else spec.heads
        return (heads,) if self.by_head else ()

    def finish(self) -> dict[Source, Kept]:
        """Returns what is kept of flow."""
        return {source: sink.finish() for source, sink in self.sinks.items()}

    def seal_file(self, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Makes the file of the flow among a result's own tokens, where it is kept in one."""
        if "own" in self.sinks:
            self.sinks["own"].seal_file(tensors, content)

    def discard_files(self) -> None:
        """Leaves nothing behind of a run that ended early."""
        for sink in self.sinks.values():
            sink.discard_file()


def _spread_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Puts values ``[k, t]`` of real tokens into their places ``[k, T]``."""
    found = values.new_zeros(len(values), len(mask))
    found[:, mask] = values
    return found
