"""Pieces transposed are their matrices transposed."""

from __future__ import annotations

import pytest
import random_layers
import torch

from ffattr.decomposition import reference
from ffattr.decomposition.adjoint.pieces import KeySide, add_constant, transpose_linear, transpose_norm
from ffattr.decomposition.affine import Linear, Norm


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_transposed_is_its_matrix_transposed(kind):
    generator = torch.Generator().manual_seed(0)
    p, gain, direction = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    norm = Norm(kind, gain, None, 1e-6)
    scale = norm.scale(p[None])
    matrix = torch.stack([norm.linear(column) * scale for column in torch.eye(6, dtype=torch.float64)])
    assert torch.allclose(transpose_norm(norm, scale, direction[None])[0], matrix @ direction, rtol=0, atol=1e-14)


def test_a_projection_transposed_gives_its_bias_to_the_constant():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 5, generator=generator), torch.randn(5, generator=generator)
    directions, constant = torch.randn(2, 4, 5, generator=generator), torch.zeros(2)
    pulled = transpose_linear(Linear(weight, bias), directions, constant)
    assert torch.allclose(pulled, torch.einsum("kno,io->kni", directions, weight), atol=1e-6)
    assert torch.allclose(constant, (directions * bias).sum((1, 2)), atol=1e-6)
    add_constant(None, bias, directions)
    add_constant(constant, None, directions)
    assert torch.allclose(constant, (directions * bias).sum((1, 2)), atol=1e-6)


@pytest.mark.parametrize("norms", ["pre", "post"])
def test_what_keys_give_is_what_heads_read_of_them(norms):
    """``sum_ij alpha <read_i, value_j>``, as the values' own part and the constant of their biases."""
    layer = random_layers.layer(norms=norms)
    side = KeySide.from_keys(layer.weights, layer.x, layer.attention, "token")
    alpha = layer.attention.attention_weights(torch.arange(9))
    read = torch.randn(2, 9, *side.values.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    side.gather_directions(alpha, read)
    constant = torch.zeros(2, dtype=torch.float64)
    pulled = side.pull_to_keys(constant)
    expected = (read * reference.context(alpha, side.values)).sum((1, 2, 3))
    assert torch.allclose((pulled * layer.x).sum((1, 2)) + constant, expected, rtol=0, atol=1e-10)
