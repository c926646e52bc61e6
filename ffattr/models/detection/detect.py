"""The layers of a model that no adapter knows, found by what its modules read and return in one small forward pass.

What is found counts only if the output of every layer follows from it by the formulas of
`ffattr.decomposition.reference`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...decomposition import reference
from ...decomposition.attention import Attention
from ...decomposition.layer import LayerWeights
from ...decomposition.precision import output_tolerance
from ...decomposition.routing import Routing
from ...decomposition.scopes import Source
from ...decomposition.walk import Stream, walk
from ...errors import UnsupportedModel
from ..capture.run import find_device
from ..spec.described import ModelDescription
from ..spec.layer import LayerSpec
from .match import match_parts
from .observe import observe_layers, read_run_routing
from .parts import Part
from .probe import Undetected, list_layers
from .specs import make_spec, resolve_path
from .watch import Run

__all__ = ["Found", "Undetected", "describe_by_structure", "detect_layers", "make_specs"]

_log = logging.getLogger("ffattr")


@dataclass(frozen=True)
class Found:
    """The path of the list of layers and the ``numbers`` of those that attend; for each of these, which of ``parts`` it
    is described by (``kinds``): what each field of `LayerSpec` but ``module`` is.

    ``others`` are the layers that do not attend, with what they are. ``positions`` is the size of a learned position
    table, None where none was seen.
    """

    layers: str
    numbers: tuple[int, ...]
    kinds: tuple[int, ...]
    parts: tuple[Mapping[str, Part], ...]
    others: Mapping[int, str]
    batch_first: bool
    positions: int | None


_known: WeakKeyDictionary[nn.Module, Found] = WeakKeyDictionary()


def describe_by_structure(
    base: nn.Module, given: Callable[[nn.Module], Mapping[str, Any]] | None = None
) -> ModelDescription:
    """Describe a model by its structure, as it runs on the arguments that ``given`` makes (None: on a few tokens).

    Raises `Undetected`, and `CaptureError` for a model in training mode.
    """
    family = f"structure of {type(base).__name__}"
    found = _known.get(base)
    if found is None:
        # Values are compared in the model's own precision, on its device and on the CPU.
        with torch.autocast(find_device(base).type, enabled=False), torch.autocast("cpu", enabled=False):
            found = _known[base] = detect_layers(base, None if given is None else given(base))
        _log.info("%s: layers at %r, %s", family, found.layers, [dict(parts) for parts in found.parts])
    return ModelDescription(
        base,
        make_specs(base, found),
        family,
        found.batch_first,
        found.positions,
        numbers=found.numbers if found.others else None,
        left_out=found.others,
        learned=True,
    )


def detect_layers(base: nn.Module, given: Mapping[str, Any] | None = None) -> Found:
    """Finds the parts of each layer, verified in one forward pass. Raises as `describe_by_structure` does."""
    config = getattr(base, "config", None)
    if getattr(config, "add_cross_attention", False):
        raise Undetected("its layers have cross-attention (config.add_cross_attention is True)")
    if getattr(config, "is_encoder_decoder", False) and hasattr(base, "encoder") and hasattr(base, "decoder"):
        raise Undetected("it has an encoder and a decoder. Pass model.encoder for the encoder's layers alone")
    observed = observe_layers(base, given)
    kinds: dict[Hashable, tuple[int, dict[str, Part]]] = {}
    parts: dict[str, Part] = {}
    batch_first = True
    try:
        for run in reversed(observed.runs):
            if run.kind not in kinds:
                parts = {}
                batch_first = match_parts(run, parts)
                kinds[run.kind] = (len(kinds), parts)
        of_runs = tuple(kinds[run.kind] for run in observed.runs)
        found = Found(
            observed.path,
            observed.numbers,
            tuple(number for number, _ in of_runs),
            tuple(parts for _, parts in sorted(kinds.values(), key=lambda kind: kind[0])),
            {number: type(layer).__name__ for number, layer in observed.others.items()},
            batch_first,
            observed.positions,
        )
        for number, run, spec in zip(observed.numbers, observed.runs, make_specs(base, found), strict=True):
            _verify_layer(run, spec, f"layer {number} of {observed.path!r}", batch_first)
    except Undetected as gave_up:
        gave_up.layers, gave_up.parts = observed.path, parts
        raise
    return found


def make_specs(base: nn.Module, found: Found) -> tuple[LayerSpec, ...]:
    """Describes every layer that attends, those of a kind by the same paths. Raises `Undetected` where one lacks a
    part."""
    layers = list_layers(resolve_path(base, found.layers))
    return tuple(
        make_spec(layers[number], found.parts[kind], f"layer {number} of {found.layers!r}")
        for number, kind in zip(found.numbers, found.kinds, strict=True)
    )


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
    routing = read_run_routing(run, spec)
    with torch.no_grad():
        for batch, (x, expected) in enumerate(zip(*(state.to(dtype) for state in states), strict=True)):
            of_batch = None if routing is None else routing.of(tokens + batch * len(tokens)).to(x.device, dtype)
            output = _compute_output(weights, x, attention.sequence(batch, tokens, dtype), tokens, of_batch)
            # A row of padding may have no key to attend to.
            errors = ((output - expected).norm(dim=-1) / expected.norm(dim=-1))[output.isfinite().all(-1)]
            error = float(errors.max()) if len(errors) else 0.0
            if not error <= output_tolerance(
                run.input.dtype, dtype, attention.rounds_to_float32 or spec.rounds_to_float32
            ):
                raise Undetected(
                    f"{where} is not reproduced by what was found: its output recomputed differs by {error:.1e} "
                    f"(relative), more than rounding in {run.input.dtype} explains"
                )


def _compute_output(
    weights: LayerWeights, x: Tensor, attention: Attention, rows: Tensor, routing: Routing | None
) -> Tensor:
    """Computes the layer's output ``[T, d]`` for its input ``x`` ``[T, d]``, without any decomposition."""

    def attend_to_tokens(source: Source) -> Stream:
        alpha = attention.attention_weights(rows)
        values, constant = reference.own_values(weights, x, "token")
        none = x.new_empty(len(rows), 0, weights.width)
        return reference.attention_stream(weights, alpha, reference.context(alpha, values), constant, none)

    def feed_forward(read: Stream) -> Stream:
        return Stream.of_total(reference.feed_forward(weights, read.total, routing))

    *_, last = walk(weights, Stream.of_total(x), attend_to_tokens, feed_forward)
    return last.stream.total
