"""What a field of `LayerSpec` is in every layer, by paths from the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...decomposition.activations import Activation

__all__ = ["Cut", "Gain", "Gate", "Part", "Product", "StackedPart"]


@dataclass(frozen=True)
class Cut:
    """`ffattr.Columns` of the projection at ``path``; ``bias`` is the path of one that it does not have itself."""

    path: str
    start: int
    stop: int
    groups: int = 1
    bias: str | None = None


@dataclass(frozen=True)
class Product:
    """`ffattr.models.spec.weights.Scaled`: the projection at ``path``, and the parameter or number at ``factor``."""

    path: str
    factor: str
    is_number: bool = False


@dataclass(frozen=True)
class StackedPart:
    """`ffattr.models.spec.experts.Stacked` of the module of experts at ``path``."""

    path: str
    weight: str
    bias: str | None = None
    start: int = 0
    stop: int | None = None
    step: int = 1
    out_last: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Gate:
    """`ffattr.GateSpec` of the projection at ``of``, with the function of torch at ``activation`` (``"sigmoid"``)."""

    of: str | Cut
    activation: str


@dataclass(frozen=True)
class Gain:
    """`ffattr.GainSpec` of the layer's own parameter or buffer ``name``."""

    name: str


Part = str | Cut | Gain | Gate | Product | StackedPart | Activation | Callable[[Tensor], Tensor] | int | None
"""A field of `LayerSpec`: a path from the layer, something made of one, a function that has no path, or a number."""
