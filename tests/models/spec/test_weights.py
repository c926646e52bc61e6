"""Projections and norms of modules, read as row vectors and in two parts."""

from __future__ import annotations

import pytest
import torch
from plain_layers import FF, WIDTH, random, spec
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve
from ffattr.models.spec.weights import Columns, select_outputs
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


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Unsaid(nn.Module):
    """One that says nowhere how much it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


def test_a_subclass_of_linear_is_what_it_computes() -> None:
    module = Scaled(WIDTH, FF)
    linear = spec(up=module).weights(torch.float64).branches[0].up
    x = random(5, WIDTH)
    torch.testing.assert_close(linear(x), module(x.float()).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["value", "out", "up", "down"])
def test_what_is_not_linear_is_refused(part: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"a projection is a .*\.Squared of .* and not linear"):
        spec(**{part: Squared(WIDTH, WIDTH).eval()}).weights(torch.float32)
    with pytest.raises(UnsupportedModel, match=r"a projection is a .*\.Unsaid, expected nn\.Linear.*merge_and_unload"):
        spec(**{part: Unsaid()}).weights(torch.float32)


def test_offloaded_weights_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="meta device"):
        spec(up=nn.Linear(WIDTH, FF, device="meta")).weights(torch.float32)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_projections(kind: str) -> None:
    parametrised, plain = build("bert"), build("bert")
    for model in (parametrised, plain):
        torch.manual_seed(0)
        layer = model.encoder.layer[0]
        for module in (layer.attention.self.value, layer.intermediate.dense):
            getattr(nn.utils.parametrizations, kind)(module)
            if model is plain:
                nn.utils.parametrize.remove_parametrizations(module, "weight")
        model.eval()
    ids = torch.arange(14).view(2, 7)
    found, expected = (ffattr.attribute(model, ids, scopes="all") for model in (parametrised, plain))
    assert float(found.error.max()) < 1e-10
    for scope in found.scopes:
        torch.testing.assert_close(found[scope], expected[scope], rtol=1e-10, atol=1e-12)


def test_a_projection_that_rounds_what_it_reads() -> None:
    rounding = torch.ao.nn.quantized.dynamic.Linear(WIDTH, FF)
    with pytest.raises(UnsupportedModel, match=r"rounds what it reads to 8 bits.*before quantize_dynamic"):
        spec(up=rounding).weights(torch.float32)


def test_what_is_added_to_outputs_is_cut_like_them() -> None:
    module, added = nn.Linear(4, 12), torch.arange(12.0)
    assert select_outputs(module, added) is added
    assert select_outputs(Columns(module, 2, 4, groups=3), added).tolist() == [2, 3, 6, 7, 10, 11]
    assert select_outputs(LayerScale(module, torch.full((12,), 2.0)), added).tolist() == (2 * added).tolist()
