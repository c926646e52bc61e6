"""Random layers of known shapes, each with one random input: what every backend is timed and checked on.

A case counts ``2 T^2 F d`` operations for ``T`` tokens (half of them for a causal layer) and nothing else: what any
exact method that goes pair by pair has to multiply.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..decomposition.activations import ACTIVATIONS
from ..decomposition.affine import Linear, Norm
from ..decomposition.attention import QueryKey
from ..decomposition.layer import Branch, LayerWeights

__all__ = ["SHAPES", "Case", "Size"]


@dataclass(frozen=True)
class Size:
    """Holds all of a layer that its speed depends on.

    ``pre``: norms before attention and the feed-forward block, not after; ``rms``: RMSNorm and no biases, as in Llama;
    ``head_dim``: 0 where all heads together are as wide as the model.
    """

    width: int
    heads: int
    ff_width: int
    activation: str = "gelu"
    pre: bool = False
    rms: bool = False
    gated: bool = False
    causal: bool = False
    head_dim: int = 0


SHAPES = {
    "minilm": Size(384, 12, 1536),
    "bert-base": Size(768, 12, 3072),
    "gpt2": Size(768, 12, 3072, "gelu_tanh", pre=True, causal=True),
    "llama-7b": Size(4096, 32, 11008, "silu", pre=True, rms=True, gated=True, causal=True),
}


@dataclass(frozen=True)
class Case:
    """One random layer with one input of ``T`` tokens: everything that a variant gets."""

    weights: LayerWeights
    x: Tensor
    attention: QueryKey

    @classmethod
    def draw_random(
        cls,
        size: Size,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Case:
        """Draws the same numbers for every dtype; another device draws other ones."""
        generator = torch.Generator(device).manual_seed(seed)
        width, heads, biased = size.width, size.heads, not size.rms
        head_dim = size.head_dim or width // heads

        def draw_normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        def draw_linear(inputs: int, outputs: int) -> Linear:
            return Linear(
                draw_normal(inputs, outputs, scale=inputs**-0.5), draw_normal(outputs, scale=0.1) if biased else None
            )

        def draw_norm() -> Norm:
            shift = draw_normal(width, scale=0.1) if biased else None
            eps = 1e-6 if size.pre else 1e-12
            return Norm("rms" if size.rms else "layer", 1 + draw_normal(width, scale=0.1), shift, eps)

        around: dict[str, Any] = {
            name: draw_norm()
            for name in (("norm_before_attn", "norm_before_ff") if size.pre else ("norm_after_attn", "norm_after_ff"))
        }
        weights = LayerWeights(
            heads=heads,
            kv_heads=heads,
            value=draw_linear(width, heads * head_dim),
            out=draw_linear(heads * head_dim, width),
            branches=(
                Branch(
                    up=draw_linear(width, size.ff_width),
                    gate=draw_linear(width, size.ff_width) if size.gated else None,
                    down=draw_linear(size.ff_width, width),
                    activation=ACTIVATIONS[size.activation],
                ),
            ),
            **around,
        )
        query, key = draw_normal(heads, tokens, head_dim), draw_normal(heads, tokens, head_dim)
        return cls(weights, draw_normal(tokens, width), QueryKey(query, key, head_dim**-0.5, causal=size.causal))

    def cast_to(self, dtype: torch.dtype) -> Case:
        def convert_part(part: Linear | Norm) -> Linear | Norm:
            weight, bias = (None if t is None else t.to(dtype) for t in (part.weight, part.bias))
            found: Linear | Norm = replace(part, weight=weight, bias=bias)  # type: ignore[arg-type]
            return found

        weights = self.weights.map_parameters(convert_part)
        attention = replace(self.attention, query=self.attention.query.to(dtype), key=self.attention.key.to(dtype))
        return Case(weights, self.x.to(dtype), attention)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def flops(self) -> float:
        """The operations that are counted: ``2 T^2 F d``, half of them for a causal layer."""
        pairs = len(self.x) ** 2 / (2 if self.attention.causal else 1)
        return 2.0 * pairs * self.weights.branches[0].width * self.weights.width

    @property
    def wide_scopes(self) -> tuple[str, ...]:
        """The scopes from the feed-forward block on."""
        return tuple(map(str, self.weights.pairwise_scopes))

    @property
    def narrow_scopes(self) -> tuple[str, ...]:
        """The scopes of attention, heads summed."""
        return tuple(name for name in self.weights.scopes if name not in self.wide_scopes and name != "attn_heads")
