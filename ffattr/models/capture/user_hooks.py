"""What hooks of the user change inside a layer: an input, or an output, to which they may add but a constant.

What they do to a layer's own input and output is none of its business: it is recorded in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..spec.layer import LayerSpec
from ..spec.weights import select_outputs
from .passes import Hook, attach_hook

__all__ = ["Change", "find_added", "list_user_hooks", "name_hook", "record_changes"]

# The parts of a layer in the order in which they run: what a module returns is what the last one of those in it does.
_PARTS = (
    "norm_before_attn",
    "value",
    "out",
    "norm_of_attn",
    "norm_after_attn",
    "cross.value",
    "cross.out",
    "cross.norm_after_attn",
    "norm_before_ff",
    "up",
    "gate",
    "activation",
    "down",
    "norm_of_ff",
    "norm_after_ff",
)
_ROUNDINGS = 16
"""Units of rounding by which a vector that was added to all tokens may differ from one to the other."""


@dataclass(frozen=True)
class Change:
    """One call of a module that a hook has changed; ``what`` says which, in words. ``parts`` are those of the layer
    that it may have added a constant to, and ``before`` and ``after`` the output: of an input nothing is kept."""

    what: str
    parts: tuple[str, ...] = ()
    before: Tensor | None = None
    after: Tensor | None = None


@contextmanager
def record_changes(specs: Mapping[int, LayerSpec], sink: Callable[[int, Change], None]) -> Iterator[None]:
    """Hand every change to ``sink(layer, change)``. To be entered before there are other hooks of the pass."""
    with ExitStack() as stack, stack:
        for number, spec in specs.items():
            for path, module in spec.module.named_modules():
                if path and list_user_hooks(module._forward_hooks):
                    _watch_output(stack, spec, path, module, functools.partial(sink, number))
                if path and list_user_hooks(module._forward_pre_hooks):
                    _watch_input(stack, path, module, functools.partial(sink, number))
        yield


def find_added(spec: LayerSpec, changes: Sequence[Change], mask: Tensor | None) -> dict[str, Tensor]:
    """Returns the vector that hooks have added to what each part of a layer returns, the same one for every token.

    ``mask``: which tokens are valid, in the layout of the hidden states. What is changed otherwise is left out.
    """
    found: dict[str, Tensor] = {}
    for change in changes:
        added = None if change.before is None or change.after is None else _find_constant(change, mask)
        for name in change.parts if added is not None else ():
            assert added is not None
            part = select_outputs(_get_part(spec, name), added)
            found[name] = found[name] + part if name in found else part
    return found


def _watch_output(
    stack: ExitStack, spec: LayerSpec, path: str, module: nn.Module, note: Callable[[Change], None]
) -> None:
    names = ", ".join(map(name_hook, list_user_hooks(module._forward_hooks).values()))
    what = f"what {path!r} ({type(module).__name__}) returns is changed by a hook ({names})"
    parts, running = _find_parts(spec, module), list[Tensor | None]()

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        first = _find_tensor(output)
        running.append(None if first is None else first.clone())

    def compare_output(module: nn.Module, args: Any, output: Any) -> None:
        before, after = running.pop(), _find_tensor(output)
        if before is None or after is None or before.shape != after.shape:
            note(Change(what))
        elif not torch.equal(before, after):
            note(Change(what, parts, before, after.clone()))

    attach_hook(stack, module.register_forward_hook, keep_output, prepend=True)
    attach_hook(stack, module.register_forward_hook, compare_output)


def _watch_input(stack: ExitStack, path: str, module: nn.Module, note: Callable[[Change], None]) -> None:
    names = ", ".join(map(name_hook, list_user_hooks(module._forward_pre_hooks).values()))
    what = f"what {path!r} ({type(module).__name__}) reads is changed by a hook ({names})"
    running: list[list[Tensor]] = []

    def list_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append([value.clone() for value in list_tensors(args, kwargs)])

    def compare_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before, after = running.pop(), list_tensors(args, kwargs)
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            note(Change(what))

    attach_hook(stack, module.register_forward_pre_hook, keep_input, prepend=True, with_kwargs=True)
    attach_hook(stack, module.register_forward_pre_hook, compare_input, with_kwargs=True)


def list_user_hooks(hooks: Mapping[int, Callable[..., Any]]) -> dict[int, Callable[..., Any]]:
    """Returns the hooks of a module that are the user's, by their numbers, and none of a pass, this or another one."""
    return {number: hook for number, hook in list(hooks.items()) if not isinstance(hook, Hook)}


def name_hook(hook: Callable[..., Any]) -> str:
    """Returns what a hook is called: by its function or, where it is an object, by its class."""
    return getattr(hook, "__qualname__", type(hook).__name__).replace("<locals>.", "")


def _find_tensor(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def _get_part(spec: LayerSpec, name: str) -> Any:
    owner, _, field = name.rpartition(".")
    source: Any = spec.cross if owner else spec
    return getattr(source, field, None)


def _find_parts(spec: LayerSpec, module: nn.Module) -> tuple[str, ...]:
    """Returns the parts that a module is, in whole or by some of its columns, or else the last one that lies in it."""
    if spec.experts is not None and any(module is one for one in spec.experts.modules()):
        return ()
    parts = {name: _get_part(spec, name) for name in _PARTS}
    modules = {name: getattr(part, "module", part) for name, part in parts.items() if part is not None}
    same = tuple(name for name, one in modules.items() if one is module)
    if same:
        return same
    inside = {id(one) for one in module.modules()}
    last = next((name for name in reversed(modules) if id(modules[name]) in inside), None)
    return () if last is None or (spec.experts is not None and last == "down") else (last,)


def _find_constant(change: Change, mask: Tensor | None) -> Tensor | None:
    """Returns the vector ``[width]`` by which the outputs of all valid tokens differ; None where they differ otherwise,
    or where there is but one token, which nobody can tell a constant by."""
    assert change.before is not None
    assert change.after is not None
    before, after = (one.flatten(0, -2).double() for one in (change.before, change.after))
    if mask is not None and mask.numel() == len(before):
        kept = mask.flatten().to(before.device)
        before, after = before[kept], after[kept]
    if len(before) < 2:
        return None
    difference = after - before
    constant = difference.mean(0)
    eps = torch.finfo(change.before.dtype).eps
    largest = float(torch.maximum(before.norm(dim=-1), after.norm(dim=-1)).max())
    spread = float((difference - constant).norm(dim=-1).max())
    return constant if spread <= _ROUNDINGS * eps * largest else None
