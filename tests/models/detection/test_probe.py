"""Lists of modules that may be layers, and the small inputs that models are tried on."""

from __future__ import annotations

import pytest
import torch
from own_modules import Block, Still, mine
from tiny_models import build
from torch import nn
from torch.nn import functional as F

import ffattr.models.registry as adapters
from ffattr.models.detection.probe import BATCH, TOKENS, find_stacks, list_layers, make_inputs
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


def test_features_instead_of_ids() -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 30, activation="gelu", batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(10, 24), nn.TransformerEncoder(layer, 2)).double().eval()
    description = resolve(model)
    assert len(description.layers) == 2
    assert description.layers[1].norm_after_ff is model[1].layers[1].norm2
    assert description.layers[0].activation is F.gelu


def test_stacks_are_lists_of_blocks_of_one_class() -> None:
    model = mine()
    assert find_stacks(model) == {"blocks": list(model.blocks)}
    assert find_stacks(nn.ModuleDict({"inner": model})) == {"inner.blocks": list(model.blocks)}
    assert find_stacks(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) == {}  # single projections
    mixed = nn.ModuleList([Block(), Still()])
    assert find_stacks(mixed) == {"": list(mixed)}


def test_lists_may_hold_nothing_at_some_places() -> None:
    one, other = Block(), Block()
    assert list_layers([one, None, nn.Identity(), other]) == [one, other]
    assert list_layers(nn.ModuleDict({"a": one, "b": other})) == [one, other]
    assert find_stacks(nn.ModuleList([one, nn.Identity(), other])) == {"": [one, other]}


def test_inputs_to_try() -> None:
    model = build("bert")
    (ids,) = make_inputs(model)
    assert ids["input_ids"].shape == (BATCH, TOKENS)
    special = {value for key, value in vars(model.config).items() if key.endswith("_token_id")}
    assert not special & set(ids["input_ids"].flatten().tolist())
    assert list(next(make_inputs(build("vit")))) == ["pixel_values"]
    (features,) = make_inputs(nn.TransformerEncoderLayer(8, 2, 16).double())
    assert features["src"].shape == (BATCH, TOKENS, 8)
    assert features["src"].dtype == torch.float64
