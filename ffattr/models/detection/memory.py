"""Layers that attend to tokens of somebody else besides their own, where no encoder of the model makes those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.module_hooks import find_first, record_values_read
from ..capture.passes import attach_hook
from ..capture.run import find_switches
from .rows import is_linear
from .watch import Run

__all__ = ["MEMORY", "find_memory_names", "reads_memory"]

MEMORY = ("encoder_", "memory")
"""What the arguments of a forward begin with that hold such tokens, or say which of them are valid."""


def find_memory_names(names: Iterable[str]) -> frozenset[str]:
    """Returns those of the names of arguments that are called so."""
    return frozenset(name for name in names if name.startswith(MEMORY))


def reads_memory(base: nn.Module, runs: Sequence[Run], kwargs: Mapping[str, Any]) -> bool:
    """Tells whether every layer that attends does so twice, by two modules, and whether a projection in it reads what
    does not depend on the layer's input: by another run, in which the last of them is given something else."""
    attending = [run for run in runs if run.attention]
    if any(len(run.attention) != 2 or run.attention[0][0] is run.attention[1][0] for run in attending):
        return False
    layer = attending[-1].layer
    inside = [one for one in layer.modules() if is_linear(one) or isinstance(one, nn.MultiheadAttention)]
    modules: dict[int, nn.Module] = dict(enumerate(inside))
    before, after = dict[int, Tensor](), dict[int, Tensor]()

    def disturb(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = find_first(module, args, kwargs)
        other = hidden + hidden.roll(1, -1)
        given = {name: other if value is hidden else value for name, value in kwargs.items()}
        return tuple(other if value is hidden else value for value in args), given

    for kept, changes in ((before, False), (after, True)):
        with ExitStack() as stack, stack:
            if changes:
                attach_hook(stack, layer.register_forward_pre_hook, disturb, with_kwargs=True)
            stack.enter_context(record_values_read(modules, kept.__setitem__))
            base(**{**kwargs, **find_switches(base, kwargs)})
    return any(number in after and torch.equal(read, after[number]) for number, read in before.items())
