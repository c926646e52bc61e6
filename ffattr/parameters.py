"""Projections and norms: what adapters name of a model, and the parameters that are read from it.

Conventions: row vectors, ``y = x @ weight + bias``; ``d`` model width, ``F`` feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import loaded
from .errors import UnsupportedModel

__all__ = ["Columns", "Held", "Linear", "Norm", "Scaled", "linear", "norm"]


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
class Held:
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
    bias: Tensor | Held | None = None


@dataclass(frozen=True)
class Scaled:
    """A projection whose output features are multiplied by ``factor`` ``[out]`` afterwards: LayerScale."""

    module: nn.Module
    factor: Tensor | Held


def linear(module: nn.Module | Columns | Scaled, dtype: torch.dtype | None) -> Linear:
    """What a projection computes, in ``dtype`` (None: as it is, and nothing copied of what is there).

    Raises `UnsupportedModel` for a module that is not known to be linear.
    """
    if isinstance(module, Columns):
        whole = linear(module.module, dtype)
        part, groups = slice(module.start, module.stop), module.groups
        bias = None if whole.bias is None else whole.bias.view(groups, -1)[:, part].flatten()
        bias = _sum(bias, None if module.bias is None else _parameter(module.bias, dtype))
        if groups == 1:
            return Linear(whole.weight[:, part], bias)
        return Linear(whole.weight.unflatten(1, (groups, -1))[:, :, part].flatten(1), bias)
    if isinstance(module, Scaled):
        whole, factor = linear(module.module, dtype), _parameter(module.factor, dtype)
        return Linear(whole.weight * factor, None if whole.bias is None else whole.bias * factor)
    module = loaded.running(module)
    if loaded.is_from(module, "peft") and hasattr(module, "base_layer"):
        return _with_adapters(module, dtype)
    with loaded.fetched(module):
        weight, bias = _weight_and_bias(module)
    return Linear(_parameter(weight, dtype), None if bias is None else _parameter(bias, dtype))


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """As `Linear` has them."""
    parts: Any = module
    # Exact types: a subclass may compute something else with the same parameters.
    if type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        weight = loaded.dense(parts.weight).T
        if type(parts.weight) not in (Tensor, nn.Parameter):  # quantised, with inputs that may be rounded as well
            loaded.require_linear(module, weight, parts.bias, weight.dtype)
        return weight, parts.bias
    if type(module) is nn.MultiheadAttention:  # its fused query, key and value projection
        return parts.in_proj_weight.T, parts.in_proj_bias
    if type(module).__name__ == "FalconLinear":  # nn.Linear in two steps
        return parts.weight.T, parts.bias
    if type(module).__name__ == "Conv1D":  # transformers' Conv1D already stores [in, out]
        return parts.weight, parts.bias
    if loaded.is_from(module, "bitsandbytes") and getattr(parts.weight, "quant_state", None) is not None:
        return loaded.four_bits(module), parts.bias
    raise UnsupportedModel(
        f"a projection is a {type(module).__module__}.{type(module).__name__}, expected nn.Linear or transformers' "
        "Conv1D. Merge adapters (merge_and_unload) or dequantise the model first (dequantize() of transformers)."
    )


def _with_adapters(module: nn.Module, dtype: torch.dtype | None) -> Linear:
    """A projection inside a layer of PEFT. LoRA adds a product of two; other kinds are asked for their matrix."""
    parts: Any = module
    names = loaded.active(parts)
    if not type(module).__module__.startswith("peft.tuners.lora.") or any(name in parts.lora_variant for name in names):
        own = linear(parts.base_layer, None).weight
        weight, bias = loaded.matrix_of(module, own.shape[0], own.device, own.dtype)
        return Linear(_parameter(weight, dtype), _parameter(bias, dtype))
    base = linear(parts.base_layer, dtype)
    for name in names:
        if name in parts.lora_A:
            down, up, scale = linear(parts.lora_A[name], dtype), linear(parts.lora_B[name], dtype), parts.scaling[name]
            added = None if up.bias is None else up.bias * scale
            base = Linear(base.weight + down.weight @ up.weight * scale, _sum(base.bias, added))
    return base


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def norm(module: nn.Module | None, dtype: torch.dtype | None) -> Norm | None:
    """What a norm computes, in ``dtype`` (None: as it is). Raises `UnsupportedModel` for one that is not known."""
    if module is None:
        return None
    module = loaded.running(module)
    with loaded.fetched(module):
        weight, bias = _plain(module, "weight"), _plain(module, "bias")
        eps: Any = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        rms = type(module).__name__.endswith("RMSNorm")
        if not (rms or isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("LayerNorm")):
            raise UnsupportedModel(
                f"a norm is a {type(module).__module__}.{type(module).__name__}, expected nn.LayerNorm or an RMSNorm"
            )
        if eps is None:  # nn.RMSNorm's default
            eps = torch.finfo(dtype or torch.float32 if weight is None else weight.dtype).eps
        found = Norm("rms" if rms else "layer", weight, bias, float(eps))
        if type(module) not in (nn.LayerNorm, nn.RMSNorm) and weight is not None:
            found = _asked(module, found, weight)
        return replace(
            found,
            weight=None if found.weight is None else _parameter(found.weight, dtype),
            bias=None if bias is None else _parameter(bias, dtype),
        )


@torch.no_grad()
def _asked(module: nn.Module, norm: Norm, weight: Tensor) -> Norm:
    """Whether it centres, and whether its gain is ``1 + weight`` (Gemma): asked of the module, which knows, not of its
    name (a T5LayerNorm does not centre)."""
    probe = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    wide = torch.promote_types(weight.dtype, torch.float32)
    given = type(module).forward(module, probe).to(wide)  # past any hooks
    gain, bias = weight.detach().to(wide), None if norm.bias is None else norm.bias.detach().to(wide)
    kinds: tuple[Literal["layer", "rms"], ...] = ("layer", "rms")
    candidates = [Norm(kind, added, bias, norm.eps) for kind in kinds for added in (gain, 1 + gain)]
    errors = [float((candidate(probe.to(wide)) - given).norm()) for candidate in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    if not errors[best] <= 0.05 * float(given.norm()):  # half types round
        raise UnsupportedModel(
            f"a norm is a {type(module).__module__}.{type(module).__name__} that computes neither a LayerNorm nor an "
            f"RMSNorm of its weight (off by {errors[best] / float(given.norm()):.0%} at best)"
        )
    return replace(norm, kind=candidates[best].kind, weight=candidates[best].weight if best % 2 else weight)


def _plain(module: nn.Module, name: str) -> Tensor | None:
    found: Tensor | None = getattr(module, name, None)
    return None if found is None else loaded.dense(found)


def _parameter(tensor: Tensor | Held, dtype: torch.dtype | None) -> Tensor:
    if isinstance(tensor, Held):
        with loaded.fetched(tensor.module):
            return _parameter(getattr(tensor.module, tensor.name), dtype)
    tensor = loaded.dense(tensor)
    return tensor if dtype is None else tensor.to(dtype)
