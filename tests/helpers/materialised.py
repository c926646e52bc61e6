"""One layer of a Llama-like mixture decomposed with every vector held, from the model's own modules and in float64.

It shares no code with the package: projections and norms are written out, integrals are sums over Gauss-Legendre nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

NODES, WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(80))


@contextmanager
def exact_softmax() -> Iterator[None]:
    """Has the eager attention of transformers, which takes its softmax in float32, take it in the dtype it is given."""
    softmax = torch.nn.functional.softmax
    with mock.patch("torch.nn.functional.softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim)):
        yield


def run_model(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what every layer reads ``[B, T, d]`` and its attention weights ``[B, H, T, T]``, as the model says."""
    model.set_attn_implementation("eager")
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: states.append(args[0]), with_kwargs=True)
        for layer in model.layers
    ]
    with torch.no_grad():
        found = model(input_ids=ids, output_attentions=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states, [part.double() for part in found.attentions]


def divide_by_rms(x: Tensor, of: Tensor, norm: Any) -> Tensor:
    """Returns ``x`` ``[..., d]`` as it passes an RMSNorm whose statistics are those of ``of``."""
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    gain: Tensor = norm.weight
    return x / (of.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def attend(layer: Any, x: Tensor, alpha: Tensor, values: Tensor) -> Tensor:
    """Returns vectors ``[T, T, d]`` behind attention and its residual connection, of values ``[T, H, dh]``."""
    heads = alpha.shape[0]
    out = layer.self_attn.o_proj.weight.T.reshape(heads, -1, x.shape[-1])
    vectors = torch.einsum("hij,jhv,hvd->ijd", alpha, values, out)
    return vectors + torch.diag_embed(x.T).permute(1, 2, 0)


def share_out_gated(vectors: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns what Integrated Gradients give each vector ``[N, T, d]`` of ``down(silu(t gate) * (t up))``."""
    total = vectors.sum(1)
    u, v = total @ gate, total @ up
    of_gate, of_up = torch.zeros_like(u), torch.zeros_like(v)
    for node, weight in zip((NODES + 1) / 2, WEIGHTS / 2, strict=True):
        s = torch.sigmoid(node * u)
        of_up += weight * node * u * s
        of_gate += weight * node * v * (s + node * u * s * (1 - s))
    return ((vectors @ gate) * of_gate[:, None] + (vectors @ up) * of_up[:, None]) @ down


def share_out_shared(vectors: Tensor, network: Any) -> Tensor:
    """Does the same of a network with projections ``gate_proj``, ``up_proj`` and ``down_proj``."""
    return share_out_gated(vectors, network.gate_proj.weight.T, network.up_proj.weight.T, network.down_proj.weight.T)


def share_out_experts(
    vectors: Tensor, experts: Any, index: Tensor, weight: Tensor, seen: Callable[[int, Tensor], None]
) -> Tensor:
    """Returns the sum over the experts ``index`` ``[N, k]`` of each token, with their weights; ``seen`` gets each
    expert's part."""
    added = torch.zeros_like(vectors)
    for number in range(len(experts.down_proj)):
        gate, up = experts.gate_up_proj[number].T.chunk(2, -1)
        share = ((index == number) * weight).sum(-1)
        part = share_out_gated(vectors, gate, up, experts.down_proj[number].T) * share[:, None, None]
        seen(number, part)
        added += part
    return added
