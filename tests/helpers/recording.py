"""A layer computed once more from its record, and what a capture may not change: helpers of the tests."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffattr.decomposition.activations import Activation
from ffattr.decomposition.affine import Norm
from ffattr.decomposition.attention import Attention, AttentionWeights, LayerRecord, QueryKey
from ffattr.models.capture.recorder import record_layers
from ffattr.models.inputs.prepare import prepare_inputs
from ffattr.models.registry import ModelDescription, resolve
from ffattr.models.spec.layer import LayerSpec


def run(
    name: str, model: nn.Module, inputs: Any = None, **options: Any
) -> tuple[ModelDescription, list[LayerRecord], Tensor]:
    description = resolve(model)
    prepared = prepare_inputs(description, model, tiny_models.inputs(name) if inputs is None else inputs)
    records: list[LayerRecord] = []
    record_layers(description, prepared.kwargs, records.append, mask=prepared.mask, **options)
    return description, records, prepared.mask


def norm(x: Tensor, parameters: Norm | None) -> Tensor:
    if parameters is None:
        return x
    if parameters.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], parameters.weight, parameters.bias, parameters.eps)
    y = x / (x.pow(2).mean(-1, keepdim=True) + parameters.eps).sqrt()
    return y if parameters.weight is None else y * parameters.weight


def layer_output(spec: LayerSpec, recorded: LayerRecord) -> Tensor:
    """The layer from its description alone."""
    weights = spec.weights(recorded.input.dtype)
    x = recorded.input
    batch, length, _ = x.shape
    share = weights.heads // weights.kv_heads
    value = weights.value(norm(x, weights.norm_before_attn)).view(batch, length, weights.kv_heads, -1).transpose(1, 2)
    mixed = attention_weights(recorded.attention).to(x.dtype) @ value.repeat_interleave(share, 1)
    added = norm(weights.out(mixed.transpose(1, 2).reshape(batch, length, -1)), weights.norm_of_attn)
    attended = norm(x + added, weights.norm_after_attn)
    t = norm(x if weights.parallel else attended, weights.norm_before_ff)
    activation = spec.activation.value if isinstance(spec.activation, Activation) else spec.activation
    (branch,) = weights.branches
    hidden = activation(branch.up(t) if branch.gate is None else branch.gate(t))
    if branch.gate is not None:
        hidden = hidden * branch.up(t)
    return norm(attended + norm(branch.down(hidden), weights.norm_of_ff), weights.norm_after_ff)


def attention_weights(attention: Attention) -> Tensor:
    """``[B, H, T, T]`` of the whole batch, padding included."""
    if isinstance(attention, AttentionWeights):
        return attention.alpha
    assert isinstance(attention, QueryKey)
    _, heads, length, _ = attention.shape
    key = attention.key.repeat_interleave(heads // attention.key.shape[1], 1)
    logits = attention.query @ key.transpose(2, 3) * attention.scale
    if attention.softcap is not None:
        logits = attention.softcap * (logits / attention.softcap).tanh()
    if attention.bias is not None:
        logits = logits + attention.bias
    if attention.mask is not None and attention.mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention.mask, -torch.inf)
    elif attention.mask is not None:
        logits = logits + attention.mask
    if attention.causal:
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    if attention.sinks is None:
        return logits.softmax(-1)
    total = logits.exp().sum(-1, keepdim=True) + attention.sinks.exp()[:, None, None]
    return logits.exp() / total


def assert_recomputed(
    description: ModelDescription, records: list[LayerRecord], mask: Tensor, tolerance: float = 1e-10
) -> None:
    assert [r.index for r in records] == list(range(len(description.layers)))
    for recorded in records:
        expected = layer_output(description.layers[recorded.index], recorded)
        torch.testing.assert_close(recorded.output[mask], expected[mask], rtol=0, atol=tolerance)


def state(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a capture touches."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    configs = [getattr(m, "config", None) for m in model.modules()]
    implementations = [getattr(config, "_attn_implementation", None) for config in configs]
    names: list[str] = []
    if any(implementations):
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        names = [*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping]
    flags = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), [m.training for m in model.modules()]
    grads = [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
    return hooks, implementations, names, flags, grads, torch.get_rng_state().tolist()
