"""Hooks that take directions out of what parts of a layer return or read: maps are those of other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr.models.capture.user_hooks import Change, _fit_directions

pytestmark = pytest.mark.usefixtures("one_thread")


def directions(width: int, count: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Orthonormal ones, ``[count, width]``."""
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T.to(dtype)


def remove(x: Tensor, count: int = 1, mean: float = 0.0) -> Tensor:
    taken = directions(x.shape[-1], count, x.dtype)
    return x - (x @ taken.T) @ taken + mean * taken.sum(0)


def hook_output(count: int = 1, mean: float = 0.0) -> Callable[..., Any]:
    def take_out(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (remove(output[0], count, mean), *output[1:])
        return remove(output, count, mean)

    return take_out


def weight_of(model: Any, path: str) -> Tensor:
    """The matrix ``[in, out]`` of a projection."""
    module = model.get_submodule(path)
    return module.weight.T if isinstance(module, nn.Linear) else module.weight  # type: ignore[no-any-return]


@torch.no_grad()
def change_outputs(model: Any, path: str, count: int, mean: float) -> None:
    weight, module = weight_of(model, path), model.get_submodule(path)
    weight.copy_(remove(weight, count))
    if module.bias is not None:
        module.bias.copy_(remove(module.bias, count, mean))


@torch.no_grad()
def change_inputs(model: Any, path: str) -> None:
    weight = weight_of(model, path)
    weight.copy_(remove(weight.T).T)


def assert_same_maps(hooked: Any, plain: Any, given: Any) -> None:
    found, expected = (ffattr.attribute(model, given, scopes="all") for model in (hooked, plain))
    assert float(found.error.max()) < 1e-12
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=1e-9, atol=1e-11, msg=scope)
        if scope in expected.bias:
            torch.testing.assert_close(found.bias[scope], expected.bias[scope], rtol=1e-9, atol=1e-11, msg=scope)


@pytest.mark.parametrize(("count", "mean"), [(1, 0.0), (1, 2.5), (2, 0.0)])
@pytest.mark.parametrize(
    ("name", "path", "projection"),
    [
        ("gpt2", "h.0.attn", "h.0.attn.c_proj"),
        ("gpt2", "h.1.mlp", "h.1.mlp.c_proj"),
        ("gpt2", "h.0.mlp.c_fc", "h.0.mlp.c_fc"),
        ("llama-bias", "layers.0.self_attn.o_proj", "layers.0.self_attn.o_proj"),
        ("llama-bias", "layers.1.self_attn.v_proj", "layers.1.self_attn.v_proj"),
        ("llama-bias", "layers.1.mlp", "layers.1.mlp.down_proj"),
    ],
)
def test_what_a_part_returns(name: str, path: str, projection: str, count: int, mean: float) -> None:
    hooked, plain, given = build(name), build(name), tiny_models.inputs(name, padding="right")
    change_outputs(plain, projection, count, mean)
    hooked.get_submodule(path).register_forward_hook(hook_output(count, mean))
    assert_same_maps(hooked, plain, given)


@pytest.mark.parametrize("layer", [0, 1])
def test_what_the_norm_before_attention_returns(layer: int) -> None:
    """Values, keys and queries are made of it."""
    hooked, plain = build("gpt2"), build("gpt2")
    change_inputs(plain, f"h.{layer}.attn.c_attn")
    hooked.h[layer].ln_1.register_forward_hook(hook_output())
    assert_same_maps(hooked, plain, tiny_models.ids())


def test_latent_values_read_the_norm_before_attention() -> None:
    hooked, plain = build("deepseek-v3"), build("deepseek-v3")
    for name in ("q_a_proj", "kv_a_proj_with_mqa"):
        change_inputs(plain, f"layers.0.self_attn.{name}")
    hooked.layers[0].input_layernorm.register_forward_hook(hook_output())
    assert_same_maps(hooked, plain, tiny_models.ids())


@pytest.mark.parametrize("path", ["h.0.attn.c_proj", "h.1.mlp.c_proj", "h.0.mlp.c_fc"])
def test_what_a_projection_reads(path: str) -> None:
    hooked, plain = build("gpt2"), build("gpt2")
    change_inputs(plain, path)
    hooked.get_submodule(path).register_forward_pre_hook(lambda module, args: (remove(args[0]),))
    assert_same_maps(hooked, plain, tiny_models.ids())


def test_contributions_and_vectors() -> None:
    hooked, plain = (build("gpt2", head="LMHeadModel") for _ in range(2))
    hooked.transformer.h[0].mlp.register_forward_hook(hook_output())
    change_outputs(plain, "transformer.h.0.mlp.c_proj", 1, 0.0)
    found, expected = (ffattr.contributions(model, tiny_models.ids(1), target=7) for model in (hooked, plain))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-9, atol=1e-11)
    of_hooked, of_plain = (ffattr.vectors(model, tiny_models.ids(), scope="atb_ln_ff") for model in (hooked, plain))
    torch.testing.assert_close(of_hooked.values, of_plain.values, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "path"), [("bert", "encoder.layer.0.attention.output.LayerNorm"), ("gpt2", "h.0.ln_2")]
)
def test_norms_behind_which_a_scope_lies_are_named(name: str, path: str) -> None:
    """No norm, which acts on each feature alone, is what ran."""
    hooked = build(name)
    hooked.get_submodule(path).register_forward_hook(hook_output())
    with pytest.raises(ffattr.UnsupportedModel, match=r"\(LayerNorm\) returns is changed by a hook \(hook_output.take"):
        ffattr.attribute(hooked, tiny_models.ids())


def test_some_of_a_direction_is_named() -> None:
    hooked = build("gpt2")
    hooked.h[0].mlp.register_forward_hook(lambda module, args, output: 0.5 * (output + remove(output)))
    with pytest.raises(ffattr.UnsupportedModel, match=r"'mlp'.*other than scaling and shifting each feature or taking"):
        ffattr.attribute(hooked, tiny_models.ids())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_tell_half_as_many_directions(dtype: torch.dtype) -> None:
    before = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for count, told in ((1, True), (2, True), (3, False)):
        fitted = _fit_directions(Change("", ("out",), before, remove(before, count, 0.5)), None)
        assert (fitted is not None) == told
        if fitted is None:
            continue
        taken, constant = fitted
        expected = directions(24, count)
        error = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(taken.T @ taken, expected.T @ expected, rtol=0, atol=error)
        torch.testing.assert_close(constant, 0.5 * expected.sum(0), rtol=0, atol=error)
    square = Change("", ("out",), before, before**2)
    assert _fit_directions(square, None) is None
