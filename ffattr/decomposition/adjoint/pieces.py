"""The linear pieces of a layer transposed: norms with frozen statistics, projections, and what an attention reads.

Shapes: ``K`` directions, ``T`` tokens, ``n`` of them in a block, ``d`` model width, ``H`` query heads of width ``dh``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import reference
from ..affine import Linear, Norm
from ..attention import Attention
from ..layer import CrossWeights, LayerWeights

__all__ = ["KeySide", "add_constant", "transpose_linear", "transpose_norm"]


def transpose_norm(norm: Norm, scale: Tensor, direction: Tensor) -> Tensor:
    """The directions ``[..., n, d]`` in which a norm's input is read whose output is read in ``direction``.

    ``scale`` ``[n]`` is its frozen ``1 / s_i``.
    """
    pulled = direction * scale[:, None]
    if norm.weight is not None:
        pulled *= norm.weight
    return pulled - pulled.mean(-1, keepdim=True) if norm.kind == "layer" else pulled


def transpose_linear(linear: Linear, direction: Tensor, constant: Tensor | None) -> Tensor:
    """The directions ``[K, n, in]`` in which a projection's input is read whose output is read in ``direction``."""
    add_constant(constant, linear.bias, direction)
    return direction @ linear.weight.mT


def add_constant(constant: Tensor | None, bias: Tensor | None, direction: Tensor) -> None:
    """Adds what a bias ``[d]`` gives to tokens that are read in ``direction`` ``[K, n, d]``."""
    if constant is not None and bias is not None:
        constant += direction.sum(1) @ bias


@dataclass
class KeySide:
    """What the tokens that an attention reads have to do with it: the values that belong to each of them ``[H, T, dh]``
    and the ``constant`` ``[H, dh]`` that belongs to none.

    ``pulled`` ``[K, H, T, dh]`` gathers the directions in which the values are read.
    """

    weights: LayerWeights | CrossWeights
    keys: Tensor
    attention: Attention
    values: Tensor
    constant: Tensor | None
    pulled: Tensor | None = None

    @classmethod
    def from_keys(
        cls, weights: LayerWeights | CrossWeights, keys: Tensor, attention: Attention, value_bias: str
    ) -> KeySide:
        return cls(weights, keys, attention, *reference.own_values(weights, keys, value_bias))

    def gather_directions(self, alpha: Tensor, read: Tensor) -> None:
        """Adds what the values give through ``alpha`` ``[H, n, T]`` to heads that are read by ``[K, n, H, dh]``."""
        pulled = alpha.mT @ read.transpose(1, 2)
        self.pulled = pulled if self.pulled is None else self.pulled.add_(pulled)

    def pull_to_keys(self, constant: Tensor) -> Tensor:
        """Returns the directions ``[K, T, d]`` in which the keys are read; adds what biases give to ``constant``."""
        assert self.pulled is not None
        norm, latent, x = self.weights.norm_before_attn, self.weights.latent, self.keys
        by_head = self.pulled
        if self.weights.head_features > 1:  # every feature of a head by itself
            by_head = by_head.unflatten(1, (-1, self.weights.head_features)).squeeze(-1).transpose(2, 3)
        by_head = by_head.unflatten(1, (self.weights.kv_heads, -1)).sum(2)  # [K, Hkv, T, dh]
        pulled = transpose_linear(self.weights.value, by_head.transpose(1, 2).flatten(2), constant)
        if latent is not None:
            scale = latent.norm.scale(latent.down(x if norm is None else norm(x)))
            add_constant(constant, latent.norm.bias, pulled)
            pulled = transpose_linear(latent.down, transpose_norm(latent.norm, scale, pulled), constant)
        if norm is not None:
            add_constant(constant, norm.bias, pulled)
            pulled = transpose_norm(norm, norm.scale(x), pulled)
        return pulled
