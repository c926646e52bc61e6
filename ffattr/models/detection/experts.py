"""The experts of a mixture, told by what their module makes of a few tokens: which parameter plays which part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...decomposition.activations import ACTIVATIONS
from .parts import Part, StackedPart
from .watch import Call

__all__ = ["match_experts"]

_TOKENS = 4
"""The experts' outputs are computed of so many."""


def match_experts(call: Call, layer: nn.Module, tolerance: float, dtype: torch.dtype) -> dict[str, Part] | None:
    """Returns the parts of `ffattr.LayerSpec` that a module of experts has, by its ``call`` with tokens, their experts
    and their weights; None for any other module, and where no formula gives what it returned."""
    routing = _read_routing(call)
    if routing is None:
        return None
    index, weight = routing
    weights = {name: one.detach() for name, one in call.module.named_parameters(recurse=False) if one.dim() == 3}
    x, expected = call.input[:_TOKENS], call.output[:_TOKENS]
    if len(weights) < 2 or x.shape != expected.shape:
        return None

    def read(part: StackedPart, expert: int) -> tuple[Tensor, Tensor | None]:
        matrix = weights[part.weight][expert].to("cpu", dtype)
        matrix = matrix if part.out_last else matrix.T
        bias = None if part.bias is None else getattr(call.module, part.bias)[expert].detach().to("cpu", dtype)
        columns = slice(part.start, part.stop, part.step)
        return matrix[:, columns], None if bias is None else bias[columns]

    def project(part: StackedPart, expert: int, rows: Tensor) -> Tensor:
        matrix, bias = read(part, expert)
        return rows @ matrix if bias is None else rows @ matrix + bias

    for gate, up, down in _list_layouts(call, x.shape[1]):
        for name, activation in _list_activations(call, layer):
            found = torch.zeros_like(expected)
            for token in range(len(x)):
                for expert, share in zip(index[token].tolist(), weight[token].to("cpu", dtype), strict=True):
                    if expert >= len(weights[down.weight]):  # what some models send nowhere
                        continue
                    row = x[token : token + 1]
                    hidden = activation(project(up if gate is None else gate, expert, row))
                    hidden = hidden if gate is None else hidden * project(up, expert, row)
                    found[token] += share * project(down, expert, hidden)[0]
            if float((found - expected).norm() / expected.norm().clamp_min(1e-30)) <= 10 * tolerance:
                parts: dict[str, Part] = {"up": up, "gate": gate, "down": down, "activation": name}
                return {**parts, "experts": call.path, "active": index.shape[1]}
    return None


def _read_routing(call: Call) -> tuple[Tensor, Tensor] | None:
    numbers = [one for one in call.others if not one.is_floating_point() and one.dim() == 2]
    if len(numbers) != 1 or len(numbers[0]) != len(call.input):
        return None
    weights = [one for one in call.others if one.is_floating_point() and one.shape == numbers[0].shape]
    return (numbers[0].cpu(), weights[0].cpu()) if len(weights) == 1 else None


def _list_layouts(call: Call, width: int) -> Iterator[tuple[StackedPart | None, StackedPart, StackedPart]]:
    """Yields gate (None: there is none), up and down, in every way that fits the shapes."""
    whole = list(_list_whole(call, width))
    for up, down in ((up, down) for up in whole for down in whole if up.weight != down.weight):
        outputs, inputs = _size(call, up)[1], _size(call, down)[0]
        if _size(call, up)[0] != width or _size(call, down)[1] != width:
            continue
        if outputs == 2 * inputs:
            for start, other in ((0, inputs), (inputs, 0)):
                yield _cut(up, start, start + inputs), _cut(up, other, other + inputs), down
            yield _cut(up, 0, outputs, 2), _cut(up, 1, outputs, 2), down
            yield _cut(up, 1, outputs, 2), _cut(up, 0, outputs, 2), down
        elif outputs == inputs:
            yield None, up, down
            others = [one for one in whole if one.weight not in (up.weight, down.weight)]
            yield from ((one, up, down) for one in others if _size(call, one) == _size(call, up))


def _list_whole(call: Call, width: int) -> Iterator[StackedPart]:
    """Yields each parameter of all experts as a projection, both ways round."""
    for name, one in call.module.named_parameters(recurse=False):
        if one.dim() == 3 and width in one.shape[1:]:
            bias = f"{name}_bias" if hasattr(call.module, f"{name}_bias") else None
            yield from (StackedPart(call.path, name, bias, out_last=out_last) for out_last in (False, True))


def _size(call: Call, part: StackedPart) -> tuple[int, int]:
    """Returns how many features a projection reads and makes."""
    first, second = getattr(call.module, part.weight).shape[1:]
    return (first, second) if part.out_last else (second, first)


def _cut(part: StackedPart, start: int, stop: int, step: int = 1) -> StackedPart:
    return StackedPart(part.path, part.weight, part.bias, start, stop, step, part.out_last)


def _list_activations(call: Call, layer: nn.Module) -> Iterator[tuple[Part, Callable[[Tensor], Tensor]]]:
    for name, function in vars(call.module).items():
        if "act" in name and callable(function):
            yield f"{call.path}.{name}", function
    for name, module in call.module.named_children():
        yield f"{call.path}.{name}", module
    known: Any = ACTIVATIONS.values()
    yield from ((one, one.value) for one in known)
