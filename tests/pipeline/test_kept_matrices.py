"""What is kept of a model's weights gives the same maps, notices every change of them and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr.engine.ff_maps import FFOperands
from ffattr.pipeline import kept_matrices


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FFOperands]:
    """The operands whose maps were made, not recalled."""
    found: list[FFOperands] = []
    make = FFOperands._make_maps

    def count(self: FFOperands) -> list[Tensor]:
        found.append(self)
        return make(self)

    monkeypatch.setattr(FFOperands, "_make_maps", count)
    return found


def attribute(model: nn.Module, name: str = "bert", **options: Any) -> ffattr.Attribution:
    return ffattr.attribute(
        model, tiny_models.inputs(name), **{"scopes": "all", "method": "direct", "backend": "torch", **options}
    )


def assert_bits(found: ffattr.Attribution, expected: ffattr.Attribution) -> None:
    for scope in expected.scopes:
        assert torch.equal(found.maps[scope], expected.maps[scope])
        assert torch.equal(found.bias[scope], expected.bias[scope])
    assert torch.equal(found.error, expected.error)


@pytest.mark.parametrize("method", ["direct", "operator", "pairs"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart"])
def test_later_calls_give_the_same_bits(name: str, method: str) -> None:
    model = build(name)
    first, second = (attribute(model, name, method=method) for _ in range(2))
    for one, other in zip(_parts(second), _parts(first), strict=True):
        assert_bits(one, other)


def _parts(found: ffattr.Attribution) -> list[ffattr.Attribution]:
    stacks = getattr(found, "stacks", None)
    return [found] if stacks is None else list(stacks.values())


def test_matrices_are_made_once(made: list[FFOperands]) -> None:
    model = build("bert")
    attribute(model)
    layers = len(made)
    attribute(model, scopes="layer", queries=[-1])
    assert layers == len(made) == 2
    attribute(model, dtype=torch.float32)  # all else is then in float32: the weights are made for the call
    attribute(model, dtype=torch.float32)
    assert len(made) == 3 * layers


def dense(model: Any) -> Any:
    return model.encoder.layer[1].intermediate.dense


def in_place(model: Any) -> None:
    with torch.no_grad():
        dense(model).weight[3, 4] += 1e-13  # too little for any sum to show


def past_versions(model: Any) -> None:
    dense(model).weight.data[3] *= 1.5


def permuted_past_versions(model: Any) -> None:
    weight, bias = dense(model).weight, dense(model).bias
    weight.data.copy_(weight.data.flip(0).clone())
    bias.data.copy_(bias.data.flip(0).clone())
    down = model.encoder.layer[1].output.dense.weight
    down.data.copy_(down.data.flip(1).clone())


def through_numpy(model: Any) -> None:
    dense(model).weight.detach().numpy()[2, 2] += 1


def loaded(model: Any) -> None:
    model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})


def assigned(model: Any) -> None:
    state = {name: value * 1.01 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced_parameter(model: Any) -> None:
    for _ in range(2):  # the second may lie where the first one was
        dense(model).weight = nn.Parameter(dense(model).weight.detach() * 1.1)


def replaced_data(model: Any) -> None:
    for _ in range(2):
        dense(model).weight.data = dense(model).weight.data * 1.1


def replaced_module(model: Any) -> None:
    torch.manual_seed(0)
    model.encoder.layer[1].intermediate.dense = nn.Linear(40, 52).double().eval()


def other_norm(model: Any) -> None:
    with torch.no_grad():
        model.encoder.layer[1].attention.output.LayerNorm.weight[0] += 1


def other_dtype(model: Any) -> None:
    model.float()


def swapped_layers(model: Any) -> None:
    layers = model.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]


CHANGES = (
    *(in_place, past_versions, permuted_past_versions, through_numpy, loaded, assigned, replaced_parameter),
    *(replaced_data, replaced_module, other_norm, other_dtype, swapped_layers),
)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: Callable[[Any], None], made: list[FFOperands]) -> None:
    model = build("bert")
    attribute(model)
    attribute(model)
    before = len(made)
    change(model)
    found = attribute(model)
    assert len(made) > before
    assert_bits(found, attribute(copy.deepcopy(model)))  # nothing is kept of a copy


def test_adapters_that_are_merged_and_taken_out_again() -> None:
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=3, target_modules=["up_proj", "down_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    apart = attribute(model, "llama")
    for _ in range(2):
        model.merge_adapter()
        merged = attribute(model, "llama")
        assert_bits(merged, attribute(copy.deepcopy(model), "llama"))
        assert torch.allclose(merged["layer"], apart["layer"], rtol=1e-9)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert_bits(attribute(model, "llama"), attribute(copy.deepcopy(model), "llama"))


def test_another_number_of_threads_rounds_in_another_way(made: list[FFOperands]) -> None:
    model, threads = build("bert"), torch.get_num_threads()
    attribute(model)
    before = len(made)
    try:
        torch.set_num_threads(threads + 1)
        attribute(model)
    finally:
        torch.set_num_threads(threads)
    assert len(made) == 2 * before


def test_a_model_and_its_old_parameters_are_not_kept_alive() -> None:
    model = build("gpt2")  # whose down matrix needs no copy: it is the parameter itself
    attribute(model, "gpt2")
    attribute(model, "gpt2")
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = [
        one for layer in kept_matrices._models[model].values() for all_of in layer.matrices.values() for one in all_of
    ]
    assert kept
    assert owned.isdisjoint(one.untyped_storage().data_ptr() for one in kept)
    gc.collect()  # models of other tests go when they like
    gone, count = weakref.ref(model), len(kept_matrices._models)
    del model
    gc.collect()
    assert gone() is None
    assert len(kept_matrices._models) == count - 1


def test_nothing_is_left_on_the_model() -> None:
    model = build("bert")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    attribute(model)
    attribute(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_more_is_kept_than_the_limit(made: list[FFOperands], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    attribute(model)
    held = [sum(one.nbytes for made in layer.matrices.values() for one in made) for layer in _kept_of(model)]
    assert min(held) > 0
    monkeypatch.setattr(kept_matrices, "LIMIT", held[0])
    model, before = build("bert"), len(made)
    for _ in range(2):
        attribute(model)
    assert sum(one.nbytes for layer in _kept_of(model) for made in layer.matrices.values() for one in made) <= held[0]
    assert len(made) == before + 2 * len(held) - 1  # the first layer is recalled


def _kept_of(model: nn.Module) -> list[Any]:
    return list(kept_matrices._models[model].values())


def test_whoever_bounds_the_memory_has_nothing_kept(made: list[FFOperands]) -> None:
    model = build("bert")
    for _ in range(2):
        attribute(model, memory_budget=1 << 24)
    assert len(made) == 4
    assert model not in kept_matrices._models
