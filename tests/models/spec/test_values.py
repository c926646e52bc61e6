"""Norms of every head's values as parts of a description."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ffattr
from ffattr.errors import UnsupportedModel
from ffattr.models.spec.norms import read_norm
from ffattr.models.spec.values import ValueNormSpec
from ffattr.models.spec.weights import read_linear

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.RMSNorm(4, eps=0.1), nn.LayerNorm(4, bias=False)], ids=["rms", "layer"])
def test_what_is_divided_by_and_what_is_linear_make_the_norm(norm: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    fused, x = nn.Linear(6, 24).double(), torch.randn(5, 6, generator=generator, dtype=torch.float64)
    norm = norm.double()
    norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))
    value = ffattr.Columns(fused, 4, 12, groups=2)  # of each group of key and value heads, two heads' values
    spec = ValueNormSpec(norm, value, 4)
    assert spec.value_module is fused
    gain = spec.compute_gain(fused(x))
    assert gain.shape == (5, 4)
    linear = spec.stretch(read_linear(value, torch.float64))(x).unflatten(-1, (4, 4))
    plain = read_linear(value, torch.float64)(x).unflatten(-1, (4, 4))
    torch.testing.assert_close(linear * gain[..., None], norm(plain))


def test_a_bias_is_refused() -> None:
    spec = ValueNormSpec(nn.LayerNorm(4), nn.Linear(6, 8), 2)
    with pytest.raises(UnsupportedModel, match="values, a LayerNorm, adds a bias, expected one without"):
        spec.compute_gain(torch.zeros(1, 3, 8))


def test_a_gain_is_read_as_a_norm_without_statistics() -> None:
    layer = nn.Module()
    layer.register_buffer("scalar", torch.tensor([0.25]))
    norm = read_norm(ffattr.GainSpec(layer, "scalar"), torch.float64, 3)
    assert norm is not None
    x = torch.tensor([[4.0, 8.0, -2.0]], dtype=torch.float64)
    assert norm(x).tolist() == [[1.0, 2.0, -0.5]]
    assert norm.scale(x).tolist() == [1.0]
