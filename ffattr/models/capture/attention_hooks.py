"""Three ways to see the attention of a module while it runs: its queries, keys and mask, or else its weights.

Each is a context manager that calls ``sink(layer, Attention)`` and undoes everything on the way out.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...decomposition.attention import Attention, AttentionWeights, QueryKey
from ...errors import CaptureError, UnsupportedModel
from .passes import attach_hook, find_pass, share_change
from .run import list_configs

__all__ = [
    "Sink",
    "calls_interface",
    "read_implementation",
    "record_attention",
    "record_interface",
    "record_multihead",
    "record_own_attention",
]

Sink = Callable[[int, Attention], None]

# Keyword arguments through which a transformers attention function can be told to compute something else.
_CHANGING = ("sinks", "head_mask", "cache")
_EAGER = ("softcap", "s_aux")  # that transformers' sdpa does not read


@contextmanager
def record_attention(
    base: nn.Module, modules: Mapping[int, nn.Module], heads: Mapping[int, int], sink: Sink, wrappers: bool = True
) -> Iterator[None]:
    """Record the attention of each of ``modules`` of a model in the one way in which it can be seen.

    ``heads`` are their numbers of query heads. Without ``wrappers``, modules around an ``nn.MultiheadAttention`` or a
    caller of the attention interface are left out: its own softmax would be seen once more in their name.
    """
    torch_modules = {i: module for i, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    callers = {i: module for i, module in modules.items() if calls_interface(module)}
    others = {i: module for i, module in modules.items() if i not in torch_modules and i not in callers}
    if not wrappers:
        known = {id(module) for module in (*torch_modules.values(), *callers.values())}
        others = {i: module for i, module in others.items() if known.isdisjoint(map(id, module.modules()))}
    with ExitStack() as stack, stack:
        if torch_modules:
            stack.enter_context(record_multihead(torch_modules, sink))
        if callers:
            stack.enter_context(record_interface(list_configs(base.modules()), callers, sink))
        if others:
            stack.enter_context(record_own_attention(others, heads, sink))
        yield


def calls_interface(module: nn.Module) -> bool:
    """Tells whether a module finds its attention function through transformers' attention interface."""
    return _find_global(module, "ALL_ATTENTION_FUNCTIONS", None) is not None


@contextmanager
def record_interface(configs: Sequence[Any], modules: Mapping[int, nn.Module], sink: Sink) -> Iterator[None]:
    """Record transformers attention by wrapping the function that the model itself uses, under a private name.

    ``sdpa`` and ``eager`` run as they are; others (flash, flex), which need masks of their own, run as ``sdpa``.
    """
    index_of = {id(module): index for index, module in modules.items()}
    with ExitStack() as stack, stack:
        stack.callback(_listening.reset, _listening.set(_Listener(find_pass(), index_of, sink)))
        for config in configs:
            stack.enter_context(share_change(("attention of", id(config)), partial(_wrap_attention, config)))
        yield


@dataclass(frozen=True)
class _Listener:
    """Who hears of the attention of modules, by their ids, in a pass."""

    of_pass: object
    index_of: Mapping[int, int]
    sink: Sink


_listening: ContextVar[_Listener | None] = ContextVar("ffattr_listener", default=None)
_found: dict[int, str] = {}  # what configurations name themselves that name a wrapper now, by their ids


def read_implementation(config: Any) -> str:
    """Returns the attention implementation that a configuration names, while it is recorded as well."""
    return str(_found.get(id(config), config._attn_implementation_internal))


def _wrap_attention(config: Any, undo: ExitStack) -> None:
    """Has a configuration name a wrapper, for all passes at once."""
    found = config._attn_implementation_internal
    original = "eager" if found == "eager" else "sdpa"
    undo.enter_context(share_change(("attention function", original), partial(_register_function, original)))
    undo.callback(_found.pop, id(config), None)
    _found[id(config)] = found
    # Past the public setter, which would also change every nested configuration.
    undo.callback(setattr, config, "_attn_implementation_internal", found)
    config._attn_implementation_internal = _name_wrapper(original)


def _name_wrapper(original: str) -> str:
    return f"ffattr_capture_{original}"


def _register_function(original: str, undo: ExitStack) -> None:
    utils: Any = importlib.import_module("transformers.modeling_utils")
    masks: Any = importlib.import_module("transformers.masking_utils")
    functions, mask_functions, name = utils.AttentionInterface, masks.AttentionMaskInterface, _name_wrapper(original)
    undo.callback(functions._global_mapping.pop, name, None)
    undo.callback(mask_functions._global_mapping.pop, name, None)
    functions.register(name, _wrap_function(original, functions._global_mapping["sdpa"]))
    mask_functions.register(name, mask_functions._global_mapping[original])


def _wrap_function(original: str, sdpa: Callable[..., Any]) -> Callable[..., Any]:
    def attend_and_record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        listener = _listening.get()
        if listener is not None and listener.of_pass is find_pass() and id(module) in listener.index_of:
            attention = _hand_on_attention(module, query, key, attention_mask, original == "sdpa", kwargs)
            listener.sink(listener.index_of[id(module)], attention)
        function = sdpa
        if original == "eager":
            function = _find_global(module, "eager_attention_forward")
        elif (local := _find_global(module, "ALL_ATTENTION_FUNCTIONS", None)) is not None:
            function = local.get("sdpa", sdpa)  # a model may override it for itself
        return function(module, query, key, value, attention_mask, **kwargs)

    return attend_and_record


def _hand_on_attention(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, sdpa: bool, kwargs: Mapping[str, Any]
) -> QueryKey:
    what = type(module).__name__
    for name in (*_CHANGING, *_EAGER) if sdpa else _CHANGING:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"{what} passes {name!r} to its attention function, which no formula here covers")
    window = kwargs.get("sliding_window")
    if window is not None and mask is None and key.shape[-2] > window:
        raise UnsupportedModel(f"{what} has a 'sliding_window' of {window} for {key.shape[-2]} keys but no mask for it")
    scale = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    bias = kwargs.get("position_bias")
    return QueryKey(
        query=query,
        key=key,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        mask=mask,
        causal=sdpa and mask is None and query.shape[-2] > 1 and bool(causal),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        bias=None if bias is None else _add_dimensions(bias),
        rounds_to_float32=not sdpa,  # most of transformers' eager functions do
    )


_REQUIRED: Any = object()


def _find_global(module: nn.Module, name: str, default: Any = _REQUIRED) -> Any:
    """Returns a global of the file that defines the attention class, or a class it derives from."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if found is not None:
            return found
    if default is _REQUIRED:
        raise CaptureError(
            f"no {name} where {type(module).__name__} is defined, so its eager attention cannot be run. "
            'Call model.set_attn_implementation("sdpa").'
        )
    return default


@contextmanager
def record_multihead(modules: Mapping[int, nn.MultiheadAttention], sink: Sink) -> Iterator[None]:
    """Record ``nn.MultiheadAttention`` from what it reads. The fused fast path must be off."""
    with ExitStack() as stack, stack:
        for index, module in modules.items():
            hook = _make_multihead_hook(index, sink)
            attach_hook(stack, module.register_forward_pre_hook, hook, with_kwargs=True)
        yield


def _make_multihead_hook(index: int, sink: Sink) -> Callable[..., None]:
    names = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]

    def record_call(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key = _project_to_heads(module, given["query"], given["key"])
        batch, length, keys = len(query), query.shape[2], key.shape[2]
        mask, padding = (
            _make_additive(given.get("attn_mask"), query.dtype),
            _make_additive(given.get("key_padding_mask"), query.dtype),
        )
        # As in torch: the hint is believed, and the mask not read, where the two can be exchanged.
        causal = bool(given.get("is_causal")) and padding is None and not given.get("need_weights", True)
        if mask is not None:
            mask = None if causal else mask[None, None] if mask.dim() == 2 else mask.view(batch, -1, length, keys)
        if padding is not None:
            padding = padding.view(batch, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        sink(index, QueryKey(query, key, query.shape[-1] ** -0.5, mask, causal))

    return record_call


def _project_to_heads(module: nn.MultiheadAttention, x: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the queries of ``x`` and the keys of ``read``, ``[B, H, T, dh]``; of one tensor by one product."""
    width, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
    projections = (weight[:width], weight[width : 2 * width]) if weight is not None else ()
    projections = projections or (module.q_proj_weight, module.k_proj_weight)
    shifts = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])

    def split_heads(given: Tensor, weight: Tensor, bias: Tensor | None, parts: int = 1) -> Tensor:
        given = given[None] if given.dim() == 2 else given if module.batch_first else given.transpose(0, 1)
        made = nn.functional.linear(given, weight, bias)
        return made.view(*made.shape[:2], parts, module.num_heads, -1).permute(2, 0, 3, 1, 4)

    if x is read and weight is not None:
        query, key = split_heads(x, weight[: 2 * width], None if bias is None else bias[: 2 * width], 2)
        return query, key
    query, key = (split_heads(*one)[0] for one in zip((x, read), projections, shifts, strict=True))
    return query, key


def _make_additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a mask of PyTorch's own, where a boolean one is True where attention is forbidden, as an additive one."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)


@contextmanager
def record_own_attention(modules: Mapping[int, nn.Module], heads: Mapping[int, int], sink: Sink) -> Iterator[None]:
    """Record what any other module computes in its forward: ``scaled_dot_product_attention`` by its arguments,
    ``multi_head_attention_forward`` by another call, or else a softmax over the keys by its result, with the number of
    query heads of each layer's module in ``heads``."""
    running: list[int] = []
    with ExitStack() as stack, stack:
        for index, module in modules.items():

            def enter_module(module: nn.Module, args: Any, index: int = index) -> None:
                running.append(index)

            def leave_module(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                if running and running[-1] == index:  # called as well where a hook before `enter_module` failed
                    running.pop()

            attach_hook(stack, module.register_forward_pre_hook, enter_module)
            attach_hook(stack, module.register_forward_hook, leave_module, always_call=True, prepend=True)
        stack.enter_context(_AttentionWatch(running, heads, sink))
        yield


_SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax)  # nn.Softmax calls the first


class _AttentionWatch(TorchFunctionMode):
    def __init__(self, running: list[int], heads: Mapping[int, int], sink: Sink) -> None:
        super().__init__()
        self._running = running
        self._heads = heads
        self._sink = sink

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._running:
            return func(*args, **kwargs)
        index = self._running[-1]
        if func is nn.functional.scaled_dot_product_attention:
            self._sink(index, _read_sdpa_call(*args, **kwargs))
        if func is nn.functional.multi_head_attention_forward:
            self._sink(index, _read_torch_call(*args, **kwargs))
        result = func(*args, **kwargs)
        if func in _SOFTMAX:
            weights = _read_softmax(result, kwargs.get("dim", args[1] if len(args) > 1 else None), self._heads[index])
            if weights is not None:
                self._sink(index, weights)
        return result


def _read_softmax(result: Tensor, dim: int | None, heads: int) -> AttentionWeights | None:
    """Returns attention weights ``[B, H, T, T']``, or None for a softmax of anything else (a router's).

    ``heads`` below zero is a guess, or of cross-attention: heads and sequences on one axis are told apart by it; four
    dimensions speak for themselves, and of more, all but the last three are taken for sequences. 0: nothing is known,
    and three dimensions become ``[B * H, 1, T, T]``. Above zero, three of which the last two differ are a router's.
    """
    if dim not in (-1, result.dim() - 1):
        return None
    square = result.dim() == 3 and result.shape[1] == result.shape[2]
    if square and not heads:
        return AttentionWeights(result[:, None])
    if result.dim() == 3 and (heads < 0 or (heads and square)) and result.shape[0] % abs(heads) == 0:
        result = result.unflatten(0, (-1, abs(heads)))
    if result.dim() > 4 and heads <= 0:  # of windows or blocks, of which it is said that they are
        result = result.flatten(0, result.dim() - 4)
    if result.dim() != 4 or (heads > 0 and result.shape[1] != heads):
        return None
    return AttentionWeights(result)


def _read_torch_call(*args: Any, **kwargs: Any) -> AttentionWeights:
    """Returns the attention weights of a call of `torch.nn.functional.multi_head_attention_forward`, by another one
    that asks for those of every head."""
    function = nn.functional.multi_head_attention_forward
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    _, weights = function(**{**given, "need_weights": True, "average_attn_weights": False, "training": False})
    assert weights is not None
    return AttentionWeights(weights if weights.dim() == 4 else weights[None])


def _read_sdpa_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> QueryKey:
    if query.dim() != 4:
        raise CaptureError(f"scaled_dot_product_attention got queries {tuple(query.shape)}, expected [B, H, T, dh]")
    mask = None if attn_mask is None else _add_dimensions(attn_mask)
    return QueryKey(query, key, query.shape[-1] ** -0.5 if scale is None else float(scale), mask, is_causal)


def _add_dimensions(mask: Tensor) -> Tensor:
    """Returns a mask ``[..., T, T]`` with as many dimensions as ``[B, H, T, T]``."""
    return mask[(None,) * (4 - mask.dim())]
