"""What hooks of the user change inside a layer: an input, or an output, of which they may scale and shift each
feature, or take some directions out, every token's alike (steering; ablation of a block, of heads, neurons or
directions, to zero or to a mean).

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

from ...decomposition.layer import Edit
from ..spec.layer import LayerSpec
from ..spec.weights import Scaled, select_outputs
from .passes import Hook, attach_hook

__all__ = ["Change", "find_edits", "list_user_hooks", "name_hook", "record_changes", "set_hooks_aside"]

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
_PROJECTIONS = ("value", "out", "cross.value", "cross.out", "up", "gate", "down")
"""Those whose input may be changed: what reads it is another matrix then."""
_ROUNDINGS = 16
"""Units of rounding by which what a hook makes of a feature may differ from one token to the other."""
_FEWEST = 3
"""Tokens by which a factor is told: two lie on some line whatever was done to them."""


@dataclass(frozen=True)
class Change:
    """One call of a module that a hook has changed; ``what`` says which, in words. ``parts`` are those of the layer
    whose output ``before`` became ``after``, or whose input did, where it is one that they ``read``."""

    what: str
    parts: tuple[str, ...] = ()
    before: Tensor | None = None
    after: Tensor | None = None
    read: bool = False


@contextmanager
def record_changes(specs: Mapping[int, LayerSpec], sink: Callable[[int, Change], None]) -> Iterator[None]:
    """Hand every change to ``sink(layer, change)``. To be entered before there are other hooks of the pass."""
    with ExitStack() as stack, stack:
        for number, spec in specs.items():
            for path, module in spec.module.named_modules():
                if path and list_user_hooks(module._forward_hooks):
                    _watch_output(stack, spec, path, module, functools.partial(sink, number))
                if path and list_user_hooks(module._forward_pre_hooks):
                    _watch_input(stack, spec, path, module, functools.partial(sink, number))
        yield


@contextmanager
def set_hooks_aside(base: nn.Module) -> Iterator[bool]:
    """Has the modules inside a model run without the user's hooks; yields whether there are any."""
    every = [one._forward_hooks for one in base.modules() if one is not base]
    every += [one._forward_pre_hooks for one in base.modules() if one is not base]
    kept = [(hooks, own) for hooks in every if (own := list_user_hooks(hooks))]

    def put_back() -> None:
        for hooks, own in kept:
            hooks.update(own)

    with ExitStack() as stack, stack:
        for _ in range(2):  # should the first be interrupted
            stack.callback(put_back)
        for hooks, own in kept:
            for number in own:
                hooks.pop(number, None)
        yield bool(kept)


def find_edits(spec: LayerSpec, changes: Sequence[Change], mask: Tensor | None) -> tuple[Edit, ...]:
    """Returns what hooks have made of what each part of a layer returns or reads, the same of every token.

    ``mask``: which tokens are valid, in the layout of the hidden states. What is changed otherwise is left out.
    """
    found = []
    for change in changes:
        fitted = None if change.before is None or change.after is None else _fit_features(change, mask)
        if fitted is None:
            found += _find_removals(spec, change, mask)
            continue
        factor, constant = fitted
        for name in change.parts:
            part = _get_part(spec, name)
            if change.read:
                found.append(Edit(name, constant, factor, reads=True))
                continue
            whole = part.module if isinstance(part, Scaled) else part
            scale = None if factor is None else select_outputs(whole, factor)
            found.append(Edit(name, select_outputs(part, constant), scale))
    return tuple(found)


def _find_removals(spec: LayerSpec, change: Change, mask: Tensor | None) -> list[Edit]:
    """Returns the directions that a hook has taken out of what parts of a layer return or read; nothing where it did
    something else, or where no other matrix of the part's is that."""
    if change.before is None or change.after is None or not change.parts:
        return []
    known = [name for name in change.parts if change.read or _can_lose_directions(spec, name)]
    removed = _fit_directions(change, mask) if len(known) == len(change.parts) else None
    if removed is None:
        return []
    return [Edit(name, removed[1], reads=change.read, removed=removed[0]) for name in known]


def _can_lose_directions(spec: LayerSpec, name: str) -> bool:
    """Tells a whole projection, whose matrix is another one then, and the norm before attention, which values read: all
    others are norms behind which a scope lies, and act on each feature alone."""
    return name == "norm_before_attn" or (name in _PROJECTIONS and isinstance(_get_part(spec, name), nn.Module))


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


def _watch_input(
    stack: ExitStack, spec: LayerSpec, path: str, module: nn.Module, note: Callable[[Change], None]
) -> None:
    names = ", ".join(map(name_hook, list_user_hooks(module._forward_pre_hooks).values()))
    what = f"what {path!r} ({type(module).__name__}) reads is changed by a hook ({names})"
    running: list[list[Tensor]] = []
    parts = tuple(name for name in _find_parts(spec, module, inside=False) if name in _PROJECTIONS)

    def list_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append([value.clone() for value in list_tensors(args, kwargs)])

    def compare_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before, after = running.pop(), list_tensors(args, kwargs)
        if len(before) != len(after) or not all(map(torch.equal, before[1:], after[1:])):
            note(Change(what))
        elif before and not torch.equal(before[0], after[0]):
            same = before[0].shape == after[0].shape
            note(Change(what, parts, before[0], after[0].clone(), True) if same else Change(what))

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


def _find_parts(spec: LayerSpec, module: nn.Module, inside: bool = True) -> tuple[str, ...]:
    """Returns the parts that a module is, in whole or by some of its columns, or else the last one that lies in it,
    where it is asked for what is ``inside``."""
    if spec.experts is not None and any(module is one for one in spec.experts.modules()):
        return ()
    parts = {name: _get_part(spec, name) for name in _PARTS}
    modules = {name: getattr(part, "module", part) for name, part in parts.items() if part is not None}
    same = tuple(name for name, one in modules.items() if one is module)
    if same or not inside:
        return same
    lying = {id(one) for one in module.modules()}
    last = next((name for name in reversed(modules) if id(modules[name]) in lying), None)
    return () if last is None or (spec.experts is not None and last == "down") else (last,)


def _list_rows(change: Change, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns what all valid tokens were and what they became, ``[tokens, width]``, in float64."""
    assert change.before is not None
    assert change.after is not None
    before, after = (one.flatten(0, -2).double() for one in (change.before, change.after))
    if mask is not None and mask.numel() == len(before):
        kept = mask.flatten().to(before.device)
        before, after = before[kept], after[kept]
    return before, after


def _fit_directions(change: Change, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Returns orthonormal directions ``[k, width]`` of which all valid tokens were left nothing, and what was added.

    The directions are those in which tokens differ by what was done to them. None where what was done is something
    else, or the tokens are too few to tell: so many directions take twice as many of them, and one more.
    """
    assert change.before is not None
    before, after = _list_rows(change, mask)
    most = (len(before) - 1) // 2
    if most < 1:
        return None
    taken = before - after
    constant = taken.mean(0)
    limit = _ROUNDINGS * torch.finfo(change.before.dtype).eps * float(torch.maximum(before.abs(), after.abs()).max())
    _, sizes, rows = torch.linalg.svd(taken - constant, full_matrices=False)
    count = int((sizes > limit * len(before) ** 0.5).sum())
    if not 0 < count <= most:
        return None
    directions = rows[:count]
    centred = before - before.mean(0)
    rest = taken - constant - (centred @ directions.mT) @ directions
    if float(rest.abs().max()) > limit:
        return None
    return directions, (before.mean(0) @ directions.mT) @ directions - constant


def _fit_features(change: Change, mask: Tensor | None) -> tuple[Tensor | None, Tensor] | None:
    """Returns by what every feature of all valid tokens is multiplied, ``[width]`` (None: by one), and what is added.

    None where they differ otherwise, or are too few to tell: a constant takes two tokens, a factor three.
    """
    assert change.before is not None
    before, after = _list_rows(change, mask)
    if len(before) < _FEWEST - 1:
        return None
    limit = _ROUNDINGS * torch.finfo(change.before.dtype).eps * torch.maximum(before.abs(), after.abs()).amax(0)
    ones = torch.ones_like(before[0])
    factor = _fit_factor(before, after) if len(before) >= _FEWEST else ones
    # Zero and one are what a factor mostly is, and then exactly so.
    for exact in (torch.zeros_like(ones), ones):
        factor = torch.where(_spread(before, after, exact) <= limit, exact, factor)
    if bool((_spread(before, after, factor) > limit).any()):
        return None
    constant = (after - factor * before).mean(0)
    return (None if torch.equal(factor, ones) else factor), constant


def _fit_factor(before: Tensor, after: Tensor) -> Tensor:
    """Returns the slope of the line through what each feature became, by least squares."""
    centred = before - before.mean(0)
    return (centred * after).sum(0) / centred.square().sum(0).clamp_min(torch.finfo(before.dtype).tiny)


def _spread(before: Tensor, after: Tensor, factor: Tensor) -> Tensor:
    """Returns by how much the tokens differ in what is added to each feature, at the most."""
    added = after - factor * before
    return (added - added.mean(0)).abs().amax(0)
