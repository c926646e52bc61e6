"""Devices that are only pretended: every tensor has a place, and meeting another place is the error that GPUs raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

HERE, THERE = torch.device("cpu"), torch.device("cpu", 1)


class TwoDevices(TorchFunctionMode):
    """``.to(THERE)`` and ``device=THERE`` put tensors there; results are where their operands were."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return place(args[0])
        if func is Tensor.to:
            asked = [place(one) if isinstance(one, Tensor) else one for one in (*args[1:], *kwargs.values())]
            found = next((one for one in asked if isinstance(one, torch.device)), place(args[0]))
            return put(func(*args, **kwargs).view(args[0].shape), found)  # another object, whatever `to` returns
        copies = func is Tensor.copy_ or (func is Tensor.__setitem__ and not _tensors_in(args[1]))
        places = {place(one) for one in tensors if one.dim()} or {place(one) for one in tensors[:1]}  # numbers may meet
        if len(places) > 1 and not copies:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {places}")
        asked_for = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        found = asked_for or (place(args[0]) if copies else next(iter(places), HERE))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda one: put(one, found), result)


def put(tensor: Tensor, where: torch.device) -> Tensor:
    tensor.place = where  # type: ignore[attr-defined]
    return tensor


def place(tensor: Tensor) -> torch.device:
    return getattr(tensor, "place", HERE)


def put_module(module: nn.Module) -> None:
    """Parameters and inputs of the module, as accelerate does it: hooks see the inputs where they came from."""
    for tensor in (*module.parameters(), *module.buffers()):
        put(tensor, THERE)
    forward = module.forward

    def moved(*args: Any, **kwargs: Any) -> Any:
        return forward(*tree_map_only(Tensor, _there, args), **tree_map_only(Tensor, _there, kwargs))

    module.forward = moved


def _there(tensor: Tensor) -> Tensor:
    return tensor.to(THERE)


def _tensors_in(index: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dim() for one in tree_flatten(index)[0])
