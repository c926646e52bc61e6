"""Norms that divide the values of an attention head by head, before they are mixed (Gemma 4).

A norm's statistics frozen, what it divides by belongs to the attention weights: one number for each key and key/value
head. What is left of it, a gain for each feature of a head, belongs to the value projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...decomposition.affine import Linear, Norm
from ...decomposition.precision import without_autocast
from ...errors import UnsupportedModel
from .norms import read_norm
from .weights import Columns

__all__ = ["ValueNormSpec"]


@dataclass(frozen=True)
class ValueNormSpec:
    """Which ``norm`` every head's values pass that the projection ``value`` makes, of ``kv_heads`` heads."""

    norm: nn.Module
    value: nn.Module | Columns
    kv_heads: int

    @property
    def value_module(self) -> nn.Module:
        """The module whose output holds the values that the norm reads."""
        return self.value.module if isinstance(self.value, Columns) else self.value

    def compute_gain(self, output: Tensor) -> Tensor:
        """Returns what the norm multiplies every head's values by, ``[..., Hkv]``, of what `value_module` returned.

        Raises `UnsupportedModel` for a norm with a bias.
        """
        if isinstance(self.value, Columns):
            grouped = output.unflatten(-1, (self.value.groups, -1))
            output = grouped[..., self.value.start : self.value.stop].flatten(-2)
        values = output.unflatten(-1, (self.kv_heads, -1))
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        with torch.no_grad(), without_autocast():
            return self._read(values.shape[-1], values.dtype).scale(values)

    def stretch(self, value: Linear) -> Linear:
        """Returns the value projection with what is linear in the norm: its gain, and the mean taken off."""
        norm = self._read(value.weight.shape[1] // self.kv_heads, value.weight.dtype)
        if norm.weight is None and norm.kind == "rms":
            return value

        def pass_norm(tensor: Tensor) -> Tensor:
            return norm.linear(tensor.unflatten(-1, (self.kv_heads, -1))).flatten(-2)

        return Linear(pass_norm(value.weight), None if value.bias is None else pass_norm(value.bias))

    def _read(self, width: int, dtype: torch.dtype) -> Norm:
        norm = read_norm(self.norm, dtype, width)
        assert norm is not None
        if norm.bias is not None:
            raise UnsupportedModel(
                f"the norm of every head's values, a {type(self.norm).__name__}, adds a bias, expected one without"
            )
        return norm
