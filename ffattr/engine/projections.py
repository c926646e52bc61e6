"""A layer's vectors projected on a direction: signed maps, without work of the model's width for any pair of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decomposition.adjoint.layer import LayerAdjoint, list_blocks
from ..decomposition.scopes import Scope
from .layer_maps import LayerTask
from .pack import OneSequence, Pack
from .plan import LayerPlan
from .query_pass import Slopes
from .run import LayerResult, TakeRows

__all__ = ["project_layer"]


def project_layer(task: LayerTask, pack: Pack, plan: LayerPlan, direction: Tensor, take: TakeRows) -> LayerResult:
    """The maps ``<direction, F_i(x_j)>`` of all scopes of a layer, handed on as `run_layer` does those of norms.

    ``direction`` ``[d]`` reads the stream at each scope. ``bias`` is what it reads of the bias. It takes as many
    operations as the layer itself, and those of its attention once more for each scope.
    """
    total, slopes = len(pack.query_tokens), Slopes(task.rule, task.backend.require_operators())
    output = pack.x.new_empty(total, task.weights.width)
    bias = {scope: pack.x.new_zeros(total) for scope in task.asked}
    for number, one in enumerate(pack.sequences):
        adjoint = LayerAdjoint(
            task.weights,
            one.x,
            one.attention,
            1,
            task.rule,
            task.value_bias,
            one.routing,
            one.encoder,
            slopes.compute,
        )
        neurons = max(branch.width * len(branch.projections) for branch in task.weights.branches)
        queries = torch.arange(len(one.query_tokens), device=pack.x.device)
        for block in list_blocks(queries, task.weights.heads, one.keys, 1, neurons):
            rows, at = one.query_tokens[block], block + pack.query_starts[number]
            frozen, output[at] = adjoint.freeze(rows)
            found: dict[Scope, Tensor] = {}
            for scope in task.asked:
                flow, bias[scope][at] = adjoint.project(rows, direction, frozen, scope)
                found[scope] = _add_up_groups(one, scope, flow.tiles[scope.source][0])
            take(number, block, found)
    return LayerResult(bias, output, plan, {})


def _add_up_groups(one: OneSequence, scope: Scope, tile: Tensor) -> Tensor:
    """The columns of keys ``[..., n, T]`` as those of their groups, where keys are added up."""
    if one.groups is None or scope.source == "cross":
        return tile
    real = one.groups >= 0
    columns = int(one.groups.max()) + 1 if bool(real.any()) else 0
    return tile.new_zeros(*tile.shape[:-1], columns).index_add_(-1, one.groups[real], tile[..., real])
