"""Projections and norms: what adapters name of a model, and the parameters that are read from it.

Conventions: row vectors, ``y = x @ weight + bias``; ``d`` model width, ``F`` feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import UnsupportedModel

__all__ = ["Columns", "Linear", "Norm", "Scaled", "linear", "norm"]


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


def linear(module: nn.Module | Columns | Scaled, dtype: torch.dtype | None) -> Linear:
    if isinstance(module, Columns):
        whole = linear(module.module, dtype)
        part, groups = slice(module.start, module.stop), module.groups
        if groups == 1:
            return Linear(whole.weight[:, part], None if whole.bias is None else whole.bias[part])
        weight = whole.weight.unflatten(1, (groups, -1))[:, :, part].flatten(1)
        return Linear(weight, None if whole.bias is None else whole.bias.view(groups, -1)[:, part].flatten())
    if isinstance(module, Scaled):
        whole, factor = linear(module.module, dtype), _parameter(module.factor, dtype)
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


def norm(module: nn.Module | None, dtype: torch.dtype | None) -> Norm | None:
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
