"""Decoders that attend to tokens from elsewhere, and layers that attend to their own tokens twice."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from own_modules import Attention, Block, Mine, transformers_model
from tiny_models import build, ids
from torch import Tensor

import ffattr
from ffattr.errors import UnsupportedModel
from ffattr.models import registry
from ffattr.models.detection.memory import find_memory_names
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def states(length: int, width: int, seed: int = 2) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["bart", "mbart", "t5", "whisper"])
def test_a_decoder_alone_has_the_maps_that_it_has_beside_its_encoder(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name, padding="right")
    expected = ffattr.attribute(model, given, scopes=["decoder.all", "cross.all"], dtype=torch.float64)
    read = {key: value for key, value in given.items() if not key.startswith("decoder_")}
    with torch.no_grad():
        memory = model.get_encoder()(**read).last_hidden_state
    alone = {
        "input_ids": given["decoder_input_ids"],
        "attention_mask": given["decoder_attention_mask"],
        "encoder_hidden_states": memory,
    }
    if "attention_mask" in read:
        alone["encoder_attention_mask"] = read["attention_mask"]
    found = ffattr.attribute(model.get_decoder(), alone, scopes="all", dtype=torch.float64)
    assert found.maps.keys() == expected.maps.keys()
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=1e-9, atol=1e-11)
    if "attention_mask" in read:
        assert torch.equal(found.stacks["cross"].key_mask, read["attention_mask"].bool())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_it_need_not_have_a_memory(name: str) -> None:
    """What was found of one way to run it is not taken for the other."""
    options = {"bert": {"is_decoder": True}, "gpt2": {}}[name]
    model = build(name, add_cross_attention=True, **options)
    given = {"input_ids": ids(2, 5), "encoder_hidden_states": states(6, 40)}
    first = ffattr.attribute(model, given["input_ids"])
    both = ffattr.attribute(model, given, scopes="all", dtype=torch.float64)
    again = ffattr.attribute(model, given["input_ids"])
    torch.testing.assert_close(first["layer"], again["layer"], rtol=0, atol=0)
    assert set(both.stacks) == {"decoder", "cross"}
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(both.maps[scope], tile, rtol=0, atol=1e-10)
    assert float(both.error.max()) < 1e-12


def test_an_encoder_that_attends_in_blocks_leaves_the_decoder() -> None:
    """LongT5's: what it makes is read as tokens like any."""
    settings = {"d_model": 48, "num_layers": 1, "d_kv": 8, "d_ff": 40}
    model = transformers_model("LongT5", encoder_attention_type="local", **settings)
    given = {"input_ids": ids(2, 5, seed=4), "decoder_input_ids": ids(2, 5)}
    found = ffattr.attribute(model, given, scopes="all", dtype=torch.float64)
    assert set(found.stacks) == {"decoder", "cross"}
    assert float(found.error.max()) < 1e-6  # its softmax is in float32
    assert found.tokens[1] == [str(one) for one in given["decoder_input_ids"][1].tolist()]
    assert found.stacks["cross"].key_tokens is not None
    assert found.stacks["cross"].key_tokens[1] == [str(one) for one in given["input_ids"][1].tolist()]
    with pytest.raises(ValueError, match="inputs has no 'decoder_input_ids'"):
        ffattr.attribute(model, {"input_ids": ids()})


class Twice(Block):
    """A second attention, to the layer's own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.more = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.more(x))


def test_layers_that_attend_to_their_own_tokens_twice_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"layer 0 of 'blocks' attends 2 times .*expected once"):
        resolve(Mine([Twice(), Twice()]))


def test_an_adapter_may_describe_cross_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    decoder: Any = build("bart").get_decoder()
    given = {"input_ids": ids(2, 5), "encoder_hidden_states": states(6, 40)}
    found = ffattr.attribute(decoder, given)
    specs = resolve(decoder, lambda base: given).layers
    registry.register_adapter("BartDecoder", lambda base: specs)
    again = ffattr.attribute(decoder, given)
    assert again.plan is not None
    for scope, tile in found.maps.items():
        assert torch.equal(again.maps[scope], tile)


def test_what_arguments_of_a_memory_are_called() -> None:
    names = ("input_ids", "encoder_hidden_states", "memory", "tgt", "memory_mask")
    assert find_memory_names(names) == {"encoder_hidden_states", "memory", "memory_mask"}


def test_an_encoders_states_for_a_model_that_reads_none() -> None:
    with pytest.raises(UnsupportedModel, match=r"no layer of BertModel attends to an encoder's tokens"):
        ffattr.attribute(build("bert"), {"input_ids": ids(), "encoder_hidden_states": states(6, 40)})
