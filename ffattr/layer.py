"""What a Transformer layer is, as data: the description adapters write and every computation reads.

Conventions: row vectors, ``y = x @ weight + bias``; ``T`` tokens, ``N`` selected query tokens, ``d`` model width,
``H`` query heads, ``Hkv`` key/value heads, ``dh`` head width, ``F`` feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .activations import Activation, identify
from .errors import UnsupportedModel

__all__ = ["Columns", "LayerSpec", "LayerWeights", "Linear", "Norm", "Scaled"]


@dataclass(frozen=True)
class Linear:
    """``y = x @ weight + bias`` with ``weight`` ``[in, out]`` and ``bias`` ``[out]`` or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Norm:
    """LayerNorm (``kind="layer"``) or RMSNorm (``kind="rms"``), split into its linear part and its statistics.

    With the statistics of the whole input frozen, a norm is ``scale_i * linear(p) + bias``
    (Kobayashi et al. 2021, section 3.3): ``linear`` is the same for every token, ``scale`` is one number per token.
    """

    kind: Literal["layer", "rms"]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def scale(self, p: Tensor) -> Tensor:
        """``1 / s_i`` of the whole input ``p`` ``[..., d]``: shape ``[...]``."""
        centred = p - p.mean(-1, keepdim=True) if self.kind == "layer" else p
        return torch.rsqrt(centred.square().mean(-1) + self.eps)

    def linear(self, p: Tensor) -> Tensor:
        """The part linear in ``p`` ``[..., d]`` without ``1 / s_i``: centring (LayerNorm only), then gamma."""
        if self.kind == "layer":
            p = p - p.mean(-1, keepdim=True)
        return p if self.weight is None else p * self.weight

    def affine(self, p: Tensor, scale: Tensor) -> Tensor:
        """``scale * linear(p) + bias``: what becomes of the bias stream ``p`` ``[..., d]``."""
        y = self.linear(p) * scale[..., None]
        return y if self.bias is None else y + self.bias

    def __call__(self, p: Tensor) -> Tensor:
        return self.affine(p, self.scale(p))


@dataclass(frozen=True)
class Columns:
    """Output features ``start:stop`` of a fused projection, for instance the value third of GPT-2's ``c_attn``.

    With ``groups``, of each of so many equal groups of them: GPT-NeoX has query, key and value of a head side by side.
    """

    module: nn.Module
    start: int
    stop: int
    groups: int = 1


@dataclass(frozen=True)
class Scaled:
    """A projection whose output features are multiplied by ``factor`` ``[out]`` afterwards: LayerScale."""

    module: nn.Module
    factor: Tensor


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
            value=_linear(self.value, dtype),
            out=_linear(self.out, dtype),
            up=_linear(self.up, dtype),
            gate=None if self.gate is None else _linear(self.gate, dtype),
            down=_linear(self.down, dtype),
            activation=identify(self.activation),
            norm_before_attn=_norm(self.norm_before_attn, dtype),
            norm_of_attn=_norm(self.norm_of_attn, dtype),
            norm_after_attn=_norm(self.norm_after_attn, dtype),
            norm_before_ff=_norm(self.norm_before_ff, dtype),
            norm_of_ff=_norm(self.norm_of_ff, dtype),
            norm_after_ff=_norm(self.norm_after_ff, dtype),
            parallel=self.parallel,
        )


def _linear(module: nn.Module | Columns | Scaled, dtype: torch.dtype | None) -> Linear:
    if isinstance(module, Columns):
        whole = _linear(module.module, dtype)
        part, groups = slice(module.start, module.stop), module.groups
        if groups == 1:
            return Linear(whole.weight[:, part], None if whole.bias is None else whole.bias[part])
        weight = whole.weight.unflatten(1, (groups, -1))[:, :, part].flatten(1)
        return Linear(weight, None if whole.bias is None else whole.bias.view(groups, -1)[:, part].flatten())
    if isinstance(module, Scaled):
        whole, factor = _linear(module.module, dtype), _parameter(module.factor, dtype)
        return Linear(whole.weight * factor, None if whole.bias is None else whole.bias * factor)
    parts: Any = module
    # Exact types: a subclass may compute something else with the same parameters (a LoRA or a quantised linear).
    if type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        weight, bias = parts.weight.T, parts.bias
    elif type(module) is nn.MultiheadAttention:  # its fused query, key and value projection
        weight, bias = parts.in_proj_weight.T, parts.in_proj_bias
    elif type(module).__name__ == "Conv1D":  # transformers' Conv1D already stores [in, out]
        weight, bias = parts.weight, parts.bias
    else:
        raise UnsupportedModel(
            f"a projection is a {type(module).__module__}.{type(module).__name__}, expected nn.Linear or transformers' "
            "Conv1D. Merge adapters (merge_and_unload) or dequantise the model first."
        )
    return Linear(_parameter(weight, dtype), None if bias is None else _parameter(bias, dtype))


def _norm(module: nn.Module | None, dtype: torch.dtype | None) -> Norm | None:
    if module is None:
        return None
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps: Any = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    kind: Literal["layer", "rms"]
    if isinstance(module, nn.LayerNorm):
        kind = "layer"
    elif type(module).__name__.endswith("RMSNorm"):
        kind = "rms"
        eps = (
            torch.finfo(dtype or torch.float32 if weight is None else weight.dtype).eps if eps is None else eps
        )  # nn.RMSNorm's default
        if weight is not None and _adds_one(module):
            weight = 1 + weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    else:
        raise UnsupportedModel(
            f"a norm is a {type(module).__module__}.{type(module).__name__}, expected nn.LayerNorm or an RMSNorm"
        )
    return Norm(
        kind,
        None if weight is None else _parameter(weight, dtype),
        None if bias is None else _parameter(bias, dtype),
        float(eps),
    )


def _adds_one(module: nn.Module) -> bool:
    """Whether the gain is ``1 + weight`` (Gemma): asked of the module, which knows, not of its name."""
    weight: Any = module.weight
    if weight.is_meta:
        return False
    with torch.no_grad():
        ones = torch.ones(1, weight.numel(), dtype=weight.dtype, device=weight.device)  # its root mean square is 1
        gain = module.forward(ones)[0].double()  # past any hooks
        return bool((gain - 1 - weight.double()).norm() < (gain - weight.double()).norm())


def _parameter(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if tensor.is_meta:
        raise UnsupportedModel("a weight is on the meta device (offloaded). Load the model onto a real device first.")
    return tensor.detach() if dtype is None else tensor.detach().to(dtype)
