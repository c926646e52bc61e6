"""One sequence from its last layer back to its first: what each token gives at every boundary between layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...decomposition.adjoint.layer import Flow, LayerAdjoint, Slopes, list_blocks, paths_of_point
from ...decomposition.reference import Rule
from ...decomposition.scopes import Point
from .records import Recorded

__all__ = ["Boundary", "FlowAsked", "Method", "walk_back"]


@dataclass(frozen=True)
class Method:
    """How layers are frozen: the rule of Integrated Gradients, where values' biases go, and who computes slopes."""

    rule: Rule
    value_bias: str
    slopes: Slopes


@dataclass(frozen=True)
class FlowAsked:
    """At which point of a layer flow is traced, whether by head, and who takes it: ``take(layer, rows, flow)``, None
    for rows that nothing reads."""

    point: Point
    by_head: bool
    take: Callable[[int, Tensor, Flow | None], None]


@dataclass(frozen=True)
class Boundary:
    """The input of a layer: ``directions`` ``[K, T, d]`` in which it is read, what its tokens give ``[K, T]``, and the
    ``constant`` ``[K]`` that the layers from here on add to that of the numbers themselves.

    ``states`` ``[K, T', d]``: the directions in which the layer reads an encoder's states. ``error`` is the largest
    relative difference of a token's output in the layer, as recomputed, from the model's.
    """

    layer: int
    directions: Tensor
    scores: Tensor
    constant: Tensor
    states: Tensor | None
    error: float


def walk_back(
    layers: Sequence[int],
    read: Callable[[int], Recorded],
    directions: Tensor,
    constant: Tensor,
    method: Method,
    flow: FlowAsked | None = None,
) -> Iterator[Boundary]:
    """Every boundary from the last of ``layers`` down, for ``directions`` ``[K, T, d]`` at the output of that layer.

    ``read(layer)`` gives what the model's forward pass has left of it.
    """
    for layer in layers:
        weights, sequence, output, _ = read(layer)
        adjoint = LayerAdjoint(
            weights,
            sequence.x,
            sequence.attention,
            len(directions),
            method.rule,
            method.value_bias,
            sequence.routing,
            sequence.encoder,
            method.slopes,
        )
        error = 0.0
        is_read = directions.any(-1).any(0)
        rows, unread = is_read.nonzero()[:, 0], is_read.logical_not().nonzero()[:, 0]
        neurons = max(branch.width * len(branch.projections) for branch in weights.branches)
        for block in list_blocks(rows, weights.heads, sequence.keys, len(directions), neurons):
            of_block = directions[:, block]
            recomputed, frozen = adjoint.pull(block, of_block)
            error = max(error, _measure_error(recomputed, output[block]))
            if flow is not None:
                traced = adjoint.trace(block, of_block, frozen, *paths_of_point(flow.point), flow.by_head)
                flow.take(layer, block, traced)
        if flow is not None and len(unread):
            flow.take(layer, unread, None)
        adjoint.finish()
        directions, constant = adjoint.own, constant + adjoint.constant
        yield Boundary(layer, directions, (directions * sequence.x).sum(-1), constant, adjoint.encoder, error)


def _measure_error(recomputed: Tensor, own: Tensor) -> float:
    scale = own.norm(dim=-1).clamp_min(torch.finfo(own.dtype).tiny)
    return float(((recomputed - own).norm(dim=-1) / scale).max()) if len(own) else 0.0
