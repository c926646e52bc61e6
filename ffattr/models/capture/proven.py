"""Which models recording was seen not to change, so that none is run a second time to see it once more.

That recording leaves a model's output as it is follows from the code that runs, not from numbers: from the modules with
their functions and hooks, and from what kind of inputs they get. What was seen holds while all of this is the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .attention_hooks import read_implementation
from .run import list_configs
from .user_hooks import list_user_hooks

__all__ = ["Code", "read_code"]


@dataclass
class _Seen:
    """The code of a model, by weak references and by value, and on which inputs it gave the same output."""

    objects: list[ref[Any]]
    values: Hashable
    inputs: set[Hashable]


_seen: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


@dataclass(frozen=True)
class Code:
    """What runs when ``base`` is called on ``inputs`` of a kind: ``objects`` by identity, ``values`` by value.

    ``runs_as_is``: recording runs the attention implementation that the model has, and no other one instead.
    """

    base: nn.Module
    objects: list[Any]
    values: Hashable
    inputs: Hashable
    runs_as_is: bool

    @property
    def is_proven(self) -> bool:
        """Whether the same code gave the same output while it was recorded."""
        found = self._find_seen()
        return found is not None and self.inputs in found.inputs

    def keep_proof(self) -> None:
        """Remembers that it did, by weak references to the model and its parts alone."""
        if not self.runs_as_is:
            return
        found = self._find_seen()
        if found is None:
            try:
                found = _Seen([ref(one) for one in self.objects], self.values, set())
            except TypeError:  # a function in C need not take weak references
                return
            _seen[self.base] = found
        found.inputs.add(self.inputs)

    def _find_seen(self) -> _Seen | None:
        found = _seen.get(self.base)
        if found is None or found.values != self.values or len(found.objects) != len(self.objects):
            return None
        same = all(one() is other for one, other in zip(found.objects, self.objects, strict=True))
        return found if same else None


def read_code(base: nn.Module, kwargs: Mapping[str, Any], layers: Sequence[int]) -> Code:
    """Reads what runs when ``base(**kwargs)`` is called and ``layers`` of it recorded; before any hooks are there.

    Hooks go by their numbers, which torch gives but once.
    """
    modules = list(base.modules())
    objects: list[Any] = []
    hooks: list[tuple[int, ...]] = [(*torch_module._global_forward_hooks, *torch_module._global_forward_pre_hooks)]
    kinds: set[tuple[torch.dtype, torch.device]] = set()
    for module in modules:
        forward = module.__dict__.get("forward")
        objects += (module, type(module).forward) if forward is None else (module, type(module).forward, forward)
        if module._forward_hooks or module._forward_pre_hooks:
            own = (list_user_hooks(module._forward_hooks), list_user_hooks(module._forward_pre_hooks))
            hooks += [(len(objects), *own[0], *own[1])] * any(own)
        kinds.update((part.dtype, part.device) for part in module._parameters.values() if part is not None)
    implementations = [read_implementation(config) for config in list_configs(modules)]
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    )
    values = (tuple(hooks), tuple(implementations), frozenset(kinds), autocast)
    inputs = (tuple(layers), tuple(sorted((name, _kind_of(name, value)) for name, value in kwargs.items())))
    return Code(base, objects, values, inputs, all(one in ("sdpa", "eager", "None") for one in implementations))


def _kind_of(name: str, value: object) -> str:
    """What a model may choose its way by: of a tensor the dtype, about how large it is, and whether it masks any."""
    if not isinstance(value, Tensor):
        return repr(value)
    masks = "mask" in name and not bool(value.bool().all())
    return f"{value.dtype} {[size.bit_length() for size in value.shape]}{' masks' * masks}"
