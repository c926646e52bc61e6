"""Weights are read and checked once, before the model runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import nn

import ffattr
from ffattr import NonFiniteError, UnsupportedModel
from ffattr.models.registry import resolve
from ffattr.pipeline.options import Options
from ffattr.pipeline.read_weights import ReadWeights, read_weights
from ffattr.pipeline.request import Request


def read(model: nn.Module) -> ReadWeights:
    spec = resolve(model).layers[1]
    return ReadWeights.from_weights(spec.weights(None), spec.module)


def test_a_layer_on_two_devices_is_refused() -> None:
    out, up = torch.ones(2), torch.empty(2, device="meta")
    weights = SimpleNamespace(
        out=SimpleNamespace(weight=out), tensors=lambda: iter([("out.weight", out), ("up.weight", up)])
    )
    spec = SimpleNamespace(weights=lambda dtype: weights)
    stack: Any = SimpleNamespace(layers=[0], specs=[spec], label_layer=lambda layer: f"layer {layer}")
    with pytest.raises(UnsupportedModel, match=r"layer 0: up.weight is on meta, but out.weight on cpu; expected each"):
        read_weights(stack)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_entry_that_is_no_number_is_named(dtype: torch.dtype, value: float) -> None:
    model: Any = build("bert", dtype=dtype)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[1, 5] = value
    with pytest.raises(NonFiniteError, match=r"layer 1: down.weight has entries that are NaN or infinite"):
        ffattr.attribute(model, tiny_models.inputs("bert"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_numbers_are_numbers(dtype: torch.dtype) -> None:
    model: Any = build("bert", dtype=dtype)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.fill_(torch.finfo(dtype).max)  # their sum is infinite
    request = Request.from_options(model, tiny_models.inputs("bert"), None, Options())
    assert request.inputs.mask.all()


def test_parameters_are_told_from_what_is_made_of_them() -> None:
    assert read(build("bert")).owned
    assert read(build("bert")).of_dtype(torch.float64)
    assert not read(build("bert")).of_dtype(torch.float32)
    scaled = read(build("cait")) if "cait" in tiny_models.FAMILIES else read(build("dinov2"))
    assert not scaled.owned  # LayerScale is multiplied in


def test_content_tells_weights_apart() -> None:
    model: Any = build("bert")
    weight, before = model.encoder.layer[1].intermediate.dense.weight, read(model)
    content = before.content  # made when it is asked for
    assert torch.equal(read(model).content, content)
    for change in (lambda: weight.data.copy_(weight.data.flip(0).clone()), lambda: weight.data[:, :2].mul_(1.001)):
        change()
        assert read(model).where == before.where  # no version tells
        assert not torch.equal(read(model).content, content)
        content = read(model).content


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    layers: list[int] = []
    spec = type(resolve(model).layers[0])
    weights = spec.weights
    monkeypatch.setattr(spec, "weights", lambda self, dtype: (layers.append(id(self.module)), weights(self, dtype))[1])
    ffattr.attribute(model, tiny_models.inputs("bert"))
    assert len(layers) == len(set(layers)) == 2
