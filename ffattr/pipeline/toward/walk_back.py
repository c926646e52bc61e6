"""One layer of one sequence, from its output back to its input: what each token gives at the boundary before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...decomposition.adjoint.layer import Flow, LayerAdjoint, Slopes, paths_of_point
from ...decomposition.layer import LayerWeights
from ...decomposition.reference import Rule
from ...decomposition.scopes import Point
from ..assemble import find_errors
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
    """At which point of a layer flow is traced, whether by head, and who takes it: ``take(rows, flow)``, None for rows
    that nothing reads."""

    point: Point
    by_head: bool
    take: Callable[[Tensor, Flow | None], None]


@dataclass(frozen=True)
class Boundary:
    """The input of a layer: ``directions`` ``[K, T, d]`` in which it is read, what its tokens give ``[K, T]``, and the
    ``constant`` ``[K]`` that the layer adds to that of those behind it.

    ``states`` ``[K, T', d]``: the directions in which the layer reads an encoder's states. ``error`` is the largest
    relative difference of a token's output in the layer, as recomputed, from the model's.
    """

    directions: Tensor
    scores: Tensor
    constant: Tensor
    states: Tensor | None
    error: float


def walk_back(
    weights: LayerWeights, recorded: Recorded, directions: Tensor, method: Method, flow: FlowAsked | None = None
) -> Boundary:
    """Goes from a layer's output, which is read in ``directions`` ``[K, T, d]``, back to its input."""
    sequence = recorded.sequence
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
    errors = [directions.new_zeros(())]
    is_read = directions.any(-1).any(0)
    rows, unread = is_read.nonzero()[:, 0], is_read.logical_not().nonzero()[:, 0]
    for block in adjoint.cut_rows(rows):
        of_block = directions[:, block]
        recomputed, frozen = adjoint.pull_back(block, of_block)
        errors.append(find_errors([recorded.output[block]], recomputed)[0])
        if flow is not None:
            flow.take(block, adjoint.trace_flow(block, of_block, frozen, *paths_of_point(flow.point), flow.by_head))
    if flow is not None and len(unread):
        flow.take(unread, None)
    adjoint.join_blocks()
    scores = (adjoint.own * sequence.x).sum(-1)
    error = torch.stack(errors).max()  # NaN where any is, which Python's max drops
    return Boundary(adjoint.own, scores, adjoint.constant, adjoint.encoder, float(error))
