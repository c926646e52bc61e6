"""Which module of a loaded model plays which part: the registry of model families.

Built-in families are data (`families`); `register_adapter` adds one from outside the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from ..layer import LayerSpec
from . import huggingface, torch_encoder
from .families import FAMILIES

__all__ = ["Adapted", "known_models", "register_adapter", "resolve"]

Adapter = Callable[[nn.Module], Sequence[LayerSpec]]

_registered: dict[str, Adapter] = {}


@dataclass(frozen=True)
class Adapted:
    """A model as the decomposition sees it: the module whose forward is run, and its layers in order.

    ``base`` leaves heads out (no vocabulary-sized logits are computed). ``max_positions`` is the size of a learned
    position table, None where positions are not bounded by one.
    """

    base: nn.Module
    layers: tuple[LayerSpec, ...]
    family: str
    batch_first: bool = True
    max_positions: int | None = None


def register_adapter(model_type: str, fn: Adapter) -> None:
    """Describe a model family to ffattr: ``fn(base)`` returns one `LayerSpec` per layer.

    ``model_type`` is either a ``config.model_type`` or the class name of the model; it wins over a built-in family of
    the same name. ``base`` is ``model.base_model`` of a transformers model and the model itself otherwise. A layer
    takes ``[batch, T, d]`` (or ``[T, d]``) and returns the same shape. Its attention is recorded when the module named
    as ``attention`` calls transformers' attention interface, is an ``nn.MultiheadAttention``, or (outside transformers)
    calls ``torch.nn.functional.scaled_dot_product_attention`` directly.
    """
    if not isinstance(model_type, str) or not model_type:
        raise TypeError(f"model_type is {model_type!r}, expected the config.model_type or the class name as a string")
    if not callable(fn):
        raise TypeError(f"the adapter of {model_type!r} is {fn!r}, expected a function from a module to LayerSpecs")
    _registered[model_type] = fn


def known_models() -> tuple[str, ...]:
    """Every name that `resolve` recognises: built-in families and those added with `register_adapter`."""
    return tuple(sorted({*_registered, *FAMILIES, *torch_encoder.NAMES}))


def resolve(model: nn.Module) -> Adapted:
    """Describe a loaded model. Raises `UnsupportedModel` where no adapter knows it."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a loaded transformers model, an nn.TransformerEncoder or "
            "nn.TransformerEncoderLayer (a name or a path has to be loaded first)"
        )
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", ""))
    pretrained = _is_pretrained(model)
    base: nn.Module = getattr(model, "base_model", model) if pretrained else model
    base = getattr(base, "_orig_mod", base)
    for name in (model_type, *(cls.__name__ for cls in type(model).__mro__)):
        if name in _registered:
            return _adapt_registered(name, base, _registered[name])
    if isinstance(model, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        layers, batch_first = torch_encoder.adapt(model)
        return Adapted(model, layers, type(model).__name__, batch_first)
    if hasattr(model, "merge_and_unload"):
        raise UnsupportedModel(
            f"{type(model).__name__} carries unmerged adapters (PEFT), whose projections are not plain linear maps. "
            "Call model.merge_and_unload() and pass what it returns."
        )
    if pretrained and model_type in FAMILIES:
        layers, max_positions = huggingface.adapt(base, model_type)
        return Adapted(base, layers, model_type, max_positions=max_positions)
    raise UnsupportedModel(_unknown(model, model_type))


def _is_pretrained(model: nn.Module) -> bool:
    transformers: Any = sys.modules.get("transformers")  # a transformers model cannot exist before it is imported
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _adapt_registered(name: str, base: nn.Module, fn: Adapter) -> Adapted:
    layers = tuple(fn(base))
    if not layers or not all(isinstance(layer, LayerSpec) for layer in layers):
        raise TypeError(f"the adapter registered for {name!r} returned {layers!r}, expected one LayerSpec per layer")
    return Adapted(base, layers, name)


def _unknown(model: nn.Module, model_type: str) -> str:
    what = type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")
    return (
        f"{what} is an architecture that no adapter knows. Known: {', '.join(known_models())}. "
        "Describe its layers with ffattr.register_adapter(model_type, fn)."
    )
