"""Which module of a loaded model plays which part: the registry of model families.

Built-in families are data (`families`); `register_adapter` adds one from outside the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from . import huggingface, torch_encoder
from .families.table import FAMILIES
from .spec.described import ModelDescription
from .spec.layer import LayerSpec
from .spec.wrapped import is_from

__all__ = ["ModelDescription", "known_models", "register_adapter", "resolve", "unwrap_model"]

Adapter = Callable[[nn.Module], Sequence[LayerSpec]]

_registered: dict[str, Adapter] = {}
_PEFT_KINDS = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")  # beside those that add tokens


def register_adapter(model_type: str, fn: Adapter) -> None:
    """Describe a model family to ffattr: ``fn(base)`` returns one `LayerSpec` per layer.

    ``model_type`` is either a ``config.model_type`` or the class name of the model; it wins over a built-in family of
    the same name. ``base`` is ``model.base_model`` of a transformers model and the model itself otherwise. A layer
    takes ``[batch, T, d]`` (or ``[T, d]``) and returns the same shape. Its attention is recorded when the module named
    as ``attention`` calls transformers' attention interface, is an ``nn.MultiheadAttention``, or calls, once, either
    ``torch.nn.functional.scaled_dot_product_attention`` or a softmax of ``[batch, heads, T, T]`` over the keys.

    >>> class Stack(torch.nn.Sequential):
    ...     pass
    >>> def adapter(stack):
    ...     return [
    ...         ffattr.LayerSpec(
    ...             module=layer, attention=layer.self_attn, heads=2, kv_heads=2,
    ...             value=ffattr.Columns(layer.self_attn, 16, 24), out=layer.self_attn.out_proj,
    ...             up=layer.linear1, down=layer.linear2, activation=layer.activation,
    ...             norm_after_attn=layer.norm1, norm_after_ff=layer.norm2,
    ...         )
    ...         for layer in stack
    ...     ]
    >>> ffattr.register_adapter("Stack", adapter)
    >>> stack = Stack(*(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))).eval()
    >>> ffattr.attribute(stack, torch.randn(1, 5, 8))
    Attribution(2 layers, 1 x 5 tokens, 5 queries, scopes: atb_ff_res_ln)
    """
    if not isinstance(model_type, str) or not model_type:
        raise TypeError(f"model_type is {model_type!r}, expected the config.model_type or the class name as a string")
    if not callable(fn):
        raise TypeError(f"the adapter of {model_type!r} is {fn!r}, expected a function from a module to LayerSpecs")
    _registered[model_type] = fn


def known_models() -> tuple[str, ...]:
    """Lists every name that `resolve` recognises: built-in families and those added with `register_adapter`.

    >>> "bert" in ffattr.known_models(), "TransformerEncoderLayer" in ffattr.known_models()
    (True, True)
    """
    return tuple(sorted({*_registered, *FAMILIES, *torch_encoder.NAMES}))


def resolve(model: nn.Module) -> ModelDescription:
    """Describe a loaded model, one that no adapter knows by its structure (which runs it on a few tokens).

    Raises `UnsupportedModel` where neither finds a description that reproduces its layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a loaded transformers model, an nn.TransformerEncoder or "
            "nn.TransformerEncoderLayer (a name or a path has to be loaded first)"
        )
    model = unwrap_model(model)
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", ""))
    pretrained = _is_pretrained(model)
    base: nn.Module = getattr(model, "base_model", model) if pretrained else model
    base = getattr(base, "_orig_mod", base)
    for name in (model_type, *(cls.__name__ for cls in type(model).__mro__)):
        if name in _registered:
            return _adapt_registered(name, base, _registered[name])
    if isinstance(model, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        layers, batch_first = torch_encoder.describe_encoder(model)
        return ModelDescription(model, layers, type(model).__name__, batch_first)
    parts = {name: child for name, child in base.named_children() if _is_pretrained(child)}
    if pretrained and len(parts) == 1 and not parts.keys().isdisjoint(("text_model", "vision_model")):
        return resolve(*parts.values())  # a head on one of CLIP's towers
    if pretrained and model_type in FAMILIES:
        return huggingface.describe_pretrained(base, model_type)
    if pretrained and parts.keys() >= {"text_model", "vision_model"}:
        raise UnsupportedModel(
            f"{type(model).__name__} has two towers, each with inputs of its own. Pass model.text_model or "
            "model.vision_model instead."
        )
    return _describe_by_structure(model, model_type, base)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Returns the model in torch.compile's wrapper and in PEFT's, whose adapters its layers keep.

    Raises `UnsupportedModel` where a wrapper does more.
    """
    return _without_peft(getattr(model, "_orig_mod", model))


def _is_pretrained(model: Any) -> bool:
    transformers: Any = sys.modules.get("transformers")  # a transformers model cannot exist before it is imported
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _without_peft(model: nn.Module) -> nn.Module:
    """Returns the model that PEFT wraps, whose layers keep the adapters. Raises `UnsupportedModel` where more runs."""
    while is_from(model, "peft"):
        wrapper: Any = model
        for name in wrapper.active_adapters:
            config = wrapper.peft_config[name]
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            invoked = getattr(config, "alora_invocation_tokens", None) is not None
            if config.is_prompt_learning or kind in _PEFT_KINDS or invoked:
                raise UnsupportedModel(
                    f"adapter {name!r} of {type(model).__name__} is {kind}{' with invocation tokens' * invoked}, which "
                    "adds tokens or changes more of the forward pass than projections and norms. Pass the model "
                    "without it."
                )
        model = wrapper.base_model if "base_model" in model._modules else wrapper.model
    return model


def _adapt_registered(name: str, base: nn.Module, fn: Adapter) -> ModelDescription:
    layers = tuple(fn(base))
    if not layers or not all(isinstance(layer, LayerSpec) for layer in layers):
        raise TypeError(f"the adapter registered for {name!r} returned {layers!r}, expected one LayerSpec per layer")
    return ModelDescription(base, layers, name)


def _describe_by_structure(model: nn.Module, model_type: str, base: nn.Module) -> ModelDescription:
    from .detection import detect, template  # which most models do without

    try:
        return detect.describe_by_structure(base)
    except detect.Undetected as gave_up:
        what = type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")
        raise UnsupportedModel(
            f"{what} is an architecture that no adapter knows. Known: {', '.join(known_models())}. "
            "Describe its layers with ffattr.register_adapter(model_type, fn).\n"
            f"Its structure was not found either: {gave_up.reason}.\n\n"
            f"{template.explain_failure(base, model_type or type(model).__name__, gave_up.layers, gave_up.parts)}"
        ) from None
