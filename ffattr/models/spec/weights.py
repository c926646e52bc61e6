"""Projections: what adapters name of a model, and the parameters that are read from it.

Conventions: row vectors, ``y = x @ weight + bias``; ``d`` model width, ``F`` feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...decomposition.affine import Linear
from ...errors import UnsupportedModel
from . import wrapped

__all__ = ["Columns", "ParameterRef", "Scaled", "read_linear", "select_outputs"]


@dataclass(frozen=True)
class ParameterRef:
    """A parameter by the module that holds it, from where it can be fetched if it is offloaded."""

    module: nn.Module
    name: str


@dataclass(frozen=True)
class Columns:
    """Output features ``start:stop`` of a fused projection, for instance the value third of GPT-2's ``c_attn``.

    With ``groups``, of each of so many equal groups of them: GPT-NeoX has query, key and value of a head side by side.
    ``bias`` ``[features]`` is added to what the projection gives (DeBERTa).

    >>> fused = torch.nn.Linear(8, 24)  # query, key and value in one
    >>> ffattr.Columns(fused, 16, 24)
    Columns(module=Linear(in_features=8, out_features=24, bias=True), start=16, stop=24, groups=1, bias=None)
    >>> ffattr.Columns(fused, 8, 12, groups=2).groups  # two heads of query, key and value with four features each
    2
    """

    module: nn.Module
    start: int
    stop: int
    groups: int = 1
    bias: Tensor | ParameterRef | None = None


@dataclass(frozen=True)
class Scaled:
    """A projection whose output features are multiplied by ``factor`` ``[out]`` afterwards: LayerScale."""

    module: nn.Module
    factor: Tensor | ParameterRef


def read_linear(module: nn.Module | Columns | Scaled, dtype: torch.dtype | None) -> Linear:
    """Reads what a projection computes, in ``dtype`` (None: as it is, and nothing copied of what is there).

    Raises `UnsupportedModel` for a module that is not known to be linear.
    """
    if isinstance(module, Columns):
        whole = read_linear(module.module, dtype)
        part, groups = slice(module.start, module.stop), module.groups
        bias = None if whole.bias is None else whole.bias.view(groups, -1)[:, part].flatten()
        bias = _add_optional(bias, None if module.bias is None else _fetch_parameter(module.bias, dtype))
        if groups == 1:
            return Linear(whole.weight[:, part], bias)
        return Linear(whole.weight.unflatten(1, (groups, -1))[:, :, part].flatten(1), bias)
    if isinstance(module, Scaled):
        whole, factor = read_linear(module.module, dtype), _fetch_parameter(module.factor, dtype)
        return Linear(whole.weight * factor, None if whole.bias is None else whole.bias * factor)
    module = wrapped.find_running(module)
    if wrapped.is_from(module, "peft") and hasattr(module, "base_layer"):
        return _read_with_adapters(module, dtype)
    with wrapped.fetch_parameters(module):
        weight, bias = _read_weight_and_bias(module)
    return Linear(_fetch_parameter(weight, dtype), None if bias is None else _fetch_parameter(bias, dtype))


def select_outputs(part: object, vector: Tensor) -> Tensor:
    """Returns what becomes of ``vector`` ``[features]``, added to what the module of a projection returns."""
    if isinstance(part, Columns):
        return vector.view(part.groups, -1)[:, part.start : part.stop].flatten()
    return vector * _fetch_parameter(part.factor, vector.dtype) if isinstance(part, Scaled) else vector


def _read_weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Reads weight ``[in, out]`` and bias ``[out]`` of a module, as `Linear` has them."""
    parts: Any = module
    # Exact types: a subclass may compute something else with the same parameters.
    kind = parametrize.type_before_parametrizations(module)  # of which weights are made as they are read
    if kind in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        weight = wrapped.make_dense(parts.weight).T
        if type(parts.weight) not in (Tensor, nn.Parameter):  # quantised, with inputs that may be rounded as well
            wrapped.require_linear(module, weight, parts.bias, weight.dtype)
        return weight, parts.bias
    if kind is nn.MultiheadAttention:  # its fused query, key and value projection
        return parts.in_proj_weight.T, parts.in_proj_bias
    if kind.__name__ == "FalconLinear":  # nn.Linear in two steps
        return parts.weight.T, parts.bias
    if kind.__name__ == "Conv1D":  # transformers' Conv1D already stores [in, out]
        return parts.weight, parts.bias
    if wrapped.is_from(module, "bitsandbytes") and getattr(parts.weight, "quant_state", None) is not None:
        return wrapped.read_four_bits(module), parts.bias
    name = f"a projection is a {kind.__module__}.{kind.__name__}"
    if ".quantized." in kind.__module__:
        raise UnsupportedModel(
            f"{name}, which rounds what it reads to 8 bits and so is not linear. Pass the model as it was before "
            "quantize_dynamic."
        )
    width = getattr(module, "in_features", None)
    if isinstance(width, int) and not wrapped.is_from(module, "bitsandbytes"):
        return wrapped.read_unknown(module, width, name)
    raise UnsupportedModel(
        f"{name}, expected nn.Linear or transformers' Conv1D. Merge adapters (merge_and_unload) or dequantise the "
        "model first (dequantize() of transformers)."
    )


def _read_with_adapters(module: nn.Module, dtype: torch.dtype | None) -> Linear:
    """Reads a projection inside a layer of PEFT. LoRA adds a product of two; other kinds are asked for their matrix."""
    parts: Any = module
    names = wrapped.list_adapters(parts)
    if not type(module).__module__.startswith("peft.tuners.lora.") or any(name in parts.lora_variant for name in names):
        own = read_linear(parts.base_layer, None).weight
        weight, bias = wrapped.read_matrix(module, own.shape[0], own.device, own.dtype)
        return Linear(_fetch_parameter(weight, dtype), _fetch_parameter(bias, dtype))
    base = read_linear(parts.base_layer, dtype)
    for name in names:
        if name in parts.lora_A:
            down, up, scale = (
                read_linear(parts.lora_A[name], dtype),
                read_linear(parts.lora_B[name], dtype),
                parts.scaling[name],
            )
            added = None if up.bias is None else up.bias * scale
            base = Linear(base.weight + down.weight @ up.weight * scale, _add_optional(base.bias, added))
    return base


def _add_optional(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _fetch_parameter(tensor: Tensor | ParameterRef, dtype: torch.dtype | None) -> Tensor:
    if isinstance(tensor, ParameterRef):
        with wrapped.fetch_parameters(tensor.module):
            return _fetch_parameter(getattr(tensor.module, tensor.name), dtype)
    tensor = wrapped.make_dense(tensor)
    return tensor if dtype is None else tensor.to(dtype)
