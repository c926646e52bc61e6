"""What is seen of modules other than attention while they run: which experts tokens go to, what a projection reads.

Each is a context manager that calls ``sink(layer, ...)`` and removes its hooks on the way out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...decomposition.routing import Routing
from ...errors import CaptureError
from .passes import attach_hook

__all__ = [
    "find_first",
    "record_gains",
    "record_outputs",
    "record_router_scores",
    "record_routings",
    "record_values_read",
]


@contextmanager
def record_routings(modules: Mapping[int, nn.Module], sink: Callable[[int, Routing], None]) -> Iterator[None]:
    """Record which experts each token goes to: the integers and weights that a module of experts is called with.

    Both are ``[tokens, k]``, the tokens of all sequences in one row.
    """

    def read_routing(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        numbers = [value for value in given if not value.is_floating_point()]
        floats = [value for value in given if value.is_floating_point()]
        weights = [value for value in floats if numbers and value.shape == numbers[0].shape]
        if len(numbers) != 1 or len(weights) != 1 or numbers[0].dim() != 2:
            raise CaptureError(
                f"{type(module).__name__} was called with tensors of shape {[list(value.shape) for value in given]}, "
                "expected hidden states, the experts of each token and their weights, [tokens, k] each"
            )
        sink(index, Routing(numbers[0].to(torch.int64), weights[0]))

    with _hook_before(modules, read_routing):
        yield


@contextmanager
def record_router_scores(
    modules: Mapping[int, nn.Module], active: Mapping[int, int], sink: Callable[[int, Routing], None]
) -> Iterator[None]:
    """Record which experts each token goes to where a router returns a number for each of them, ``[tokens, E]``: the
    ``active`` largest ones, all others being zero."""

    def read_scores(index: int, module: nn.Module, output: Any) -> None:
        scores = output if isinstance(output, Tensor) else output[0]
        scores = scores.flatten(0, -2)
        number = scores.abs().topk(active[index], -1).indices
        if ((scores != 0).sum(-1) > active[index]).any():
            raise CaptureError(
                f"{type(module).__name__} sends a token to {int((scores != 0).sum(-1).max())} experts, expected "
                f"{active[index]} at most"
            )
        sink(index, Routing(number, scores.gather(-1, number)))

    with _hook_behind(modules, read_scores):
        yield


@contextmanager
def record_gains(modules: Mapping[int, nn.Module], sink: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Record what a shared expert is multiplied by, ``[tokens]``: the sigmoid of what a module returns."""
    with _hook_behind(modules, lambda index, module, output: sink(index, output.sigmoid().flatten())):
        yield


@contextmanager
def record_outputs(modules: Mapping[int, nn.Module], sink: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Record what modules return."""
    with _hook_behind(modules, lambda index, module, output: sink(index, output)):
        yield


@contextmanager
def record_values_read(modules: Mapping[int, nn.Module], sink: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Record the input of value projections, of an ``nn.MultiheadAttention`` its values."""

    def read_input(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            sink(index, kwargs["value"] if "value" in kwargs else args[2])
        else:
            sink(index, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    with _hook_before(modules, read_input):
        yield


def find_first(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the hidden states that a layer is called with: its first argument, however it is passed; None where
    there is none."""
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    names = inspect.signature(module.forward).parameters
    return next((kwargs[name] for name in names if name in kwargs), next(iter(kwargs.values()), None))


@contextmanager
def _hook_behind(modules: Mapping[int, nn.Module], seen: Callable[[int, nn.Module, Any], None]) -> Iterator[None]:
    with ExitStack() as stack, stack:
        for index, module in modules.items():

            def hand_on_output(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                seen(index, module, output)

            attach_hook(stack, module.register_forward_hook, hand_on_output)
        yield


@contextmanager
def _hook_before(modules: Mapping[int, nn.Module], seen: Callable[[int, nn.Module, Any, Any], None]) -> Iterator[None]:
    with ExitStack() as stack, stack:
        for index, module in modules.items():

            def hand_on_input(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                seen(index, module, args, kwargs)

            attach_hook(stack, module.register_forward_pre_hook, hand_on_input, with_kwargs=True)
        yield
