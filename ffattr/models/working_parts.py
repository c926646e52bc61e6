"""Which parts of a model that is not mapped would be: tried on what they get when the model runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..decomposition import reference
from ..decomposition.attention import LayerRecord
from ..decomposition.layer import edit_weights
from ..decomposition.precision import output_tolerance
from ..errors import FfattrError
from .capture.passes import attach_hook
from .capture.recorder import record_layers
from .capture.run import find_switches, run_undisturbed
from .spec.described import ModelDescription
from .spec.layer import LayerSpec

__all__ = ["Tried", "try_parts"]

Resolve = Callable[[nn.Module, Callable[[nn.Module], Mapping[str, Any]]], ModelDescription]

_ERRORS = (FfattrError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True)
class Tried:
    """``mapped``: the parts whose layers are reproduced, by their paths, with what they are described by; ``untried``
    are those that did not run, or that the model did not get to."""

    mapped: Mapping[str, str]
    untried: tuple[str, ...]


def try_parts(base: nn.Module, paths: Sequence[str], inputs: Iterable[Mapping[str, Any]], resolve: Resolve) -> Tried:
    """Runs ``base`` on the first of ``inputs`` that it takes, and each of its parts on what it got there."""
    calls = _record_calls(base, paths, inputs)
    mapped = {}
    for path, arguments in calls.items():
        part = base.get_submodule(path)
        try:
            description = resolve(part, functools.partial(_give, arguments))
            record_layers(description, arguments, functools.partial(_require, description.layers))
        except _ERRORS:
            continue
        mapped[path] = description.family
    return Tried(mapped, tuple(path for path in paths if path not in calls))


def _give(arguments: Mapping[str, Any], part: nn.Module) -> Mapping[str, Any]:
    return arguments


def _record_calls(
    base: nn.Module, paths: Sequence[str], inputs: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns the keyword arguments that parts of a model are called with first, of those parts that run on them."""
    found: dict[str, dict[str, Any]] = {}

    def keep_arguments(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        given = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        found.setdefault(path, given)

    for given in inputs:
        found.clear()
        try:
            with run_undisturbed(base), ExitStack() as stack, stack:
                for path in paths:

                    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                        keep_arguments(path, module, args, kwargs)

                    attach_hook(stack, base.get_submodule(path).register_forward_hook, keep, with_kwargs=True)
                base(**{**given, **find_switches(base, given)})
        except _ERRORS:
            continue
        return found
    return found


@torch.no_grad()
def _require(layers: Sequence[LayerSpec], record: LayerRecord) -> None:
    """Raises ValueError unless a layer's output follows from its description."""
    spec = layers[record.index]
    dtype = torch.promote_types(record.output.dtype, torch.float32)
    weights = edit_weights(spec.weights(dtype), record.edits)
    tokens = torch.arange(record.input.shape[1], device=record.output.device)
    rounded = spec.rounds_to_float32 or record.attention.rounds_to_float32
    for row, (x, expected) in enumerate(zip(record.input.to(dtype), record.output.to(dtype), strict=True)):
        routing = encoder = None
        if record.routing is not None:
            routing = record.routing.to(x.device, dtype).of(tokens + row * len(tokens))
        if record.cross is not None and record.states is not None:
            states = record.states[row].to(dtype)
            keys = torch.arange(len(states), device=tokens.device)
            encoder = reference.Encoder(states, record.cross.sequence(row, tokens, dtype, keys))
        attention = record.attention.sequence(row, tokens, dtype)
        output = reference.compute_output(weights, x, attention, tokens, routing, encoder)
        errors = ((output - expected).norm(dim=-1) / expected.norm(dim=-1))[output.isfinite().all(-1)]
        if not float(errors.max()) <= output_tolerance(record.output.dtype, dtype, rounded):
            raise ValueError(f"layer {record.index} is not reproduced")
