"""The layers of a model that no adapter knows, found by what its modules read and return in one small forward pass.

What is found counts only if the output of every layer follows from it by the formulas of
`ffattr.decomposition.reference`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...decomposition import reference
from ...decomposition.attention import GatedAttention
from ...decomposition.precision import find_narrowest, output_tolerance
from ...errors import UnsupportedModel
from ..capture.run import find_device
from ..capture.user_hooks import set_hooks_aside
from ..spec.described import ModelDescription
from ..spec.layer import LayerSpec
from .match import match_parts
from .memory import find_memory_names
from .observe import Observed, observe_again, observe_layers, read_run_routing
from .parts import Part
from .probe import Undetected, list_layers
from .refuse import refuse_shared_keys
from .rows import is_batch_first
from .specs import make_spec, resolve_path
from .watch import Run

__all__ = ["Found", "Undetected", "describe_by_structure", "detect_layers", "make_specs"]

_log = logging.getLogger("ffattr")


@dataclass(frozen=True)
class Found:
    """The path of the list of layers and the ``numbers`` of those that attend; for each of these, which of ``parts`` it
    is described by (``kinds``): what each field of `LayerSpec` but ``module`` is.

    ``others`` are the layers that do not attend, with what they are. ``positions`` is the size of a learned position
    table, None where none was seen. ``encoder`` are the layers to whose output these attend besides.
    """

    layers: str
    numbers: tuple[int, ...]
    kinds: tuple[int, ...]
    parts: tuple[Mapping[str, Part], ...]
    others: Mapping[int, str]
    batch_first: bool
    positions: int | None
    encoder: Found | None = None


_known: WeakKeyDictionary[nn.Module, dict[frozenset[str], Found]] = WeakKeyDictionary()
"""What was found, by the arguments of a memory that the model ran on: it need not have any."""


def describe_by_structure(
    base: nn.Module, given: Callable[[nn.Module], Mapping[str, Any]] | None = None
) -> ModelDescription:
    """Describe a model by its structure, as it runs on the arguments that ``given`` makes (None: on a few tokens).

    Raises `Undetected`, and `CaptureError` for a model in training mode.
    """
    family = f"structure of {type(base).__name__}"
    kept = _known.setdefault(base, {})
    arguments = None if given is None or (kept and not _may_read_memory(base)) else given(base)
    names = find_memory_names(arguments or ())
    if names not in kept:
        # Values are compared in the model's own precision, on its device and on the CPU.
        with torch.autocast(find_device(base).type, enabled=False), torch.autocast("cpu", enabled=False):
            found = kept[names] = _detect_past_hooks(base, arguments)
        _log.info("%s: layers at %r, %s", family, found.layers, [dict(parts) for parts in found.parts])
    found = kept[names]
    if found.encoder is not None:
        encoder, decoder = make_specs(base, found.encoder), make_specs(base, found)
        ranges = {"encoder": range(len(encoder)), "decoder": range(len(encoder), len(encoder) + len(decoder))}
        return ModelDescription(base, encoder + decoder, family, found.batch_first, stacks=ranges, learned=True)
    across = any("cross_attention" in parts for parts in found.parts)
    return ModelDescription(
        base,
        make_specs(base, found),
        family,
        found.batch_first,
        found.positions,
        numbers=found.numbers if found.others else None,
        left_out=found.others,
        stacks={"decoder": range(len(found.numbers))} if across else {},
        learned=True,
    )


def _detect_past_hooks(base: nn.Module, given: Mapping[str, Any] | None) -> Found:
    """Finds the parts of each layer without what hooks of the user make of them, or else with it: a hook may be what
    makes a weight."""
    with set_hooks_aside(base) as any_there:
        try:
            return detect_layers(base, given)
        except Undetected:
            if not any_there:
                raise
    return detect_layers(base, given)


def _may_read_memory(base: nn.Module) -> bool:
    """Tells whether a model may be given tokens that it attends to besides its own."""
    parameters = inspect.signature(base.forward).parameters
    return bool(find_memory_names(parameters)) or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def detect_layers(base: nn.Module, given: Mapping[str, Any] | None = None) -> Found:
    """Finds the parts of each layer, verified in one forward pass. Raises as `describe_by_structure` does."""
    observed = observe_layers(base, given)
    found = _detect_stack(base, observed)
    if observed.encoder is None:
        return found
    encoder = _detect_stack(base, observed.encoder)
    for one, path in ((encoder, encoder.layers), (found, found.layers)):
        if one.others:
            raise Undetected(f"some layers of {path!r} do not attend, in a model with an encoder and a decoder", path)
    if encoder.batch_first != found.batch_first:
        raise Undetected("the layers of its encoder read [B, T, d] and those of its decoder [T, B, d], or vice versa")
    return replace(found, encoder=encoder)


def _detect_stack(base: nn.Module, observed: Observed) -> Found:
    """Finds the parts of the layers of a list. Raises `Undetected`."""
    kinds: dict[Hashable, tuple[int, dict[str, Part]]] = {}
    parts: dict[str, Part] = {}
    batch_first, kind = True, None
    try:
        for number, run in reversed([*zip(observed.numbers, observed.runs, strict=True)]):
            if run.kind not in kinds:
                parts, kind = {}, run.kind
                try:
                    batch_first = match_parts(run, parts)
                except Undetected:
                    refuse_shared_keys(observed.runs, observed.numbers, number)
                    raise
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
        specs = make_specs(base, found)
        observe_again(base, observed, specs)
        for number, run, spec in zip(observed.numbers, observed.runs, specs, strict=True):
            _verify_layer(run, spec, f"layer {number} of {observed.path!r}", batch_first)
    except Undetected as gave_up:
        gave_up.layers, gave_up.parts = observed.path, parts
        alike = tuple(number for number, run in zip(observed.numbers, observed.runs, strict=True) if run.kind == kind)
        gave_up.numbers = alike if len(alike) < len(observed.numbers) + len(observed.others) else None
        gave_up.batch_first = all(is_batch_first(run) for run in observed.runs)
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
    caller, attention = run.attention[0]
    assert run.output is not None
    dtype = torch.promote_types(run.input.dtype, torch.float32)
    heads = attention.attention.shape[1] if isinstance(attention, GatedAttention) else attention.shape[1]
    if caller is not spec.attention or heads != spec.heads:
        raise Undetected(
            f"{where} attends in a {type(caller).__name__} with {heads} heads, another layer with "
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
            encoder = _read_encoder(run, spec, batch, tokens, dtype, batch_first)
            to_tokens = attention.sequence(batch, tokens, dtype)
            output = reference.compute_output(weights, x, to_tokens, tokens, of_batch, encoder)
            # A row of padding may have no key to attend to.
            errors = ((output - expected).norm(dim=-1) / expected.norm(dim=-1))[output.isfinite().all(-1)]
            error = float(errors.max()) if len(errors) else 0.0
            own = find_narrowest((run.input.dtype, spec.narrowest_dtype)) or run.input.dtype
            if not error <= output_tolerance(own, dtype, attention.rounds_to_float32 or spec.rounds_to_float32):
                raise Undetected(
                    f"{where} is not reproduced by what was found: its output recomputed differs by {error:.1e} "
                    f"(relative), more than rounding in {run.input.dtype} explains"
                )


def _read_encoder(
    run: Run, spec: LayerSpec, batch: int, tokens: Tensor, dtype: torch.dtype, batch_first: bool
) -> reference.Encoder | None:
    """Returns what the cross-attention of one sequence reads, and its weights; None where there is none. Raises
    `Undetected` where nothing was seen to be read."""
    if spec.cross is None:
        return None
    if run.states is None:
        raise Undetected("the value projection of its attention to the encoder's tokens was not called")
    attention = run.attention[1][1]
    states = (run.states if batch_first else run.states.transpose(0, 1))[batch].to(dtype)
    return reference.Encoder(states, attention.sequence(batch, tokens, dtype, torch.arange(len(states)).to(tokens)))
