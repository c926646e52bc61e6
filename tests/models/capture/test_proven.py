"""The model is run a second time until recording was seen to leave it as it is, and again whenever the code changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import Tensor, nn

from ffattr.errors import CaptureError
from ffattr.models.capture.proven import read_code
from ffattr.models.capture.recorder import record_layers
from ffattr.models.registry import resolve


class Counted:
    """A model that counts how often it runs: by a hook that is there from the beginning."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.runs = model, 0
        model.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: Any) -> None:
        self.runs += 1

    def record(self, layers: list[int] | None = None, **kwargs: Any) -> int:
        """How often it runs to be recorded."""
        before = self.runs
        given = kwargs or {"input_ids": tiny_models.ids()}
        record_layers(resolve(self.model), given, lambda recorded: None, layers)
        return self.runs - before


@pytest.mark.parametrize("name", ["bert", "llama", "torch-pre"])
def test_a_model_is_run_twice_only_the_first_time(name: str) -> None:
    counted = Counted(build(name))
    given = tiny_models.inputs(name)
    assert [counted.record(**given) for _ in range(3)] == [2, 1, 1]


def hook_layer(model: Any) -> None:
    model.encoder.layer[1].register_forward_hook(lambda module, args, output: None)


def replace_module(model: Any) -> None:
    model.encoder.layer[0].intermediate.dense = nn.Linear(40, 52).double().eval()


def replace_forward(model: Any) -> None:
    dense = model.encoder.layer[0].output.dense
    dense.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight, self.bias), dense)


def change_dtype(model: Any) -> None:
    model.float()


def choose_eager(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [hook_layer, replace_module, replace_forward, change_dtype, choose_eager])
def test_a_change_of_the_code_is_noticed(change: Callable[[Any], None]) -> None:
    counted = Counted(build("bert"))
    assert [counted.record(), counted.record()] == [2, 1]
    change(counted.model)
    assert [counted.record(), counted.record()] == [2, 1]


def test_a_hook_of_all_modules_is_noticed() -> None:
    counted = Counted(build("bert"))
    counted.record()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        assert [counted.record(), counted.record()] == [2, 1]
    finally:
        handle.remove()


def test_a_replaced_method_of_the_class_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(build("bert"))
    counted.record()
    layer = type(counted.model.encoder.layer[0].output)  # type: ignore[union-attr, index]
    forward: Any = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, *args: forward(self, *args))
    assert counted.record() == 2


def test_other_kinds_of_inputs_and_layers_are_no_proof() -> None:
    counted = Counted(build("bert"))
    mask = torch.ones(2, 7, dtype=torch.int64)
    padded = mask.clone()
    padded[1, 5:] = 0
    ids = tiny_models.ids()
    for kwargs in ({"attention_mask": mask}, {"attention_mask": padded}, {"token_type_ids": 0 * ids}):
        assert [counted.record(input_ids=ids, **kwargs) for _ in range(2)] == [2, 1]
    assert [counted.record([0]), counted.record([0])] == [2, 1]
    assert counted.record(input_ids=tiny_models.ids(length=20)) == 2  # much longer
    with torch.autocast("cpu", torch.bfloat16):
        assert counted.record(input_ids=ids, attention_mask=mask) == 2


def test_another_attention_than_the_models_own_is_checked_every_time() -> None:
    counted = Counted(build("bert"))
    counted.model.config._attn_implementation_internal = "flex_attention"  # type: ignore[union-attr]
    code = read_code(counted.model, {}, [0])
    code.keep_proof()
    assert not code.runs_as_is
    assert not read_code(counted.model, {}, [0]).is_proven


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def test_what_failed_is_no_proof() -> None:
    model: Any = build("bert")
    model.encoder.layer[0].output.dropout = Random().eval()
    for _ in range(2):
        with pytest.raises(CaptureError, match="recording changed output"):
            record_layers(resolve(model), {"input_ids": tiny_models.ids()}, lambda recorded: None)


def test_a_proof_keeps_no_model_alive() -> None:
    model = build("bert")
    record_layers(resolve(model), {"input_ids": tiny_models.ids()}, lambda recorded: None)
    assert read_code(model, {}, []).base is model
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
