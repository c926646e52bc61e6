"""What a Transformer layer is, as data: the description adapters write and every computation reads.

Conventions: row vectors, ``y = x @ weight + bias``; ``T`` tokens, ``N`` selected query tokens, ``d`` model width,
``H`` query heads, ``Hkv`` key/value heads, ``dh`` head width, ``F`` feed-forward width, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from . import parameters
from .activations import Activation, identify
from .clamped import Clamp
from .experts import Stacked, expert, stacked
from .parameters import Columns, Linear, Norm, Scaled

__all__ = ["CROSS", "CrossSpec", "CrossWeights", "LayerSpec", "LayerWeights"]

CROSS = "cross."
"""What the names of scopes begin with whose keys are the tokens of an encoder, seen by cross-attention."""


class _Scoped:
    """Scopes of a layer whose norms are modules (`LayerSpec`) or parameters (`LayerWeights`), None where none is."""

    norm_after_attn: object | None
    norm_before_ff: object | None
    norm_after_ff: object | None
    parallel: bool
    cross: object | None

    @property
    def own_scopes(self) -> tuple[str, ...]:
        """Scope names in order: attention, residual, norm, feed-forward block, residual, norm, those that there are.

        In a layer with cross-attention ``atb`` is the stream after both attentions.
        """
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
    def scopes(self) -> tuple[str, ...]:
        """`own_scopes`, and for layers with cross-attention the same of the encoder's tokens, prefixed with `CROSS`."""
        own = self.own_scopes
        return own if self.cross is None else own + tuple(CROSS + name for name in own)

    @property
    def ff_scopes(self) -> tuple[str, ...]:
        """Those of `own_scopes` from the feed-forward block on."""
        return tuple(name for name in self.own_scopes if "_ff" in name)

    @property
    def wide_scopes(self) -> tuple[str, ...]:
        """Those of `own_scopes` that take d-wide work for every pair, which one pass yields together.

        None in a parallel layer, whose feed-forward block reads no token but the query's own.
        """
        return () if self.parallel else self.ff_scopes

    @property
    def expert_scope(self) -> str:
        """What the first feed-forward scope is called where it is told apart by expert."""
        return f"{self.ff_scopes[0]}_experts"


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
class CrossSpec:
    """Which module plays which part in cross-attention. The input of ``value`` is taken for the encoder's output."""

    attention: nn.Module
    heads: int
    kv_heads: int
    value: nn.Module
    out: nn.Module
    norm_after_attn: nn.Module | None = None

    def weights(self, dtype: torch.dtype | None) -> CrossWeights:
        """The parameters in ``dtype`` (None: as they are, nothing copied)."""
        return CrossWeights(
            heads=self.heads,
            kv_heads=self.kv_heads,
            value=parameters.linear(self.value, dtype),
            out=parameters.linear(self.out, dtype),
            norm_after_attn=parameters.norm(self.norm_after_attn, dtype),
        )


@dataclass(frozen=True)
class LayerWeights(_Scoped):
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


@dataclass(frozen=True)
class LayerSpec(_Scoped):
    """Which module of a loaded model plays which part in one layer: what an adapter returns per layer.

    ``module`` is the layer itself (its input and output are recorded), ``attention`` the module that calls the
    attention function. Projections are ``nn.Linear``, transformers' ``Conv1D`` or `Columns` of a fused one.
    ``weights(dtype)`` reads the parameters, so that nothing of the model is copied before its layer's turn.

    In a mixture, projections of the feed-forward block are `Stacked`, ``experts`` is the module that is called with
    hidden states, the experts of each token and their weights, and ``active`` is how many experts a token goes to.

    >>> layer = model.encoder.layer[0]
    >>> attention, output = layer.attention, layer.output
    >>> spec = ffattr.LayerSpec(
    ...     module=layer, attention=attention.self, heads=2, kv_heads=2,
    ...     value=attention.self.value, out=attention.output.dense, norm_after_attn=attention.output.LayerNorm,
    ...     up=layer.intermediate.dense, down=output.dense, norm_after_ff=output.LayerNorm,
    ...     activation=layer.intermediate.intermediate_act_fn,
    ... )
    >>> spec.scopes  # follow from where the norms are
    ('attn_heads', 'attn', 'attn_res', 'atb', 'atb_ff', 'atb_ff_res', 'atb_ff_res_ln')
    >>> spec.weights(torch.float32).up.weight.shape  # [d, F]
    torch.Size([40, 52])
    """

    module: nn.Module
    attention: nn.Module
    heads: int
    kv_heads: int
    value: nn.Module | Columns
    out: nn.Module | Scaled
    up: nn.Module | Columns | Stacked
    down: nn.Module | Scaled | Stacked
    activation: Callable[[Tensor], Tensor]
    gate: nn.Module | Columns | Stacked | None = None
    norm_before_attn: nn.Module | None = None
    norm_of_attn: nn.Module | None = None
    norm_after_attn: nn.Module | None = None
    norm_before_ff: nn.Module | None = None
    norm_of_ff: nn.Module | None = None
    norm_after_ff: nn.Module | None = None
    parallel: bool = False
    clamp: Clamp | None = None
    experts: nn.Module | None = None
    active: int = 1
    cross: CrossSpec | None = None

    @property
    def single(self) -> bool:
        """Whether a norm may round to float32, whatever the model's dtype, as those of transformers' own do."""
        norms = (getattr(self, field.name) for field in fields(self) if field.name.startswith("norm_"))
        return any(norm is not None and type(norm) not in (nn.LayerNorm, nn.RMSNorm) for norm in norms)

    def weights(self, dtype: torch.dtype | None) -> LayerWeights:
        """The layer's parameters in ``dtype`` (None: as they are, nothing copied).

        Raises `UnsupportedModel` for a module that no formula covers.
        """
        return LayerWeights(
            heads=self.heads,
            kv_heads=self.kv_heads,
            value=parameters.linear(self.value, dtype),
            out=parameters.linear(self.out, dtype),
            up=_projection(self.up, dtype),
            gate=None if self.gate is None else _projection(self.gate, dtype),
            down=_projection(self.down, dtype),
            activation=identify(self.activation),
            norm_before_attn=parameters.norm(self.norm_before_attn, dtype),
            norm_of_attn=parameters.norm(self.norm_of_attn, dtype),
            norm_after_attn=parameters.norm(self.norm_after_attn, dtype),
            norm_before_ff=parameters.norm(self.norm_before_ff, dtype),
            norm_of_ff=parameters.norm(self.norm_of_ff, dtype),
            norm_after_ff=parameters.norm(self.norm_after_ff, dtype),
            parallel=self.parallel,
            clamp=self.clamp,
            cross=None if self.cross is None else self.cross.weights(dtype),
        )


def _projection(part: nn.Module | Columns | Scaled | Stacked, dtype: torch.dtype | None) -> Linear:
    return stacked(part) if isinstance(part, Stacked) else parameters.linear(part, dtype)
