"""Mixtures of experts as transformers has them."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from compare_results import assert_same, ways_of
from recording import state
from tiny_models import MIXTURES, MORE_MIXTURES, build
from torch import Tensor, nn

import ffattr
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

SCOPE = "atb_ln_ff_experts"
LENGTH = 7


def mixtures(model: nn.Module) -> list[int]:
    return [index for index, spec in enumerate(resolve(model).layers) if spec.experts is not None]


def routed(model: nn.Module, given: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What the routers say themselves: experts and weights ``[B, T, k]`` of each layer that has a router."""
    found: list[tuple[Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: found.append((output[2], output[1])))
        for module in model.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    shape = (*given["input_ids"].shape, -1)
    return [(index.view(shape), weight.view(shape)) for index, weight in found]


@pytest.mark.parametrize("name", MIXTURES)
def test_description(name: str) -> None:
    model = build(name)
    assert mixtures(model) == ([1] if name == "qwen3-moe-mixed" else [0, 1])
    for index in mixtures(model):
        spec = resolve(model).layers[index]
        weights = spec.weights(torch.float64)
        assert weights.mixture
        assert weights.branches[0].gate is not None
        assert spec.active == 2
        assert weights.scopes == ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res")
        assert (weights.branches[0].clamp is not None) == (name == "gpt-oss")
        assert weights.branches[0].up.weight.shape[0] == (4 if name in ("mixtral", "gpt-oss") else 5)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MIXTURES)
def test_layers_and_maps(name: str, padding: str | None) -> None:
    """Each layer is reproduced from its record, and all maps are those of the definition."""
    model, given = build(name), tiny_models.inputs(name, length=LENGTH, padding=padding)
    before = state(model)
    expected = ffattr.attribute(model, given, scopes=["all", SCOPE], backend="reference")
    assert expected.error.max() < 1e-10
    for backend, method in ways_of(name, padding, MIXTURES):
        found = ffattr.attribute(
            model, given, scopes=["all", SCOPE], backend=backend, method=method, dtype=torch.float64
        )
        assert_same(found, expected)
        assert found.error.max() < 1e-10
    assert state(model) == before


@pytest.mark.parametrize("name", MORE_MIXTURES)
def test_families_of_the_same_layers(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name, length=LENGTH, padding="right")
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    found = ffattr.attribute(model, given, scopes="all", backend="torch", dtype=torch.float64)
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)
    assert expected.error.max() < 1e-10


@pytest.mark.parametrize("name", MIXTURES)
def test_vectors_add_up_over_tokens_and_experts(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name, length=LENGTH)
    whole = ffattr.vectors(model, given, scope="atb_ln_ff")
    torch.testing.assert_close(whole.values.sum(-2) + whole.bias, whole.total, rtol=0, atol=1e-10)
    apart = ffattr.vectors(model, given, scope=SCOPE)
    assert apart.values.shape[2] == 2
    layers = mixtures(model)
    torch.testing.assert_close(apart.values[layers].sum(2), whole.values[layers], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MIXTURES)
def test_who_carried_what(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name, length=LENGTH, padding="right")
    found = ffattr.attribute(model, given, scopes=["atb_ln_ff", SCOPE], queries=[6, 0, 4])
    assert found.experts is not None
    assert found.shares is not None
    assert found.experts.shape == found.shares.shape == (2, 2, 3, 2)
    real = found.mask[:, [6, 0, 4]]
    for layer, (index, weight) in zip(mixtures(model), routed(model, given), strict=True):
        assert torch.equal(found.experts[layer][real], index[:, [6, 0, 4]][real])
        torch.testing.assert_close(found.shares[layer][real], weight[:, [6, 0, 4]].to(found.shares)[real])
        by_expert = torch.stack([found.of_expert(number)[layer] for number in range(5)])
        torch.testing.assert_close(by_expert.sum(0), found.maps[SCOPE][layer].sum(1))
        # Vectors of two experts may cancel, but not add up to more than their norms.
        assert (by_expert.sum(0) >= found.maps["atb_ln_ff"][layer] - 1e-10).all()
    assert (found.experts[:, ~real] == -1).all()
    dense = sorted({0, 1}.difference(mixtures(model)))
    assert (found.experts[dense] == -1).all()
    assert (found.maps[SCOPE][dense] == 0).all()


def test_by_expert_has_to_be_named() -> None:
    model, given = build("mixtral"), tiny_models.inputs("mixtral")
    assert SCOPE not in ffattr.attribute(model, given, scopes="all").maps
    with pytest.raises(ValueError, match=f"unknown scope 'atb_ff_experts'; this architecture has: .*all but {SCOPE}"):
        ffattr.attribute(model, given, scopes="atb_ff_experts")
    with pytest.raises(ValueError, match="unknown scope 'atb_ln_ff_experts'"):
        ffattr.attribute(build("llama"), tiny_models.inputs("llama"), scopes=SCOPE)
    with pytest.raises(ValueError, match="not told apart by expert; computed and told apart: none"):
        ffattr.attribute(model, given).of_expert(0)


def test_plan_counts_what_every_set_of_experts_costs() -> None:
    model, given = build("mixtral"), tiny_models.inputs("mixtral")
    ran = ffattr.attribute(model, given).plan.layers[0].shape
    assert ran.ff_width == 2 * 76
    assert 1 < ran.expert_sets <= 6
    assert ffattr.plan(model, given).layers[0].shape.expert_sets == 6
    apart = ffattr.attribute(model, given, scopes=["layer", SCOPE]).plan
    assert apart.flops > ffattr.attribute(model, given).plan.flops


def test_a_baseline_is_that_of_every_expert() -> None:
    model, given = build("qwen3-moe-mixed"), tiny_models.inputs("qwen3-moe-mixed")
    baseline = torch.linspace(-1, 1, 20, dtype=torch.float64)
    expected = ffattr.attribute(model, given, baseline=baseline, layers=1, backend="reference")
    found = ffattr.attribute(model, given, baseline=baseline, layers=1, backend="cpu")
    torch.testing.assert_close(found["layer"], expected["layer"], rtol=0, atol=1e-10)
    assert (found["layer"] - ffattr.attribute(model, given, layers=1)["layer"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"baseline has shape \[20\], expected \[76\] .* in layer 0"):
        ffattr.attribute(model, given, baseline=baseline)


def test_a_baseline_of_the_gate_alone_leaves_up_at_zero() -> None:
    model, given = build("mixtral"), tiny_models.inputs("mixtral")
    gate = torch.linspace(-1, 1, 76, dtype=torch.float64)
    both = torch.stack([gate, torch.zeros_like(gate)])
    found = [ffattr.attribute(model, given, baseline=baseline)["layer"] for baseline in (gate, both)]
    assert torch.equal(*found)


def test_only_mixtures_among_the_layers_are_computed_by_expert() -> None:
    plan = ffattr.attribute(build("qwen3-moe-mixed"), tiny_models.inputs("qwen3-moe-mixed"), scopes=["all", SCOPE]).plan
    assert [(layer.layer, layer.shape.by_expert) for layer in plan.layers] == [(0, False), (1, True)]


def test_frames_name_the_experts() -> None:
    """Where the first tokens are padding too, whose queries are in no row."""
    model, given = build("mixtral"), tiny_models.inputs("mixtral", length=LENGTH, padding="left")
    found = ffattr.attribute(model, given, scopes=["layer", SCOPE], queries=[1, 4, 3])
    assert found.experts is not None
    frame = found.to_pandas()
    assert frame[frame["scope"] == "atb_ln_ff_res"]["expert"].isna().all()
    frame = frame[frame["scope"] == SCOPE]
    assert set(frame[frame["batch"] == 1]["query"]) == {4, 3}
    for layer, batch, place, query in ((0, 0, 0, 1), (1, 1, 2, 3), (1, 1, 1, 4)):
        numbers = found.experts[layer, batch, place].tolist()
        rows = frame[(frame["layer"] == layer) & (frame["batch"] == batch) & (frame["query"] == query)]
        for slot, number in enumerate(numbers):
            norms = rows[rows["expert"] == number].sort_values("key")["norm"].to_numpy()
            expected = found.maps[SCOPE][layer, batch, slot, place][found.mask[batch]]
            torch.testing.assert_close(torch.from_numpy(norms.copy()), expected.to(torch.from_numpy(norms.copy())))
