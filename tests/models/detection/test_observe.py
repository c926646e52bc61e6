"""One watched forward pass: what its layers read and return, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from own_modules import DECODER, mine, renamed, transformers_model
from recording import state
from tiny_models import build
from torch import nn

import ffattr.models.registry as adapters
from ffattr.errors import CaptureError
from ffattr.models.detection.observe import observe_layers
from ffattr.models.detection.probe import Undetected
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


def test_training_mode() -> None:
    model = mine()
    model.blocks[1].append = nn.Dropout(0.1)
    before = state(model)
    with pytest.raises(CaptureError, match=r"Mine is in training mode at 'blocks.1.append' \(Dropout\).*model\.eval"):
        resolve(model)
    assert state(model) == before


def test_the_model_is_left_as_it_was() -> None:
    model = renamed(build("bert"))
    before = state(model)
    resolve(model)
    assert state(model) == before


def test_what_a_model_does_to_itself_is_undone() -> None:
    """BigBird, given a few tokens, replaces its sparse attention."""
    heads = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
    model = transformers_model("BigBird", **heads)
    modules, kind = list(model.modules()), model.attention_type
    resolve(model)
    assert list(model.modules()) == modules
    assert model.attention_type == kind == "block_sparse"


def test_what_is_seen_of_every_layer() -> None:
    model = mine()
    observed = observe_layers(model)
    assert (observed.path, observed.positions) == ("blocks", 16)
    assert [run.layer for run in observed.runs] == list(model.blocks)
    first, last = observed.runs
    assert first.output is not None
    assert torch.equal(first.output, last.input)
    assert [module for run in observed.runs for module, _ in run.attention] == [b.attention for b in model.blocks]
    assert not first.calls  # of the last layer alone
    by_path = {call.path: call for call in last.calls}
    block = model.blocks[1]
    assert {"attention.qkv", "attention.out", "norm1", "norm2", "ff.down"} <= by_path.keys()
    assert torch.equal(by_path["norm1"].input, last.input)
    assert torch.equal(by_path["norm1"].output, block.norm1(last.input))


def test_no_layers_to_watch() -> None:
    with pytest.raises(Undetected, match=r"no nn\.ModuleList, nn\.Sequential or nn\.ModuleDict of blocks"):
        observe_layers(nn.Linear(3, 3))
