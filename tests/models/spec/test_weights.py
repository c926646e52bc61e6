"""Projections and norms of modules, read as row vectors and in two parts."""

from __future__ import annotations

import pytest
import torch
from plain_layers import FF, WIDTH, random, spec
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F

from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve
from ffattr.models.spec.weights import Columns
from ffattr.models.spec.weights import Scaled as LayerScale

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_module_in_row_vectors(bias: bool) -> None:
    module = nn.Linear(WIDTH, FF, bias=bias)
    linear = spec(up=module).weights(torch.float64).branches[0].up
    assert linear.weight.shape == (WIDTH, FF)
    assert (linear.bias is None) != bias
    x = random(5, WIDTH)
    torch.testing.assert_close(linear(x), module.double()(x))


def test_conv1d_keeps_its_orientation() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(FF, WIDTH)
    nn.init.normal_(conv.bias)
    linear = spec(up=conv).weights(torch.float64).branches[0].up
    assert linear.weight.shape == (WIDTH, FF)
    x = random(5, WIDTH)
    torch.testing.assert_close(linear(x), conv.double()(x))


@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_a_fused_projection(bias: bool) -> None:
    fused = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
    value = spec(value=Columns(fused, 2 * WIDTH, 3 * WIDTH)).weights(torch.float64).value
    x = random(5, WIDTH)
    torch.testing.assert_close(value(x), fused.double()(x)[:, 2 * WIDTH :])


def test_columns_of_conv1d_are_output_features() -> None:
    model = build("gpt2")
    attention = model.h[0].attn
    value = resolve(model).layers[0].weights(torch.float64).value
    x = random(5, 40)
    torch.testing.assert_close(value(x), attention.c_attn(x).split(40, -1)[2])


@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_multihead_attention(bias: bool) -> None:
    attention = nn.MultiheadAttention(WIDTH, 3, bias=bias, dtype=torch.float64)
    value = spec(value=Columns(attention, 2 * WIDTH, 3 * WIDTH)).weights(torch.float64).value
    x = random(5, WIDTH)
    parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    torch.testing.assert_close(value(x), parts[:, 2 * WIDTH :])


@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_every_group(bias: bool) -> None:
    """Query, key and value of each of three heads side by side."""
    fused = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
    value = spec(value=Columns(fused, 8, 12, groups=3)).weights(torch.float64).value
    x = random(5, WIDTH)
    torch.testing.assert_close(value(x), fused.double()(x).view(5, 3, 12)[..., 8:].flatten(1))


@pytest.mark.parametrize("bias", [True, False])
def test_layer_scale(bias: bool) -> None:
    module, factor = nn.Linear(WIDTH, WIDTH, bias=bias), random(WIDTH, seed=1)
    out = spec(out=LayerScale(module, factor)).weights(torch.float64).out
    x = random(5, WIDTH)
    torch.testing.assert_close(out(x), module.double()(x) * factor)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("part", ["value", "out", "up", "down"])
def test_a_subclass_of_linear_is_refused(part: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"a projection is a .*\.Scaled, expected nn\.Linear.*merge_and_unload"):
        spec(**{part: Scaled(WIDTH, WIDTH)}).weights(torch.float32)


def test_a_norm_that_computes_something_else_is_refused() -> None:
    class OddRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    with pytest.raises(UnsupportedModel, match=r"OddRMSNorm that computes neither a LayerNorm nor an RMSNorm"):
        spec(norm_before_ff=OddRMSNorm(WIDTH)).weights(torch.float32)


@pytest.mark.parametrize("one", [0, 1])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_is_what_it_computes(kind: type[nn.Module], one: int) -> None:
    """T5LayerNorm does not centre; Gemma's and Nemotron's gains are one more than their weights."""

    class MisnamedLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(random(WIDTH)), 1e-3

        def forward(self, x: Tensor) -> Tensor:
            norm = kind(WIDTH, eps=self.eps, elementwise_affine=False)
            return norm(x) * (self.weight + one)

    module = MisnamedLayerNorm()
    norm = spec(norm_before_ff=module).weights(torch.float64).norm_before_ff
    assert norm is not None
    p = random(5, WIDTH)
    torch.testing.assert_close(norm(p), module(p))


def test_a_module_that_is_no_norm_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"a norm is a .*GroupNorm, expected nn\.LayerNorm or an RMSNorm"):
        spec(norm_before_ff=nn.GroupNorm(1, WIDTH)).weights(torch.float32)


def test_offloaded_weights_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="meta device"):
        spec(up=nn.Linear(WIDTH, FF, device="meta")).weights(torch.float32)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_parts(kind: str, affine: bool) -> None:
    module = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(WIDTH, eps=0.1, elementwise_affine=affine).double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = random(WIDTH, seed=seed)
    norm = spec(norm_before_ff=module).weights(torch.float64).norm_before_ff
    assert norm is not None
    assert norm.kind == kind
    p, q, matrix = random(5, WIDTH, seed=4), random(5, WIDTH, seed=5), random(7, WIDTH, seed=6)
    torch.testing.assert_close(norm(p), module(p))
    torch.testing.assert_close(norm.affine(p, norm.scale(p)), module(p))
    torch.testing.assert_close(p[:, :7] @ norm.linear(matrix), norm.linear(p[:, :7] @ matrix))
    torch.testing.assert_close(norm.linear(p + q), norm.linear(p) + norm.linear(q))
    # Completeness with frozen statistics: the parts of a sum, and the shift once.
    scale = norm.scale(p + q)
    torch.testing.assert_close(norm.linear(p) * scale[:, None] + norm.affine(q, scale), module(p + q))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_with_its_default_eps(dtype: torch.dtype, affine: bool) -> None:
    module = nn.RMSNorm(WIDTH, elementwise_affine=affine, dtype=dtype)
    norm = spec(norm_before_ff=module).weights(dtype).norm_before_ff
    assert norm is not None
    p = random(3, WIDTH).to(dtype) * torch.finfo(dtype).eps ** 0.5  # where eps weighs as much as the input
    torch.testing.assert_close(norm(p), module(p))
