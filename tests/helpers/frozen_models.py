"""A loaded transformers model frozen in plain autograd, by none of this project's code.

Attention weights and the scales of norms are detached; activations become ``slope.detach() * z`` with the mean slope on
the path from zero. Outputs stay what they were; gradient times input is then what tokens contribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NODES, _WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(64))
_ACTIVATIONS = tuple({type(ACT2FN[name]) for name in ("gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "tanh")})


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Runs in here are of the frozen model, with gradients to everything but what is frozen."""
    with ExitStack() as stack:
        for module in model.modules():
            replacement = _replacement(module)
            if replacement is not None:
                module.forward = replacement
                stack.callback(module.__dict__.pop, "forward")
        before = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _attend
        stack.callback(ALL_ATTENTION_FUNCTIONS.__setitem__, "sdpa", before)
        stack.enter_context(torch.enable_grad())
        yield


def _replacement(module: nn.Module) -> Callable[..., Any] | None:
    if type(module).__name__.endswith("LayerNorm") and getattr(module, "weight", torch.zeros(())).dim() == 1:
        return lambda x, m=module: _layer_norm(m, x)
    if type(module).__name__ in ("Glm4MLP", "Phi3MLP"):
        return lambda x, m=module: m.down_proj(_gate(m.activation_fn, *m.gate_up_proj(x).chunk(2, -1)))
    if type(module).__name__ == "ModernBertMLP":
        return lambda x, m=module: m.Wo(_gate(m.act, *m.Wi(x).chunk(2, -1)))
    if isinstance(module, nn.RMSNorm) or type(module).__name__.endswith("RMSNorm"):
        return lambda x, m=module: _rms_norm(m, x)
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")) and isinstance(
        module.gate_proj, nn.Module
    ):
        return lambda x, m=module: m.down_proj(_gate(m.act_fn, m.gate_proj(x), m.up_proj(x)))
    if type(module).__name__.endswith("DenseGatedActDense"):
        return lambda x, m=module: m.wo(_gate(m.act, m.wi_0(x), m.wi_1(x)))
    if isinstance(module, _ACTIVATIONS):
        original = module.forward
        return lambda z: _activate(original, z)
    if type(module).__name__ == "MixtralExperts":
        return lambda x, index, weight, m=module: _experts(m, x, index, weight)
    return None


def _layer_norm(norm: Any, x: Tensor) -> Tensor:
    centred, eps = x - x.mean(-1, keepdim=True), getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    scale = torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + eps).detach()
    bias = getattr(norm, "bias", None)
    return centred * scale * norm.weight + (0 if bias is None else bias)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    plain = type(norm).forward(norm, x).detach()  # whatever its gain: the ratio is frozen
    return x * (plain / x.detach())


def _activate(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """``g(z)``, all of it given by ``z`` but for ``g(0)``; the slope at 0 itself is not needed here."""
    start = fn(torch.zeros_like(z)).detach()
    return z * ((fn(z) - start) / z).detach() + start


def _gate(fn: Callable[[Tensor], Tensor], u: Tensor, v: Tensor) -> Tensor:
    """``phi(u) v`` with the mean derivatives by both on the straight path from zero, by quadrature."""
    of_u, of_v = torch.zeros_like(u), torch.zeros_like(u)
    for node, weight in zip(((_NODES + 1) / 2).tolist(), (_WEIGHTS / 2).tolist(), strict=True):
        at = (node * u.detach()).requires_grad_()
        value = type(fn).forward(fn, at) if isinstance(fn, nn.Module) else fn(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
        of_u = of_u + weight * node * slope * v.detach()
        of_v = of_v + weight * value.detach()
    return u * of_u.detach() + v * of_v.detach()


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = given.get("scaling")
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    bias = given.get("position_bias")
    logits = logits if bias is None else logits + bias
    causal = given.get("is_causal")
    if (getattr(module, "is_causal", False) if causal is None else causal) and attention_mask is None:
        ones = torch.ones(logits.shape[-2:], dtype=torch.bool)
        logits = logits.masked_fill(ones.triu(1), -torch.inf)
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[-2]]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1).nan_to_num().detach()  # rows of padding may see nothing
    return (weights @ value).transpose(1, 2).contiguous(), None


def _experts(experts: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, share in zip(index[token].tolist(), weight[token].detach(), strict=True):
            u, v = (x[token] @ experts.gate_up_proj[expert].T).chunk(2)
            hidden = _gate(experts.act_fn, u, v) @ experts.down_proj[expert].T
            total = total.index_add(0, torch.tensor([token]), (hidden * share)[None])
    return total
