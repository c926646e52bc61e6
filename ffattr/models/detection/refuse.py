"""Why a layer is not one that the formulas cover, where what was seen in it says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ...decomposition.attention import Attention, QueryKey
from .probe import Undetected
from .rows import LayerRows
from .watch import Call, Run

__all__ = [
    "refuse_changed_heads",
    "refuse_experts",
    "refuse_networks_behind",
    "refuse_norms_of_experts",
    "refuse_norms_of_neurons",
    "refuse_shared_keys",
]


def refuse_experts(layer: nn.Module) -> None:
    """Raises `Undetected` for experts that run one by one, or by a product of their own."""
    for path, module in layer.named_modules():
        what = None
        if isinstance(module, nn.ModuleList) and len(module) > 1 and "expert" in path:
            what = f"{path!r} is a list of {len(module)} {type(module[0]).__name__}"
        elif not type(module).__name__.startswith("Conv"):
            stacked = [name for name, one in module.named_parameters(recurse=False) if one.dim() == 3]
            if stacked:
                shape = list(getattr(module, stacked[0]).shape)
                what = f"{f'{path}.{stacked[0]}' if path else stacked[0]!r} is {shape}"
        if what is not None:
            raise Undetected(
                f"the layer looks like a mixture of experts ({what}), in which no one module is called with the "
                "tokens, their experts and their weights"
            )


def refuse_changed_heads(rows: LayerRows) -> None:
    """Raises `Undetected` where a module acts on each head's values before attention mixes them, or a norm on what all
    heads return."""
    for call, out in product(rows.by_head, rows.linears):
        made = call.output.reshape(len(rows.x), -1)
        if rows.find_value_starts(rows.alpha, made, out.input) is not None:
            raise Undetected(
                f"attention mixes what {call.path!r} ({type(call.module).__name__}) makes of every head's values: "
                "between a value projection and attention no module is covered that acts on heads one by one"
            )
    for norm, out in product(rows.norms, rows.linears):
        if rows.are_equal(norm.output, out.input):
            for value in rows.linears:
                if value is not out and rows.find_value_starts(rows.alpha, value.output, norm.input) is not None:
                    raise Undetected(
                        f"a norm, {norm.path!r}, lies between what the heads return and the output projection "
                        f"{out.path!r}, which no description covers"
                    )


def refuse_norms_of_neurons(rows: LayerRows, find_blocks: Callable[[Sequence[Call]], Iterator[Any]]) -> None:
    """Raises `Undetected` where a norm lies behind the activation of a feed-forward block; ``find_blocks`` yields those
    with given second projections."""
    for norm, down in product(rows.norms, rows.linears):
        inside = rows.are_equal(norm.output, down.input)
        if inside and next(find_blocks([replace(down, input=norm.input)]), None) is not None:
            raise Undetected(
                f"a norm, {norm.path!r}, lies between the activation of the feed-forward block and its projection "
                f"{down.path!r}, which no description covers"
            )


def refuse_networks_behind(
    rows: LayerRows, find_streams: Callable[[Tensor], Iterator[Any]], block: Sequence[Call]
) -> None:
    """Raises `Undetected` where a projection that is none of the feed-forward ``block`` reads the stream behind it;
    ``find_streams`` yields how that block makes a given stream."""
    for call in rows.linears:
        outside = not any(call is one for one in block)
        if outside and call.input.shape == rows.x.shape and next(find_streams(call.input), None) is not None:
            raise Undetected(
                f"{call.path!r} reads the stream behind the feed-forward block: one more network lies there, and a "
                "layer has one feed-forward block in all formulas here"
            )


def refuse_norms_of_experts(rows: LayerRows, experts: Call) -> None:
    """Raises `Undetected` where what a mixture's experts return passes a norm before something else is added."""
    for norm in rows.norms:
        if rows.are_equal(norm.input, experts.output) and not rows.are_equal(norm.output, rows.y):
            raise Undetected(
                f"what the experts at {experts.path!r} return passes a norm of its own, {norm.path!r}, which no "
                "description covers: networks of one block are added up before any norm"
            )


def refuse_shared_keys(runs: Sequence[Run], numbers: Sequence[int], number: int) -> None:
    """Raises `Undetected` where the layer ``number`` attends to the keys that an earlier one made; ``numbers`` are
    those of the ``runs``."""
    key = _find_key(runs[numbers.index(number)].attention[0][1])
    for earlier, run in zip(numbers, runs, strict=True):
        other = _find_key(run.attention[0][1])
        if earlier < number and key is not None and other is not None and torch.equal(key, other):
            raise Undetected(
                f"layer {number} attends to keys and values that layer {earlier} made of its own input: no vector of "
                "its own tokens passes to the queries"
            )


def _find_key(attention: Attention) -> Tensor | None:
    return attention.key if isinstance(attention, QueryKey) else None
