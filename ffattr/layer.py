"""What a Transformer layer is, as data: the description adapters write and every computation reads.

Conventions: row vectors, ``y = x @ weight + bias``; ``T`` tokens, ``N`` selected query tokens, ``d`` model width,
``H`` query heads, ``Hkv`` key/value heads, ``dh`` head width, ``F`` feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from . import parameters
from .activations import Activation, identify
from .parameters import Columns, Linear, Norm, Scaled

__all__ = ["LayerSpec", "LayerWeights"]


class _Scoped:
    """Scopes of a layer whose norms are modules (`LayerSpec`) or parameters (`LayerWeights`), None where none is."""

    norm_after_attn: object | None
    norm_before_ff: object | None
    norm_after_ff: object | None
    parallel: bool

    @property
    def scopes(self) -> tuple[str, ...]:
        """Scope names in order: attention, residual, norm, feed-forward block, residual, norm, those that there are."""
        names = ["attn_heads", "attn"]
        if self.norm_after_attn is not None:
            names.append("attn_res")
        names.append("atb")
        stem = "atb"
        if self.norm_before_ff is not None:
            stem = "atb_ln"
            names.append(stem)
        names += [f"{stem}_ff", f"{stem}_ff_res"]
        if self.norm_after_ff is not None:
            names.append(f"{stem}_ff_res_ln")
        return tuple(names)

    @property
    def wide_scopes(self) -> tuple[str, ...]:
        """Those from the feed-forward block on that take d-wide work for every pair, which one pass yields together.

        None in a parallel layer, whose feed-forward block reads no token but the query's own.
        """
        return () if self.parallel else tuple(name for name in self.scopes if "_ff" in name)


@dataclass(frozen=True)
class LayerWeights(_Scoped):
    """One layer's parameters in one dtype, on one device; the only thing the formulas see of a model.

    A norm that the layer does not have is None. Post-LN (BERT) has ``norm_after_attn`` and ``norm_after_ff`` (both act
    on the sum with the residual); pre-LN (GPT-2, Llama) has ``norm_before_attn`` and ``norm_before_ff``.
    ``norm_of_attn`` and ``norm_of_ff`` act on what a block returns, before the residual is added (Gemma 2, OLMo 2).
    ``gate`` is None for a dense feed-forward block; a gated one computes ``activation(t @ gate) * (t @ up)``.
    ``parallel``: the feed-forward block reads the layer's input beside attention, not its output (GPT-NeoX).
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

    @property
    def width(self) -> int:
        return self.out.weight.shape[1]

    @property
    def projections(self) -> tuple[Linear, ...]:
        """What makes the pre-activations: up alone, or gate and up."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def ff_width(self) -> int:
        return self.down.weight.shape[0]

    @property
    def head_dim(self) -> int:
        return self.out.weight.shape[0] // self.heads

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with a readable name, for instance ``("norm_before_ff.weight", ...)``."""
        for field in fields(self):
            part = getattr(self, field.name)
            if isinstance(part, (Linear, Norm)):
                for name in ("weight", "bias"):
                    tensor = getattr(part, name)
                    if tensor is not None:
                        yield f"{field.name}.{name}", tensor


@dataclass(frozen=True)
class LayerSpec(_Scoped):
    """Which module of a loaded model plays which part in one layer: what an adapter returns per layer.

    ``module`` is the layer itself (its input and output are recorded), ``attention`` the module that calls the
    attention function. Projections are ``nn.Linear``, transformers' ``Conv1D`` or `Columns` of a fused one.
    ``weights(dtype)`` reads the parameters, so that nothing of the model is copied before its layer's turn.
    """

    module: nn.Module
    attention: nn.Module
    heads: int
    kv_heads: int
    value: nn.Module | Columns
    out: nn.Module | Scaled
    up: nn.Module | Columns
    down: nn.Module | Scaled
    activation: Callable[[Tensor], Tensor]
    gate: nn.Module | Columns | None = None
    norm_before_attn: nn.Module | None = None
    norm_of_attn: nn.Module | None = None
    norm_after_attn: nn.Module | None = None
    norm_before_ff: nn.Module | None = None
    norm_of_ff: nn.Module | None = None
    norm_after_ff: nn.Module | None = None
    parallel: bool = False

    def weights(self, dtype: torch.dtype | None) -> LayerWeights:
        """The layer's parameters in ``dtype`` (None: as they are, nothing copied).

        Raises `UnsupportedModel` for a module that no formula covers.
        """
        return LayerWeights(
            heads=self.heads,
            kv_heads=self.kv_heads,
            value=parameters.linear(self.value, dtype),
            out=parameters.linear(self.out, dtype),
            up=parameters.linear(self.up, dtype),
            gate=None if self.gate is None else parameters.linear(self.gate, dtype),
            down=parameters.linear(self.down, dtype),
            activation=identify(self.activation),
            norm_before_attn=parameters.norm(self.norm_before_attn, dtype),
            norm_of_attn=parameters.norm(self.norm_of_attn, dtype),
            norm_after_attn=parameters.norm(self.norm_after_attn, dtype),
            norm_before_ff=parameters.norm(self.norm_before_ff, dtype),
            norm_of_ff=parameters.norm(self.norm_of_ff, dtype),
            norm_after_ff=parameters.norm(self.norm_after_ff, dtype),
            parallel=self.parallel,
        )
