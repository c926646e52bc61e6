"""What a Transformer layer is, as data: the description adapters write and every computation reads.

Conventions: row vectors, ``y = x @ weight + bias``; ``T`` tokens, ``N`` selected query tokens, ``d`` model width,
``H`` query heads, ``Hkv`` key/value heads, ``dh`` head width, ``F`` feed-forward width, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from torch import Tensor

from .activations import Activation
from .affine import Linear, Norm, expert
from .clamp import Clamp
from .scopes import CROSS, Scoped

__all__ = ["CrossWeights", "LayerWeights"]


@dataclass(frozen=True)
class CrossWeights:
    """Attention to the tokens of an encoder, between self-attention and the feed-forward block of a decoder layer.

    A norm before it shapes the attention weights alone and is no part of this.
    """

    heads: int
    kv_heads: int
    value: Linear
    out: Linear
    norm_before_attn: None = None
    norm_after_attn: Norm | None = None


@dataclass(frozen=True)
class LayerWeights(Scoped):
    """One layer's parameters in one dtype, on one device; the only thing the formulas see of a model.

    A norm that the layer does not have is None. Post-LN (BERT) has ``norm_after_attn`` and ``norm_after_ff`` (both act
    on the sum with the residual); pre-LN (GPT-2, Llama) has ``norm_before_attn`` and ``norm_before_ff``.
    ``norm_of_attn`` and ``norm_of_ff`` act on what a block returns, before the residual is added (Gemma 2, OLMo 2).
    ``gate`` is None for a dense feed-forward block; a gated one computes ``activation(t @ gate) * (t @ up)``.
    ``parallel``: the feed-forward block reads the layer's input beside attention, not its output (GPT-NeoX).
    ``clamp``: how gate and up are cut off before they meet (gpt-oss). ``cross``: attention to an encoder's tokens.

    In a mixture of experts, ``up``, ``gate`` and ``down`` hold all experts, ``[E, in, out]``, in the model's own dtype;
    `expert` is the layer with one of them alone.
    """

    heads: int
    kv_heads: int
    value: Linear
    out: Linear
    up: Linear
    gate: Linear | None
    down: Linear
    activation: Activation
    norm_before_attn: Norm | None = None
    norm_of_attn: Norm | None = None
    norm_after_attn: Norm | None = None
    norm_before_ff: Norm | None = None
    norm_of_ff: Norm | None = None
    norm_after_ff: Norm | None = None
    parallel: bool = False
    clamp: Clamp | None = None
    cross: CrossWeights | None = None

    @property
    def mixture(self) -> bool:
        """Whether the feed-forward block is a mixture of experts."""
        return self.down.weight.dim() == 3

    def expert(self, number: int) -> LayerWeights:
        """The layer as it would be with one expert alone, in the dtype of the layer's other parameters."""
        up, gate, down = (
            None if part is None else expert(part, number, self.out.weight.dtype)
            for part in (self.up, self.gate, self.down)
        )
        assert up is not None
        assert down is not None
        return replace(self, up=up, gate=gate, down=down)

    @property
    def width(self) -> int:
        return self.out.weight.shape[1]

    @property
    def projections(self) -> tuple[Linear, ...]:
        """What makes the pre-activations: up alone, or gate and up."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def ff_width(self) -> int:
        """``F``, of one expert in a mixture."""
        return self.down.weight.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.out.weight.shape[0] // self.heads

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with a readable name, for instance ``("norm_before_ff.weight", ...)``."""
        for owner, prefix in ((self, ""), (self.cross, CROSS)):
            for field in () if owner is None else fields(owner):
                part = getattr(owner, field.name)
                if isinstance(part, (Linear, Norm)):
                    for name in ("weight", "bias"):
                        tensor = getattr(part, name)
                        if tensor is not None:
                            yield f"{prefix}{field.name}.{name}", tensor
