"""`LayerSpec` made of what was found: every path followed to the module that is there."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...decomposition.activations import Activation
from ..spec.experts import Stacked
from ..spec.layer import BranchSpec, CrossSpec, GateSpec, LatentSpec, LayerSpec
from ..spec.norms import GainSpec
from ..spec.weights import Columns, ParameterRef, Scaled
from .parts import Cut, Gain, Gate, Part, Product, StackedPart
from .probe import Undetected

__all__ = ["make_spec", "resolve_path"]

_BESIDE, _CROSS = "shared_", "cross_"
"""What the parts of the network beside a mixture's experts, and of cross-attention, begin with."""


def make_spec(layer: nn.Module, parts: Mapping[str, Part], where: str) -> LayerSpec:
    """Describes a layer. Raises `Undetected` where it lacks a part; ``where`` names it."""

    def find_module(name: str, path: str) -> Any:
        try:
            module = resolve_path(layer, path)
        except AttributeError:
            raise Undetected(f"{where} has no {path!r}, which others have") from None
        return None if name.removeprefix(_CROSS).startswith("norm_") and isinstance(module, nn.Identity) else module

    def find_parameter(name: str, path: str) -> ParameterRef:
        owner, _, attribute = path.rpartition(".")
        return ParameterRef(find_module(name, owner), attribute)

    def find_part(name: str, part: Part) -> Any:
        if isinstance(part, Activation):
            return part
        if isinstance(part, Cut):
            bias = None if part.bias is None else find_parameter(name, part.bias)
            return Columns(find_module(name, part.path), part.start, part.stop, part.groups, bias)
        if isinstance(part, Gain):
            find_module(name, part.name)
            return GainSpec(layer, part.name)
        if isinstance(part, Gate):
            return GateSpec(find_part(name, part.of), getattr(nn.functional, part.activation))
        if isinstance(part, StackedPart):
            experts = find_module(name, part.path)
            given = (part.weight, part.bias, part.start, part.stop, part.step, part.out_last, part.factor)
            return Stacked(experts, *given)
        if isinstance(part, Product):
            if part.is_number:
                factor = torch.tensor(find_module(name, part.factor), dtype=torch.float64)
                return Scaled(find_module(name, part.path), factor)
            return Scaled(find_module(name, part.path), find_parameter(name, part.factor))
        return find_module(name, part) if isinstance(part, str) else part

    found = {name: find_part(name, part) for name, part in parts.items()}
    beside = {name.removeprefix(_BESIDE): found.pop(name) for name in list(found) if name.startswith(_BESIDE)}
    cross = {name.removeprefix(_CROSS): found.pop(name) for name in list(found) if name.startswith(_CROSS)}
    latent = {name: found.pop(name) for name in ("latent", "norm_of_latent") if name in found}
    return LayerSpec(
        module=layer,
        cross=CrossSpec(**cross) if cross else None,
        shared=BranchSpec(**beside) if beside else None,
        latent=LatentSpec(latent["latent"], latent["norm_of_latent"]) if latent else None,
        **found,
    )


def resolve_path(root: Any, path: str) -> Any:
    """Returns what is at a dotted path. Raises AttributeError."""
    return functools.reduce(getattr, path.split("."), root) if path else root
