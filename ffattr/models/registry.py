"""Which module of a loaded model plays which part: the registry of model families.

Built-in families are data (`families`); `register_adapter` adds one from outside the package.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from ..errors import CaptureError, UnsupportedModel
from . import huggingface, torch_decoder, torch_encoder
from .families.table import FAMILIES
from .spec.described import ModelDescription
from .spec.layer import LayerSpec
from .spec.wrapped import is_from

__all__ = ["ModelDescription", "known_models", "register_adapter", "resolve", "unwrap_model"]

Adapter = Callable[[nn.Module], Sequence[LayerSpec]]

_registered: dict[str, tuple[Adapter, bool]] = {}
"""What users have registered, and whether it takes ``[batch, T, d]``."""
_WRAPPERS = ("AveragedModel", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")
_PEFT_KINDS = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")  # beside those that add tokens


def register_adapter(model_type: str, fn: Adapter, batch_first: bool = True) -> None:
    """Describe a model family to ffattr: ``fn(base)`` returns one `LayerSpec` per layer.

    ``model_type`` is either a ``config.model_type`` or the class name of the model; it wins over a built-in family of
    the same name. ``base`` is ``model.base_model`` of a transformers model and the model itself otherwise. A layer
    takes ``[batch, T, d]`` (or ``[T, d]``; not ``batch_first``: ``[T, batch, d]``) and returns the same shape. Its
    attention is recorded when the module named as ``attention`` calls transformers' attention interface, is an
    ``nn.MultiheadAttention``, or calls, once, either ``torch.nn.functional.scaled_dot_product_attention`` or a softmax
    of ``[batch, heads, T, T]`` over the keys. A layer whose spec has a ``cross`` attends to tokens from elsewhere, too.

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
    _registered[model_type] = fn, batch_first


def known_models() -> tuple[str, ...]:
    """Lists every name that `resolve` recognises: built-in families and those added with `register_adapter`.

    >>> "bert" in ffattr.known_models(), "TransformerEncoderLayer" in ffattr.known_models()
    (True, True)
    """
    return tuple(sorted({*_registered, *FAMILIES, *torch_encoder.NAMES, *torch_decoder.NAMES}))


Given = Callable[[nn.Module], Mapping[str, Any]]
"""Makes keyword arguments for the forward of a module of what a user passed."""


def resolve(model: nn.Module, given: Given | None = None) -> ModelDescription:
    """Describe a loaded model, one that no adapter knows by its structure: as it runs on ``given``, which is asked for
    arguments then (None: on a few tokens).

    A wrapper around one model that is known has the layers of that model. Raises `UnsupportedModel` where no
    description is found that reproduces its layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a loaded transformers model, or an nn.TransformerEncoder, "
            "nn.TransformerDecoder or other nn.Module (a name or a path has to be loaded first)"
        )
    model = unwrap_model(model)
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", ""))
    pretrained = _is_pretrained(model)
    base: nn.Module = _find_base(model) if pretrained else model
    base = getattr(base, "_orig_mod", base)
    refused: UnsupportedModel | None = None
    try:
        found = _describe_known(model, base, model_type)
    except UnsupportedModel as reason:
        if not pretrained or not {model_type, *(cls.__name__ for cls in type(model).__mro__)}.isdisjoint(_registered):
            raise  # whoever registered the adapter has the last word, and PyTorch's encoders have no versions
        found, refused = None, reason  # a version or a variant that its family does not describe
    if found is not None:
        return found
    parts = {name: child for name, child in base.named_children() if _is_pretrained(child)}
    if pretrained and len(parts) == 1 and not parts.keys().isdisjoint(("text_model", "vision_model")):
        return resolve(*parts.values())  # a head on one of CLIP's towers
    if not pretrained:
        inner = _find_known(base)
        for path, known in inner.items() if len(inner) == 1 else ():
            description = replace(known, base=base, learned=True)
            if _attends(description, path, given):
                return description
    try:
        return _describe_by_structure(model, model_type, base, given)
    except UnsupportedModel as reason:
        raise (reason if refused is None else UnsupportedModel(f"{refused} Beyond its family: {reason}")) from None


def _find_base(model: Any) -> nn.Module:
    """Returns the model without its head: what it calls so, unless that is an inner part with other inputs."""
    base: nn.Module = model.base_model
    of_model, of_base = (inspect.signature(one.forward).parameters for one in (model, base))
    return model if model.main_input_name in of_model and model.main_input_name not in of_base else base


def _unwrap(model: nn.Module) -> nn.Module:
    """Returns what a wrapper runs that adds nothing to it: torch.compile's, those for several devices, averages."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in _WRAPPERS:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _describe_known(model: nn.Module, base: nn.Module, model_type: str) -> ModelDescription | None:
    """Describes a model that an adapter knows."""
    for name in (model_type, *(cls.__name__ for cls in type(model).__mro__)):
        if name in _registered:
            return _adapt_registered(name, base, *_registered[name])
    if isinstance(model, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        layers, batch_first = torch_encoder.describe_encoder(model)
        return ModelDescription(model, layers, type(model).__name__, batch_first)
    if isinstance(model, torch_decoder.KINDS):
        return torch_decoder.describe_with_memory(model)
    if not _is_pretrained(model) or model_type not in FAMILIES:
        return None
    return huggingface.describe_pretrained(base, model_type)


def _find_known(base: nn.Module) -> dict[str, ModelDescription]:
    """Finds the models inside another module that adapters know, by their paths, none inside another one."""
    found: dict[str, ModelDescription] = {}

    def search_children(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            inner = unwrap_model(child)
            config = getattr(inner, "config", None)
            of_head = _find_base(inner) if _is_pretrained(inner) else inner
            try:
                known = _describe_known(inner, of_head, str(getattr(config, "model_type", "")))
            except UnsupportedModel:
                known = None
            if known is not None:
                found[where] = known
            else:
                search_children(child, where)

    search_children(base, "")
    return found


def _attends(description: ModelDescription, path: str, given: Given | None) -> bool:
    """Tells whether the one known model inside another one, at ``path``, is what runs: tried only where there are
    other layers, too, and something to run it on."""
    from .capture.recorder import record_first_attention
    from .detection import probe

    others = [stack for stack in probe.find_stacks(description.base) if not f"{stack}.".startswith(f"{path}.")]
    if not others or given is None:
        return True
    try:
        record_first_attention(description, given(description.base))
    except CaptureError:
        return False
    except Exception:  # which whoever runs it is told
        return True
    return True


def unwrap_model(model: nn.Module) -> nn.Module:
    """Returns the model in the wrappers that add nothing to it, and in PEFT's, whose adapters its layers keep.

    Raises `UnsupportedModel` where a wrapper does more.
    """
    return _without_peft(_unwrap(model))


def _is_pretrained(model: Any) -> bool:
    utils: Any = sys.modules.get("transformers.modeling_utils")  # without which no transformers model can exist
    return utils is not None and isinstance(model, utils.PreTrainedModel)


def _without_peft(model: nn.Module) -> nn.Module:
    """Returns the model that PEFT wraps, whose layers keep the adapters. Raises `UnsupportedModel` where more runs."""
    while is_from(model, "peft") and hasattr(model, "peft_config"):  # which single layers of PEFT have not
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


def _adapt_registered(name: str, base: nn.Module, fn: Adapter, batch_first: bool) -> ModelDescription:
    layers = tuple(fn(base))
    if not layers or not all(isinstance(layer, LayerSpec) for layer in layers):
        raise TypeError(f"the adapter registered for {name!r} returned {layers!r}, expected one LayerSpec per layer")
    for number, layer in enumerate(layers):
        missing = [field.name for field in fields(layer) if getattr(layer, field.name) is ...]
        if missing:
            raise UnsupportedModel(
                f"the adapter registered for {name!r} leaves out what is {', '.join(missing)} in layer {number}: put "
                "a module in place of '...', or leave a norm out that the layer does not have"
            )
    across = {"decoder": range(len(layers))} if all(layer.cross is not None for layer in layers) else {}
    return ModelDescription(base, layers, name, batch_first, stacks=across, learned=True)


def _describe_by_structure(model: nn.Module, model_type: str, base: nn.Module, given: Given | None) -> ModelDescription:
    from .detection import detect, template  # which most models do without

    try:
        return detect.describe_by_structure(base, given)
    except detect.Undetected as gave_up:
        what = type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")
        hint = _suggest_parts(base, gave_up.owners, given)
        raise UnsupportedModel(
            f"no adapter knows {what}, and its structure was not found: {gave_up.reason}.{hint} Describe its "
            "layers with ffattr.register_adapter(model_type, fn); ffattr.known_models() lists what needs no "
            "description.\n\n"
            f"{template.explain_failure(base, model_type or type(model).__name__, gave_up)}"
        ) from None


def _suggest_parts(base: nn.Module, owners: Sequence[str], given: Given | None) -> str:
    """Says which parts of a model are mapped, among ``owners`` of layers that attend and models that are known."""
    from .detection import probe
    from .working_parts import try_parts

    inside = {path: f"model.{path} ({known.family})" for path, known in _find_known(base).items()}
    paths = dict.fromkeys((*owners, *inside))
    if not paths:
        return ""
    tried = try_parts(base, list(paths), probe.make_inputs(base) if given is None else [given(base)], resolve)
    mapped = [f"model.{path} ({family})" for path, family in tried.mapped.items()]
    untried = [inside[path] for path in tried.untried if path in inside]
    hint = ""
    if mapped:
        hint = f" A part of it is mapped, as tried on what it gets here: pass {' or '.join(mapped)}, with such inputs."
    if untried:
        hint += f" Inside, but not tried, since it did not run here: {' or '.join(untried)}, with inputs of its own."
    return hint
