"""Projections of all experts in one parameter."""

from __future__ import annotations

import torch
from tiny_models import build
from torch import nn

from ffattr.models.registry import resolve
from ffattr.models.spec.experts import Stacked, read_stacked


def test_stacked_parameters() -> None:
    module = torch.nn.Module()
    module.both = torch.nn.Parameter(torch.arange(48.0).view(2, 6, 4))  # [E, out, in]
    module.shift = torch.nn.Parameter(torch.arange(12.0).view(2, 6))
    found = read_stacked(Stacked(module, "both", "shift", start=1, step=2))
    assert torch.equal(found.weight[1], module.both[1, 1::2].T)
    assert found.bias is not None
    assert torch.equal(found.bias, module.shift[:, 1::2])
    turned = read_stacked(Stacked(module, "both", stop=2, out_last=True))
    assert torch.equal(turned.weight, module.both[:, :, :2])


def test_a_factor_is_one_of_weight_and_bias() -> None:
    module = nn.Module()
    module.both, module.added = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 4))
    plain, scaled = (read_stacked(Stacked(module, "both", "added", factor=factor)) for factor in (1.0, 0.5))
    assert plain.bias is not None
    assert scaled.bias is not None
    assert torch.equal(scaled.weight, plain.weight / 2)
    assert torch.equal(scaled.bias, plain.bias / 2)


def test_stacked_parameters_of_a_model() -> None:
    """Gate and up of Mixtral are the halves of one parameter, expert by expert."""
    layer = build("mixtral").layers[0]
    experts, spec = layer.mlp.experts, resolve(build("mixtral")).layers[0]
    assert isinstance(spec.gate, Stacked)
    assert isinstance(spec.up, Stacked)
    gate, up = read_stacked(spec.gate), read_stacked(spec.up)
    assert torch.equal(torch.cat([gate.weight, up.weight], -1), experts.gate_up_proj.mT)
    assert gate.bias is up.bias is None
