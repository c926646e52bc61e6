"""Hooks of the user: maps of what ran where they add constants or act on whole layers, else an error names them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from own_modules import mine
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr.models.capture.recorder import record_layers
from ffattr.models.capture.user_hooks import Change, find_edits, name_hook, set_hooks_aside
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

Hook = Callable[[nn.Module, Any, Any], Any]


def vector(width: int, seed: int = 0) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steer(module: nn.Module, args: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    steered = first + vector(first.shape[-1])
    return (steered, *output[1:]) if isinstance(output, tuple) else steered


def ablate(module: nn.Module, args: Any, output: Any) -> Any:
    return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output


def halve_in_place(module: nn.Module, args: Any, output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output).mul_(0.5)


def assert_same_maps(one: ffattr.Attribution, other: ffattr.Attribution, layers: slice = slice(None)) -> None:
    for scope in one.scopes:
        torch.testing.assert_close(one[scope][layers], other[scope][layers], rtol=1e-10, atol=1e-12)
        if scope in one.bias:
            torch.testing.assert_close(one.bias[scope][layers], other.bias[scope][layers], rtol=1e-10, atol=1e-12)


# A hooked module, and the bias that steering it is: of a family with every kind of layer.
BIASES = {
    ("gpt2", "h.0.mlp"): "h.0.mlp.c_proj",
    ("gpt2", "h.0.mlp.c_proj"): "h.0.mlp.c_proj",
    ("gpt2", "h.0.attn"): "h.0.attn.c_proj",
    ("gpt2", "h.0.attn.c_attn"): "h.0.attn.c_attn",
    ("gpt2", "h.0.mlp.c_fc"): "h.0.mlp.c_fc",
    ("gpt2", "h.0.ln_2"): "h.0.ln_2",
    ("bert", "encoder.layer.0.attention"): "encoder.layer.0.attention.output.LayerNorm",
    ("bert", "encoder.layer.0.attention.output.dense"): "encoder.layer.0.attention.output.dense",
    ("bert", "encoder.layer.0.attention.self.value"): "encoder.layer.0.attention.self.value",
    ("bert", "encoder.layer.0.output"): "encoder.layer.0.output.LayerNorm",
    ("llama-bias", "layers.0.self_attn"): "layers.0.self_attn.o_proj",
    ("llama-bias", "layers.0.mlp.gate_proj"): "layers.0.mlp.gate_proj",
}


@pytest.mark.parametrize(("name", "path"), list(BIASES))
def test_steering_is_a_bias(name: str, path: str) -> None:
    hooked, plain, given = build(name), build(name), tiny_models.inputs(name, padding="left")
    part: Any = plain.get_submodule(BIASES[name, path])
    with torch.no_grad():
        part.bias += vector(len(part.bias))
    hooked.get_submodule(path).register_forward_hook(steer)
    found = ffattr.attribute(hooked, given, scopes="all")
    assert float(found.error.max()) < 1e-12
    assert_same_maps(found, ffattr.attribute(plain, given, scopes="all"))
    assert_same_maps(found, ffattr.attribute(hooked, given, scopes="all", backend="reference"))
    of_hooked, of_plain = (ffattr.vectors(model, given) for model in (hooked, plain))
    torch.testing.assert_close(of_hooked.values, of_plain.values, rtol=1e-10, atol=1e-12)


def test_steering_activations_is_a_bias_behind_them() -> None:
    hooked, plain, given = build("gpt2"), build("gpt2"), tiny_models.inputs("gpt2")
    down: Any = plain.h[1].mlp.c_proj
    with torch.no_grad():
        down.bias += vector(len(down.weight)) @ down.weight
    hooked.h[1].mlp.act.register_forward_hook(steer)
    assert_same_maps(*(ffattr.attribute(model, given, scopes="all") for model in (hooked, plain)))


@pytest.mark.parametrize("hook", [steer, ablate, halve_in_place])
def test_a_layer_may_be_changed_in_any_way(hook: Hook) -> None:
    hooked, given = build("llama"), tiny_models.inputs("llama")
    plain = ffattr.attribute(hooked, given, scopes="all")
    hooked.layers[0].register_forward_hook(hook)
    found = ffattr.attribute(hooked, given, scopes="all")
    assert_same_maps(found, plain, slice(0, 1))  # the layer itself gave what it did
    outside = build("llama")
    outside.layers[1].register_forward_pre_hook(lambda module, args: (hook(module, None, args[0]), *args[1:]))
    if hook is not halve_in_place:
        assert_same_maps(found, ffattr.attribute(outside, given, scopes="all"))
    assert not torch.allclose(found["layer"][1], plain["layer"][1])


@pytest.mark.parametrize("path", ["wte", "h.0.attn.resid_dropout"])
def test_what_changes_nothing_or_lies_outside(path: str) -> None:
    hooked = build("gpt2")
    hooked.get_submodule(path).register_forward_hook(steer if path == "wte" else lambda module, args, output: None)
    hooked.h[0].mlp.register_forward_pre_hook(lambda module, args: None)
    assert float(ffattr.attribute(hooked, tiny_models.ids()).error.max()) < 1e-12


def square(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * output[0], *output[1:]) if isinstance(output, tuple) else output * output


def fade(module: nn.Module, args: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    faded = first * torch.linspace(0.5, 1, first.shape[1])[:, None]
    return (faded, *output[1:]) if isinstance(output, tuple) else faded


def to_mean(module: nn.Module, args: Any, output: Any) -> Any:
    """What ablation puts in the place of an output: one that was measured elsewhere."""
    first = output[0] if isinstance(output, tuple) else output
    mean = vector(first.shape[-1], 5).expand_as(first)
    return (mean, *output[1:]) if isinstance(output, tuple) else mean


# A hooked module, and the projection or norm that makes what it returns.
ABLATED = {
    "h.0.attn": "h.0.attn.c_proj",
    "h.0.mlp": "h.0.mlp.c_proj",
    "h.0.mlp.c_fc": "h.0.mlp.c_fc",
    "h.0.ln_2": "h.0.ln_2",
}


@pytest.mark.parametrize("path", ABLATED)
@pytest.mark.parametrize(
    ("hook", "factor", "adds"), [(ablate, 0.0, False), (halve_in_place, 0.5, False), (to_mean, 0.0, True)]
)
def test_a_block_that_is_ablated_is_one_with_other_weights(path: str, hook: Hook, factor: float, adds: bool) -> None:
    hooked, plain, given = build("gpt2"), build("gpt2"), tiny_models.inputs("gpt2", padding="right")
    part: Any = plain.get_submodule(ABLATED[path])
    with torch.no_grad():
        part.weight *= factor
        part.bias *= factor
        part.bias += vector(len(part.bias), 5) * adds
    hooked.get_submodule(path).register_forward_hook(hook)
    found = ffattr.attribute(hooked, given, scopes="all")
    assert float(found.error.max()) < 1e-12
    assert_same_maps(found, ffattr.attribute(plain, given, scopes="all"))
    of_hooked, of_plain = (ffattr.vectors(model, given) for model in (hooked, plain))
    torch.testing.assert_close(of_hooked.values, of_plain.values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "path"), [("gpt2", "h.1.attn.c_proj"), ("llama", "layers.1.self_attn.o_proj")])
def test_a_head_that_is_ablated_brings_nothing(name: str, path: str) -> None:
    """By a hook on what the output projection reads: the usual way, in place."""
    hooked, plain, given = build(name), build(name), tiny_models.inputs(name, padding="left")
    spec = resolve(plain).layers[1]
    width = spec.weights(None).head_dim
    part: Any = plain.get_submodule(path)
    with torch.no_grad():
        (part.weight if name == "gpt2" else part.weight.T)[width : 2 * width] = 0

    def drop_head(module: nn.Module, args: Any) -> None:
        args[0][..., width : 2 * width] = 0

    hooked.get_submodule(path).register_forward_pre_hook(drop_head)
    found, expected = (ffattr.attribute(model, given, scopes="all") for model in (hooked, plain))
    assert_same_maps(found, expected)
    assert not found["attn_heads"][1, :, 1].any()
    assert found["attn_heads"][1, :, 0].any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_neurons_that_are_ablated(name: str) -> None:
    """By what the activation returns, and by what the next projection reads."""
    act, down = {"gpt2": ("h.0.mlp.act", "h.0.mlp.c_proj"), "llama": ("layers.0.mlp.act_fn", "layers.0.mlp.down_proj")}[
        name
    ]
    given, plain = tiny_models.inputs(name), build(name)
    part: Any = plain.get_submodule(down)
    with torch.no_grad():
        (part.weight if name == "gpt2" else part.weight.T)[:9] = 0
    expected = ffattr.attribute(plain, given, scopes="all")

    def drop(tensor: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(tensor[..., :9]), tensor[..., 9:]], -1)

    behind, before = build(name), build(name)
    behind.get_submodule(act).register_forward_hook(lambda module, args, output: drop(output))
    before.get_submodule(down).register_forward_pre_hook(lambda module, args: (drop(args[0]),))
    for hooked in (behind, before):
        assert_same_maps(ffattr.attribute(hooked, given, scopes="all"), expected)


@pytest.mark.parametrize("path", ["h.0.attn", "h.0.mlp", "h.0.mlp.act", "h.0.mlp.c_fc", "h.0.ln_1"])
@pytest.mark.parametrize("hook", [square, fade])
def test_what_is_not_the_same_for_every_token_is_named(path: str, hook: Hook) -> None:
    hooked = build("gpt2")
    hooked.get_submodule(path).register_forward_hook(hook)
    name = path.removeprefix("h.0.")
    with pytest.raises(
        ffattr.UnsupportedModel, match=rf"layer 0.*'{name}' \(.*\) returns is changed by .*{hook.__name__}"
    ):
        ffattr.attribute(hooked, tiny_models.ids())
    with pytest.raises(ffattr.UnsupportedModel, match=f"'{name}'"):
        ffattr.vectors(hooked, tiny_models.ids(), scope="attn")


def test_steering_of_some_tokens_is_no_constant() -> None:
    hooked = build("gpt2")

    def steer_last(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], output[:, -1:] + 1], 1)

    hooked.h[1].mlp.register_forward_hook(steer_last)
    with pytest.raises(
        ffattr.UnsupportedModel, match=r"layer 1.*steer_last.*other than scaling and shifting each feature"
    ):
        ffattr.attribute(hooked, tiny_models.ids())
    assert len(ffattr.attribute(hooked, tiny_models.ids(), layers=[0]).layers) == 1


def test_an_input_that_is_changed() -> None:
    hooked = build("gpt2")
    hooked.h[0].attn.c_proj.register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    with pytest.raises(ffattr.UnsupportedModel, match=r"what 'attn.c_proj' \(Conv1D\) reads is changed by a hook"):
        ffattr.attribute(hooked, tiny_models.ids())


def test_keys_and_queries_may_be_changed() -> None:
    hooked, given = build("llama"), tiny_models.ids()
    plain = ffattr.attribute(hooked, given)
    hooked.layers[0].self_attn.k_proj.register_forward_hook(ablate)
    found = ffattr.attribute(hooked, given)
    assert float(found.error.max()) < 1e-12
    assert not torch.allclose(found["layer"][0], plain["layer"][0])


def test_experts_that_are_changed_are_named() -> None:
    hooked = build("mixtral")
    hooked.layers[0].mlp.register_forward_hook(steer)
    with pytest.raises(ffattr.UnsupportedModel, match="'mlp'"):
        ffattr.attribute(hooked, tiny_models.ids())


def test_contributions_to_a_steered_model() -> None:
    hooked, plain = (build("gpt2", head="LMHeadModel") for _ in range(2))
    hooked.transformer.h[0].mlp.register_forward_hook(steer)
    with torch.no_grad():
        plain.transformer.h[0].mlp.c_proj.bias += vector(len(plain.transformer.h[0].mlp.c_proj.bias))
    found, expected = (ffattr.contributions(model, tiny_models.ids(1), target=7) for model in (hooked, plain))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-9, atol=1e-11)
    hooked.transformer.h[1].register_forward_hook(steer)
    hooked.transformer.h[0].register_forward_hook(steer)
    with pytest.raises(ffattr.UnsupportedModel, match=r"between layers 0 and 1.*\(a hook: steer\)"):
        ffattr.contributions(hooked, tiny_models.ids(1), target=7)


def test_no_hook_is_left_behind() -> None:
    model = build("gpt2")
    handle = model.h[0].mlp.register_forward_hook(steer)
    record_layers(resolve(model), {"input_ids": tiny_models.ids()}, lambda recorded: None)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_single_token_tells_no_constant() -> None:
    spec, before = resolve(build("gpt2")).layers[0], torch.zeros(1, 1, 40, dtype=torch.float64)
    assert not find_edits(spec, [Change("it", ("out",), before, before + 1)], None)
    (edit,) = find_edits(spec, [Change("it", ("out",), before.expand(1, 2, 40), before.expand(1, 2, 40) + 1)], None)
    torch.testing.assert_close(edit.constant, torch.ones(40, dtype=torch.float64))
    assert edit.factor is None


def test_two_tokens_tell_no_factor() -> None:
    spec = resolve(build("gpt2")).layers[0]
    before = torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by = vector(40)
    assert not find_edits(spec, [Change("it", ("out",), before[:, :2], before[:, :2] * by)], None)
    (edit,) = find_edits(spec, [Change("it", ("out",), before, before * by)], None)
    assert edit.factor is not None
    torch.testing.assert_close(edit.factor, by)
    torch.testing.assert_close(edit.constant, torch.zeros_like(by))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steering_in_narrow_dtypes_multiplies_by_one(dtype: torch.dtype) -> None:
    spec = resolve(build("gpt2")).layers[0]
    before = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    after = before + vector(40).to(dtype)
    (edit,) = find_edits(spec, [Change("it", ("out",), before, after)], None)
    assert edit.factor is None
    assert float((edit.constant - vector(40)).abs().max()) < 4 * torch.finfo(dtype).eps


def test_hooks_are_set_aside_and_put_back() -> None:
    model, ran = build("gpt2"), []
    handle = model.h[0].register_forward_hook(lambda module, args, output: ran.append(module))
    with set_hooks_aside(model) as any_there, torch.no_grad():
        model(tiny_models.ids())
    assert any_there
    assert not ran
    with torch.no_grad():
        model(tiny_models.ids())
    assert ran == [model.h[0]]
    handle.remove()
    with set_hooks_aside(model) as any_there:
        assert not any_there


def test_hooks_have_names() -> None:
    assert name_hook(steer) == "steer"
    assert name_hook(nn.ReLU()) == "ReLU"


@pytest.mark.parametrize(
    ("path", "hook"),
    [("blocks.0", steer), ("blocks.1.ff", steer), ("blocks.0.attention", ablate), ("blocks.1.ff", to_mean)],
)
def test_structure_is_found_past_hooks(path: str, hook: Hook) -> None:
    """What a hook makes of a block hides neither its structure nor what the hook does."""
    given = tiny_models.ids() % 50
    hooked, plain = mine(), mine()
    hooked.get_submodule(path).register_forward_hook(hook)
    found = ffattr.attribute(hooked, given, scopes="all")
    assert float(found.error.max()) < 1e-12
    if path == "blocks.0":
        outside = mine()
        outside.blocks[1].register_forward_pre_hook(lambda module, args: (hook(module, None, args[0]),))
        assert_same_maps(found, ffattr.attribute(outside, given, scopes="all"))
        return
    part: Any = plain.get_submodule(path).out if "attention" in path else plain.get_submodule(path).down
    with torch.no_grad():
        if hook is not steer:
            part.weight.zero_()
            part.bias.zero_()
        if hook is not ablate:
            part.bias += vector(24, 5 if hook is to_mean else 0)
    assert_same_maps(found, ffattr.attribute(plain, given, scopes="all"))


def test_a_hook_that_is_no_edit_is_named_in_a_model_that_nothing_knows() -> None:
    hooked = mine()
    hooked.blocks[1].ff.register_forward_hook(square)
    with pytest.raises(ffattr.UnsupportedModel, match=r"layer 1.*'ff' \(FeedForward\) returns is changed by .*square"):
        ffattr.attribute(hooked, tiny_models.ids() % 50)


def test_a_hook_that_makes_a_weight() -> None:
    """The older way of torch to normalise weights."""
    model = mine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in model.blocks:
            nn.utils.weight_norm(block.ff.down)
    expected = ffattr.attribute(mine(), tiny_models.ids() % 50)
    found = ffattr.attribute(model, tiny_models.ids() % 50)
    torch.testing.assert_close(found["layer"], expected["layer"], rtol=1e-9, atol=1e-12)
