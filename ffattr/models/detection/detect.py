"""The layers of a model that no adapter knows, found by what its modules read and return in one small forward pass.

What is found counts only if the output of every layer follows from it by the formulas of
`ffattr.decomposition.reference`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...decomposition import reference
from ...decomposition.activations import Activation
from ...decomposition.attention import Attention
from ...decomposition.layer import LayerWeights
from ...decomposition.precision import output_tolerance
from ...decomposition.scopes import Source
from ...decomposition.walk import Stream, walk
from ...errors import UnsupportedModel
from ..capture.run import find_device
from ..spec.described import ModelDescription
from ..spec.layer import LayerSpec
from ..spec.weights import Columns, ParameterRef, Scaled
from .match import Cut, Part, Product, match_parts
from .observe import Run, observe_layers
from .probe import Undetected

__all__ = ["Found", "Undetected", "describe_by_structure", "detect_layers", "make_specs"]

_log = logging.getLogger("ffattr")


@dataclass(frozen=True)
class Found:
    """The path of the list of layers, and what each field of `LayerSpec` but ``module`` is in every one of them.

    ``positions`` is the size of a learned position table, None where none was seen.
    """

    layers: str
    parts: Mapping[str, Part]
    batch_first: bool
    positions: int | None


_known: WeakKeyDictionary[nn.Module, Found] = WeakKeyDictionary()


def describe_by_structure(base: nn.Module) -> ModelDescription:
    """Describe a model by its structure. Raises `Undetected`, and `CaptureError` for a model in training mode."""
    family = f"structure of {type(base).__name__}"
    found = _known.get(base)
    if found is None:
        # Values are compared in the model's own precision, on its device and on the CPU.
        with torch.autocast(find_device(base).type, enabled=False), torch.autocast("cpu", enabled=False):
            found = _known[base] = detect_layers(base)
        _log.info("%s: layers at %r, %s", family, found.layers, dict(found.parts))
    return ModelDescription(base, make_specs(base, found), family, found.batch_first, found.positions)


def detect_layers(base: nn.Module) -> Found:
    """Finds the parts of each layer, verified in one small forward pass. Raises as `describe_by_structure` does."""
    if getattr(getattr(base, "config", None), "add_cross_attention", False):
        raise Undetected("its layers have cross-attention (config.add_cross_attention is True)")
    if hasattr(base, "encoder") and hasattr(base, "decoder"):
        raise Undetected("it has an encoder and a decoder")
    observed = observe_layers(base)
    parts: dict[str, Part] = {}
    try:
        batch_first = match_parts(observed.runs[-1], parts)
        found = Found(observed.path, parts, batch_first, observed.positions)
        for number, (run, spec) in enumerate(zip(observed.runs, make_specs(base, found), strict=True)):
            _verify_layer(run, spec, f"layer {number} of {observed.path!r}", batch_first)
    except Undetected as gave_up:
        gave_up.layers, gave_up.parts = observed.path, parts
        raise
    return found


def make_specs(base: nn.Module, found: Found) -> tuple[LayerSpec, ...]:
    """Describes every layer by the same paths. Raises `Undetected` where one lacks a part."""
    layers = (getattr(layer, "_orig_mod", layer) for layer in _resolve_path(base, found.layers))
    return tuple(_make_spec(layer, number, found) for number, layer in enumerate(layers))


def _make_spec(layer: nn.Module, number: int, found: Found) -> LayerSpec:
    def find_part(name: str, where: Part) -> Any:
        if isinstance(where, Activation):
            return where.value
        if isinstance(where, Cut):
            return Columns(find_module(name, where.path), where.start, where.stop, where.groups)
        if isinstance(where, Product):
            owner, _, parameter = where.factor.rpartition(".")
            return Scaled(find_module(name, where.path), ParameterRef(find_module(name, owner), parameter))
        return find_module(name, where) if isinstance(where, str) else where

    def find_module(name: str, path: str) -> Any:
        try:
            module = _resolve_path(layer, path)
        except AttributeError:
            raise Undetected(f"layer {number} of {found.layers!r} has no {path!r}, which others have") from None
        return None if name.startswith("norm_") and isinstance(module, nn.Identity) else module

    return LayerSpec(module=layer, **{name: find_part(name, where) for name, where in found.parts.items()})


def _resolve_path(root: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), root) if path else root


def _verify_layer(run: Run, spec: LayerSpec, where: str, batch_first: bool) -> None:
    """Raises `Undetected` unless the layer's output follows from its description."""
    ((caller, attention),) = run.attention
    assert run.output is not None
    dtype = torch.promote_types(run.input.dtype, torch.float32)
    if caller is not spec.attention or attention.shape[1] != spec.heads:
        raise Undetected(
            f"{where} attends in a {type(caller).__name__} with {attention.shape[1]} heads, another layer with "
            f"{spec.heads} in a {type(spec.attention).__name__}"
        )
    try:
        weights = spec.weights(dtype)
    except (UnsupportedModel, ValueError) as refused:
        raise Undetected(f"{where}: {refused}") from refused
    states = (run.input, run.output) if batch_first else (run.input.transpose(0, 1), run.output.transpose(0, 1))
    tokens = torch.arange(attention.shape[2], device=run.input.device)
    with torch.no_grad():
        for batch, (x, expected) in enumerate(zip(*(state.to(dtype) for state in states), strict=True)):
            output = _compute_output(weights, x, attention.sequence(batch, tokens, dtype), tokens)
            error = float(((output - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
            if not error <= output_tolerance(
                run.input.dtype, dtype, attention.rounds_to_float32 or spec.rounds_to_float32
            ):
                raise Undetected(
                    f"{where} is not reproduced by what was found: its output recomputed differs by {error:.1e} "
                    f"(relative), more than rounding in {run.input.dtype} explains"
                )


def _compute_output(weights: LayerWeights, x: Tensor, attention: Attention, rows: Tensor) -> Tensor:
    """Computes the layer's output ``[T, d]`` for its input ``x`` ``[T, d]``, without any decomposition."""

    def attend_to_tokens(source: Source) -> Stream:
        alpha = attention.attention_weights(rows)
        values, constant = reference.own_values(weights, x, "token")
        none = x.new_empty(len(rows), 0, weights.width)
        return reference.attention_stream(weights, alpha, reference.context(alpha, values), constant, none)

    def feed_forward(read: Stream) -> Stream:
        return Stream.of_total(reference.feed_forward(weights, read.total, None))

    *_, last = walk(weights, Stream.of_total(x), attend_to_tokens, feed_forward)
    return last.stream.total
