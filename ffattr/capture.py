"""One forward pass of the user's own model, recorded layer by layer, leaving nothing behind.

The model's attention function is wrapped, never replaced: its output stays what it was.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapted
from .attention import Attention, LayerRecord
from .attention_capture import Sink, attention_interface, called_sdpa, multihead
from .errors import CaptureError, NonFiniteError, UnsupportedModel
from .inputs import token_mask

__all__ = ["record"]

OnLayer = Callable[[LayerRecord], None]

# Relative difference of the final hidden states above which recording is taken to have changed the model's output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_lock = threading.RLock()  # captures in several threads would take each other's changes to a shared config for original
_active: ContextVar[_Recorder | None] = ContextVar("ffattr_active_capture", default=None)


def record(
    adapted: Adapted,
    kwargs: Mapping[str, Any],
    on_layer: OnLayer,
    layers: Sequence[int] | None = None,
    verify: bool = True,
) -> None:
    """Run ``adapted.base(**kwargs)`` once and hand each layer's `LayerRecord` to ``on_layer`` while the layer runs.

    The record is dropped afterwards, so memory holds one layer at a time. Records come in the order in which the layers
    run; captures in other threads wait. ``verify`` runs the untouched model first and compares the final hidden states
    of the valid tokens.
    """
    base = adapted.base
    wanted = _wanted(adapted, layers)
    if any(module.training for module in base.modules()):
        raise CaptureError(
            f"{type(base).__name__} is in training mode, where dropout makes every run different. Call model.eval()."
        )
    kwargs = {**kwargs, **_switches(base, kwargs)}
    with _lock, torch.no_grad(), _uncompiled(base), _no_fastpath():
        plain = _hidden(base(**kwargs)) if verify else None
        recorder = _Recorder(adapted, wanted, kwargs, on_layer)
        with recorder.installed():
            output = base(**kwargs)
    recorder.finish()
    if plain is not None:
        _compare(plain, _hidden(output), recorder)


class _Recorder:
    """Collects the attention of a layer, and hands it over with the layer's input and output when the layer ends."""

    def __init__(self, adapted: Adapted, wanted: Sequence[int], kwargs: Mapping[str, Any], on_layer: OnLayer) -> None:
        self.adapted = adapted
        self.wanted = wanted
        self.kwargs = kwargs
        self.on_layer = on_layer
        self.done: set[int] = set()
        self.mask: Tensor | None = None
        self._pending: dict[int, Attention] = {}

    @property
    def listening(self) -> bool:
        """False in another thread, inside ``on_layer``, and during a capture nested into this one."""
        return _active.get() is self

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_set_active(self))
            for index in self.wanted:
                hook = self.adapted.layers[index].module.register_forward_hook(
                    self._layer_hook(index), with_kwargs=True
                )
                stack.callback(hook.remove)
            modules = {index: self.adapted.layers[index].attention for index in self.wanted}
            torch_modules = {i: module for i, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
            others = {i: module for i, module in modules.items() if i not in torch_modules}
            sink: Sink = self._attention
            if torch_modules:
                stack.enter_context(multihead(torch_modules, sink))
            if others:
                configs = _configs(self.adapted.base)
                source = attention_interface(configs, others, sink) if configs else called_sdpa(others, sink)
                stack.enter_context(source)
            yield

    def finish(self) -> None:
        missing = [index for index in self.wanted if index not in self.done]
        if missing:
            raise CaptureError(f"layers {missing} of {self._what} did not run in the forward pass")

    def _attention(self, index: int, attention: Attention) -> None:
        if not self.listening:
            return
        if index in self._pending:
            raise CaptureError(f"layer {index} of {self._what} called its attention function twice, expected once")
        spec = self.adapted.layers[index]
        query, key = attention.query, attention.key
        if query.shape[-2] != key.shape[-2]:
            raise CaptureError(
                f"layer {index} of {self._what}: {query.shape[-2]} queries but {key.shape[-2]} keys. A cache of past "
                "keys or a prefix is in use; pass the whole sequence at once, without past_key_values."
            )
        if query.shape[1] != spec.heads:
            raise CaptureError(
                f"layer {index} of {self._what} has {query.shape[1]} query heads, its adapter says {spec.heads}"
            )
        self._pending[index] = attention

    def _layer_hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.listening:
                return
            if index in self.done:
                raise CaptureError(f"layer {index} of {self._what} ran twice in one forward pass, expected once")
            attention = self._pending.pop(index, None)
            if attention is None:
                raise CaptureError(
                    f"layer {index} of {self._what} handed over no attention: its attention module "
                    f"({type(self.adapted.layers[index].attention).__name__}) does not call transformers' attention "
                    "interface, nn.MultiheadAttention or scaled_dot_product_attention in a way that can be recorded"
                )
            before = self._tokens(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()))))
            after = self._tokens(output if isinstance(output, Tensor) else output[0])
            if self.mask is None:
                self.mask = token_mask(self.kwargs, before.shape[0], before.shape[1], before.device)
            for name, hidden in (("input", before), ("output", after)):
                self._check_finite(f"the {name} of layer {index}", hidden)
            self.done.add(index)
            with _set_active(None):
                self.on_layer(LayerRecord(index, before, after, attention))

        return hook

    def _tokens(self, hidden: Tensor) -> Tensor:
        """``[B, T, d]`` of whatever layout the model uses."""
        if hidden.dim() == 2:
            return hidden[None]
        return hidden if self.adapted.batch_first else hidden.transpose(0, 1)

    def _check_finite(self, what: str, hidden: Tensor) -> None:
        finite = hidden.isfinite().all(-1)
        if finite.all():
            return
        assert self.mask is not None
        bad = self.mask.to(finite.device) & ~finite
        if bad.any():
            batch, token = bad.nonzero()[0].tolist()
            raise NonFiniteError(
                f"{what} of {self._what} is NaN or infinite (first at batch {batch}, token {token}). Check the weights "
                "and the inputs, or run the model in a wider dtype."
            )

    @property
    def _what(self) -> str:
        return f"{type(self.adapted.base).__name__} ({self.adapted.family})"


def _compare(plain: Tensor, recorded: Tensor, recorder: _Recorder) -> None:
    mask = recorder.mask
    if mask is not None and plain.dim() == 3 and recorder.adapted.batch_first and plain.shape[:2] == mask.shape:
        plain, recorded = plain[mask.to(plain.device)], recorded[mask.to(plain.device)]
    elif mask is not None and plain.dim() == 3 and plain.shape[:2] == mask.T.shape:
        plain, recorded = plain[mask.T.to(plain.device)], recorded[mask.T.to(plain.device)]
    plain, recorded = plain.double(), recorded.double()
    error = float((recorded - plain).norm() / plain.norm().clamp_min(1e-30))
    tolerance = _TOLERANCE.get(_dtype(recorder.adapted.base), 1e-4)
    if not error <= tolerance:
        raise CaptureError(
            f"recording changed output of {recorder._what}: the final hidden states differ by {error:.1e} (relative), "
            f"expected at most {tolerance:.0e}. The model is random in eval mode, or its attention implementation "
            'differs from sdpa; try model.set_attn_implementation("sdpa") or "eager".'
        )


def _dtype(base: nn.Module) -> torch.dtype:
    """The narrowest floating dtype of the parameters, or of autocast."""
    found = {parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()}
    for parameter in base.parameters():
        if torch.is_autocast_enabled(parameter.device.type):
            found.add(torch.get_autocast_dtype(parameter.device.type))
        break
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _wanted(adapted: Adapted, layers: Sequence[int] | None) -> list[int]:
    count = len(adapted.layers)
    if len({id(spec.module) for spec in adapted.layers}) < count:
        raise UnsupportedModel(f"layers of {type(adapted.base).__name__} share one module; each has to be its own")
    if layers is None:
        return list(range(count))
    for index in layers:
        if not -count <= index < count:
            raise ValueError(f"layer {index} does not exist: {type(adapted.base).__name__} has layers 0 to {count - 1}")
    return sorted({index % count for index in layers})


def _switches(base: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that keep the model from caching, or from collecting what nobody asked for."""
    switches: dict[str, Any] = {}
    if "use_cache" in kwargs or "use_cache" in inspect.signature(base.forward).parameters:
        switches["use_cache"] = False
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(getattr(base, "config", None), name, False):
            switches[name] = False
    return switches


def _hidden(output: Any) -> Tensor:
    """The final hidden states of a tensor, a tuple or a transformers ModelOutput."""
    found = output if isinstance(output, Tensor) else output[0] if not isinstance(output, dict) else None
    if found is None:
        found = next((value for value in output.values() if isinstance(value, Tensor)), None)
    if not isinstance(found, Tensor):
        raise CaptureError(f"the model returned a {type(output).__name__} that does not start with a tensor")
    return found


def _configs(base: nn.Module) -> list[Any]:
    """Each configuration of a transformers model or its parts that names an attention implementation."""
    configs = [getattr(module, "config", None) for module in base.modules()]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}.values())


@contextmanager
def _set_active(recorder: _Recorder | None) -> Iterator[None]:
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)


@contextmanager
def _no_fastpath() -> Iterator[None]:
    """PyTorch's fused encoder layer calls no hooks, and takes any float mask for a boolean one (NaN in torch 2.13)."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _uncompiled(base: nn.Module) -> Any:
    """Hooks added after torch.compile never fire in the compiled code, so what is compiled runs eagerly here."""
    compiled = any(
        getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in base.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
