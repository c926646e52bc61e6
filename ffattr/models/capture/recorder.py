"""One forward pass of the user's own model, recorded layer by layer, leaving nothing behind.

The model's attention function is wrapped, never replaced: its output stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...decomposition.attention import Attention, GatedAttention, LayerRecord, NormedValues
from ...decomposition.precision import are_finite, find_narrowest, without_autocast
from ...decomposition.routing import Routing
from ...errors import CaptureError, NonFiniteError
from ..spec.described import ModelDescription
from ..spec.layer import LayerSpec
from .attention_hooks import record_attention
from .module_hooks import (
    find_first,
    record_gains,
    record_outputs,
    record_router_scores,
    record_routings,
    record_values_read,
)
from .passes import attach_hook, find_pass, leave_pass
from .proven import read_code
from .run import Reached, call_model, find_switches, read_hidden_states, require_same, run_undisturbed
from .user_hooks import Change, find_edits, record_changes

__all__ = ["record_first_attention", "record_layers"]

OnLayer = Callable[[LayerRecord], None]

# What a layer calls once, by the field of its record that is seen there.
_CALLED = {
    "attention": "attention function",
    "cross": "cross-attention",
    "states": "values of cross-attention",
    "routing": "experts",
    "gain": "shared expert's gate",
    "gate": "gate of attention",
    "values": "value projection",
}


def record_layers(
    description: ModelDescription,
    kwargs: Mapping[str, Any],
    on_layer: OnLayer,
    layers: Sequence[int] | None = None,
    verify: bool = True,
    mask: Tensor | None = None,
    encoder_mask: Tensor | None = None,
    model: nn.Module | None = None,
) -> Any:
    """Run ``description.base(**kwargs)`` once and hand each layer's `LayerRecord` to ``on_layer`` while the layer runs.

    The record is dropped afterwards, so memory holds one layer at a time. Records come in the order in which the layers
    run. ``verify`` runs the untouched model first and compares the final hidden states,
    unless the same code was seen to give the same before (`proven`).
    ``mask`` ``[B, T]`` says which tokens are valid (None: all); what padding holds is not looked at. Of a model with an
    encoder and a decoder it is the decoder's, ``encoder_mask`` the encoder's.
    ``model``: what is run instead of the base that it is built on, its head included. Returns what was returned.

    Raises `ForwardError` for what the model raises, and what ``on_layer`` raises as it is.
    """
    runs = description.base if model is None else model
    wanted = _number_wanted(description, layers)
    kwargs = {**kwargs, **find_switches(runs, kwargs)}
    with run_undisturbed(runs):
        code = read_code(runs, kwargs, wanted) if verify else None
        plain = None if code is None or code.is_proven else read_hidden_states(call_model(runs, kwargs))
        recorder = _Recorder(description, wanted, mask, on_layer, encoder_mask)
        with recorder.install_hooks():
            output = call_model(runs, kwargs, recorder.raised)
    recorder.check_all_ran()
    if code is not None and plain is not None:
        of_output = mask if description.batch_first or mask is None else mask.T
        require_same(plain, read_hidden_states(output), runs, of_output)
        code.keep_proof()
    return output


def record_first_attention(
    description: ModelDescription, kwargs: Mapping[str, Any], layer: int = 0, cross: bool = False
) -> Attention:
    """Run ``description.base(**kwargs)`` up to the attention of its first layer, which is what is returned; or of
    another one, the first of its stack; ``cross``: to the attention to an encoder's tokens.

    It tells how many tokens an image or a recording makes, and which of them are padding. Raises `ForwardError` where
    the model does not run on them.
    """
    base = description.base
    with run_undisturbed(base):
        recorder = _FirstAttention(description, [layer], None, lambda recorded: None)
        recorder.cross = cross
        try:
            with recorder.install_hooks():
                call_model(base, {**kwargs, **find_switches(base, kwargs)})
        except Reached as reached:
            attention: Attention = reached.found
            return attention
    raise CaptureError(f"the forward pass of {type(base).__name__} ended before the attention of its first layer")


class _Recorder:
    """Collects the attention of a layer, and hands it over with the layer's input and output when the layer ends.

    Layers may share one module (ALBERT): its first run is the first of them, and so on. A module goes by the first
    layer that has it.
    """

    def __init__(
        self,
        description: ModelDescription,
        wanted: Sequence[int],
        mask: Tensor | None,
        on_layer: OnLayer,
        encoder_mask: Tensor | None = None,
    ) -> None:
        self.description = description
        self.wanted = wanted
        self.mask = mask
        self.encoder_mask = encoder_mask
        self.on_layer = on_layer
        self.done: set[int] = set()
        self.raised: list[BaseException] = []  # by ``on_layer``
        self._pass = find_pass()
        self._layers_of = {
            layers[0]: layers for layers in _group_by_module(description) if not set(layers).isdisjoint(wanted)
        }
        self._runs = dict.fromkeys(self._layers_of, 0)
        self._pending: dict[int, dict[str, Any]] = {}  # of layers that run, the fields of their records so far

    @property
    def is_listening(self) -> bool:
        """Is False in another thread, inside ``on_layer``, and during a capture nested into this one."""
        return find_pass() is self._pass

    @contextmanager
    def install_hooks(self) -> Iterator[None]:
        with ExitStack() as stack, stack:
            specs = {first: self.description.layers[first] for first in self._layers_of}
            stack.enter_context(record_changes(specs, self._keep_change))
            for first, spec in specs.items():  # before what a hook of the user's does to the layer's output
                hook = self._layer_hook(first)
                attach_hook(stack, spec.module.register_forward_hook, hook, with_kwargs=True, prepend=True)
            modules = {first: spec.attention for first, spec in specs.items()}
            heads = {first: spec.heads for first, spec in specs.items()}
            for first, spec in specs.items():
                if spec.cross is not None:  # which may have fewer keys than queries, or more: below zero
                    modules[first + self._layer_count] = spec.cross.attention
                    heads[first + self._layer_count] = -spec.cross.heads
            stack.enter_context(record_attention(self.description.base, modules, heads, self._take_attention))
            stack.enter_context(self._record_mixtures(specs))
            for name in ("out", "down"):  # autocast may be on in a part of the layer alone
                parts = {first: getattr(spec, name) for first, spec in specs.items()}
                modules = {i: part if isinstance(part, nn.Module) else part.module for i, part in parts.items()}
                stack.enter_context(record_outputs(modules, self._keep_dtype))
            gates = {i: spec.attention_gate.gate_module for i, spec in specs.items() if spec.attention_gate is not None}
            stack.enter_context(record_outputs(gates, lambda first, made: self._keep_tensor(first, "gate", made)))
            normed = {i: spec.values.value_module for i, spec in specs.items() if spec.values is not None}
            stack.enter_context(record_outputs(normed, lambda first, made: self._keep_tensor(first, "values", made)))
            values = {first: spec.cross.value_module for first, spec in specs.items() if spec.cross is not None}
            stack.enter_context(
                record_values_read(values, lambda first, states: self._keep_tensor(first, "states", states))
            )
            yield

    @contextmanager
    def _record_mixtures(self, specs: Mapping[int, LayerSpec]) -> Iterator[None]:
        routers = {first: spec.router for first, spec in specs.items() if spec.router is not None}
        experts = {
            first: spec.experts for first, spec in specs.items() if spec.experts is not None and first not in routers
        }
        weighers = {
            first: spec.shared.weigher
            for first, spec in specs.items()
            if spec.shared is not None and spec.shared.weigher is not None
        }
        active = {first: spec.active for first, spec in specs.items()}

        def keep_routing(first: int, routing: Routing) -> None:
            self._keep_tensor(first, "routing", routing)

        with (
            record_routings(experts, keep_routing),
            record_router_scores(routers, active, keep_routing),
            record_gains(weighers, lambda first, gain: self._keep_tensor(first, "gain", gain)),
        ):
            yield

    def check_all_ran(self) -> None:
        missing = [index for index in self.wanted if index not in self.done]
        if missing:
            raise CaptureError(f"layers {missing} of {self._name} did not run in the forward pass")

    @property
    def _layer_count(self) -> int:
        """Cross-attention goes by the number of its layer and this."""
        return len(self.description.layers)

    def _take_attention(self, number: int, attention: Attention) -> None:
        if not self.is_listening:
            return
        first, cross = number % self._layer_count, number >= self._layer_count
        index = self._running_layer(first)
        _, heads, queries, keys = attention.shape
        if queries != keys and not cross:
            raise CaptureError(
                f"layer {index} of {self._name}: {queries} queries but {keys} keys. A cache of past "
                "keys or a prefix is in use; pass the whole sequence at once, without past_key_values."
            )
        part = self.description.layers[index].cross if cross else self.description.layers[index]
        assert part is not None
        if heads != part.heads:
            raise CaptureError(f"layer {index} of {self._name} has {heads} query heads, its adapter says {part.heads}")
        self._keep_tensor(first, "cross" if cross else "attention", attention)

    def _keep_tensor(self, first: int, name: str, value: Any) -> None:
        """Keeps one field of the record of the layer that runs."""
        if not self.is_listening:
            return
        fields = self._pending.setdefault(first, {})
        if name in fields:
            raise CaptureError(
                f"layer {self._running_layer(first)} of {self._name} called its {_CALLED[name]} twice, expected once"
            )
        fields[name] = value

    def _keep_dtype(self, first: int, output: Any) -> None:
        if self.is_listening and isinstance(output, Tensor) and output.is_floating_point():
            self._pending.setdefault(first, {}).setdefault("dtypes", set()).add(output.dtype)

    def _keep_change(self, first: int, change: Change) -> None:
        if self.is_listening:
            self._pending.setdefault(first, {}).setdefault("changes", []).append(change)

    def _running_layer(self, first: int) -> int:
        """Returns which layer it is that a module runs as."""
        layers = self._layers_of[first]
        return layers[min(self._runs[first], len(layers) - 1)]

    def _next_layer(self, first: int) -> int:
        """Returns which layer it is that a module has just run as, and counts the run."""
        layers, ran = self._layers_of[first], self._runs[first]
        if ran == len(layers):
            what = f"layer {first} of {self._name} ran twice in one forward pass, expected once"
            if ran > 1:
                what = (
                    f"the module that layers {layers} of {self._name} share ran {ran + 1} times in one forward pass, "
                    f"expected {ran}"
                )
            raise CaptureError(what)
        self._runs[first] += 1
        return layers[ran]

    def _layer_hook(self, first: int) -> Callable[..., None]:
        def hand_on_record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            index = self._next_layer(first)
            fields = self._pending.pop(first, {})
            if index not in self.wanted:
                return
            self._check_whole(index, fields)
            before = self._put_batch_first(find_first(module, args, kwargs))
            after = self._put_batch_first(output if isinstance(output, Tensor) else output[0])
            for name, hidden in (("input", before), ("output", after)):
                self._check_finite(f"the {name} of layer {index}", hidden, self._find_mask(index))
            self._complete_fields(index, fields)
            self.done.add(index)
            kind = after.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            computed = find_narrowest((autocast, *fields.pop("dtypes", ())))
            with leave_pass(), without_autocast():
                try:
                    self.on_layer(LayerRecord(index, before, after, **fields, computed=computed))
                except BaseException as error:
                    self.raised.append(error)
                    raise

        return hand_on_record

    def _complete_fields(self, index: int, fields: dict[str, Any]) -> None:
        """Makes of gates, changes and gains, which were seen beside a record's fields, parts of these."""
        gate, spec = fields.pop("gate", None), self.description.layers[index]
        if "values" in fields and spec.values is not None:
            gain = spec.values.compute_gain(self._put_batch_first(fields.pop("values")))
            fields["attention"] = NormedValues(fields["attention"], gain)
        if gate is not None and spec.attention_gate is not None:
            gain = spec.attention_gate.compute_gain(self._put_batch_first(gate))
            fields["attention"] = GatedAttention(fields["attention"], gain)
        if "states" in fields:
            fields["states"] = self._put_batch_first(fields["states"])
        changes = fields.pop("changes", [])
        if changes:
            mask = self._find_mask(index)
            mask = mask.T if mask is not None and not self.description.batch_first else mask
            fields["edits"] = find_edits(spec, changes, mask)
            fields["changed"] = tuple(dict.fromkeys(change.what for change in changes))
        gain = fields.pop("gain", None)
        if gain is not None:
            fields["routing"] = replace(fields["routing"], gain=gain)

    def _check_whole(self, index: int, fields: Mapping[str, Any]) -> None:
        """Raises `CaptureError` where something has not been seen that the layer's record needs."""
        spec = self.description.layers[index]
        parts = {"attention": spec.attention, "cross": spec.cross and spec.cross.attention}
        for name, module in parts.items():
            if module is not None and name not in fields:
                raise CaptureError(
                    f"layer {index} of {self._name} handed over no {'cross-' * (name == 'cross')}attention: its "
                    f"attention module ({type(module).__name__}) does not call transformers' attention interface, "
                    "nn.MultiheadAttention, scaled_dot_product_attention or a softmax over the keys in a way that can "
                    "be recorded"
                )
        for name, part in (("gate", spec.attention_gate), ("values", spec.norm_of_values)):
            if part is not None and name not in fields:
                raise CaptureError(f"layer {index} of {self._name} did not call its {_CALLED[name]}")
        gated = spec.shared is not None and spec.shared.weigher is not None
        if spec.experts is not None and ("routing" not in fields or (gated and "gain" not in fields)):
            raise CaptureError(
                f"layer {index} of {self._name} did not call its experts ({type(spec.experts).__name__}): a kernel may "
                "have taken their place. Load the model without kernels from the hub."
            )

    def _find_mask(self, index: int) -> Tensor | None:
        return self.encoder_mask if index in self.description.stacks.get("encoder", ()) else self.mask

    def _put_batch_first(self, hidden: Tensor) -> Tensor:
        """Returns hidden states of whatever layout the model uses as ``[B, T, d]``."""
        if hidden.dim() == 2:
            return hidden[None]
        return hidden if self.description.batch_first else hidden.transpose(0, 1)

    def _check_finite(self, what: str, hidden: Tensor, mask: Tensor | None) -> None:
        if are_finite(hidden):
            return
        finite = hidden.isfinite().all(-1)
        bad = ~finite if mask is None else mask.to(finite.device) & ~finite
        if bad.any():
            batch, token = bad.nonzero()[0].tolist()
            raise NonFiniteError(
                f"{what} of {self._name} is NaN or infinite (first at batch {batch}, token {token}). Check the weights "
                "and the inputs, or run the model in a wider dtype."
            )

    @property
    def _name(self) -> str:
        return f"{type(self.description.base).__name__} ({self.description.family})"


class _FirstAttention(_Recorder):
    """Stops at the first attention, or with ``cross`` at the first cross-attention, instead of recording it."""

    cross = False

    def _take_attention(self, number: int, attention: Attention) -> None:
        if self.is_listening and self.cross == (number >= self._layer_count):
            raise Reached(attention)


def _number_wanted(description: ModelDescription, layers: Sequence[int] | None) -> list[int]:
    count = len(description.layers)
    if layers is None:
        return list(range(count))
    for index in layers:
        if not -count <= index < count:
            raise ValueError(
                f"layer {index} does not exist: {type(description.base).__name__} has layers 0 to {count - 1}"
            )
    return sorted({index % count for index in layers})


def _group_by_module(description: ModelDescription) -> list[list[int]]:
    """Lists the layers of each module, in the order in which it runs as them."""
    found: dict[int, list[int]] = {}
    for index, spec in enumerate(description.layers):
        found.setdefault(id(spec.module), []).append(index)
    return list(found.values())
