"""Encoders and decoders of models that no adapter knows: both stacks are found, and what the decoder reads of the
encoder, with maps against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_modules import Block, transformers_model
from tiny_models import VOCABULARY, _exact_norms, _randomise, build, ids
from torch import Tensor, nn
from torch.nn import functional as F
from versions import PINNED, needs

import ffattr
from ffattr.errors import UnsupportedModel
from ffattr.models.detection.detect import detect_layers
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

_SIDES: dict[str, Any] = {
    "d_model": 48,
    **{f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{f"{side}_ffn_dim": 40 for side in ("encoder", "decoder")},
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0,
}
_BERT = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 32}
_VIT = {**_BERT, "image_size": 32, "patch_size": 16}
_TROCR = {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 6, "decoder_ffn_dim": 40}


def _finish(model: Any) -> Any:
    needs(str(PINNED), "whose modules these are, of those that are tested")
    _randomise(model)
    model = model.double().eval()
    _exact_norms(model)
    return model


def joined(kind: str, encoder: tuple[str, dict[str, Any]], decoder: tuple[str, dict[str, Any]]) -> Any:
    """An ``EncoderDecoderModel`` or ``VisionEncoderDecoderModel`` of two others."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    given = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    first = getattr(transformers, f"{encoder[0]}Config")(**encoder[1], **({} if encoder[0] == "ViT" else given))
    second = getattr(transformers, f"{decoder[0]}Config")(
        **decoder[1], **given, is_decoder=True, add_cross_attention=True
    )
    config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(first, second)
    return _finish(getattr(transformers, f"{kind}Model")(config))


def _t5gemma() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5GemmaConfig(encoder=dict(_LLAMA), decoder=dict(_LLAMA), vocab_size=VOCABULARY)
    return _finish(transformers.T5GemmaModel(config))


MODELS: dict[str, Callable[[], Any]] = {
    "mvp": lambda: _finish(transformers_model("Mvp", **_SIDES)),
    "t5gemma": _t5gemma,
    "bert-bert": lambda: joined("EncoderDecoder", ("Bert", _BERT), ("Bert", _BERT)),
    "bert-gpt2": lambda: joined("EncoderDecoder", ("Bert", _BERT), ("GPT2", _GPT2)),
    "trocr": lambda: joined(
        "VisionEncoderDecoder", ("ViT", _VIT), ("TrOCR", {**_TROCR, "cross_attention_hidden_size": 48})
    ),
}


def read(name: str) -> dict[str, Tensor]:
    written = {"decoder_input_ids": ids(2, 5, seed=3)}
    if name == "trocr":
        generator = torch.Generator().manual_seed(3)
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64), **written}
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": ids(2, 7), "attention_mask": mask, **written}


@pytest.mark.parametrize("name", MODELS)
def test_both_stacks_and_what_is_between(name: str) -> None:
    model, given = MODELS[name](), read(name)
    found = ffattr.attribute(model, given, scopes="all", backend="torch", dtype=torch.float64)
    expected = ffattr.attribute(model, given, scopes="all", backend="reference", dtype=torch.float64)
    assert set(found.stacks) == {"encoder", "decoder", "cross"}
    assert resolve(model).family == f"structure of {type(model).__name__}"
    for stack, one in found.stacks.items():
        assert float(one.error.max()) < (1e-6 if name == "t5gemma" else 1e-9)  # its softmax is in float32
        for scope, tile in expected.stacks[stack].maps.items():
            assert bool(tile.any())
            torch.testing.assert_close(one.maps[scope], tile, rtol=0, atol=1e-10, msg=f"{stack}.{scope}")
    if name != "trocr":
        assert found.stacks["cross"].key_mask.sum(-1).tolist() == [7, 5]
        assert found.stacks["decoder"].tokens[0] == [str(one) for one in given["decoder_input_ids"][0].tolist()]


def test_cross_maps_written_out() -> None:
    """The attention of a decoder's first layer to the encoder's tokens, from the model's own weights."""
    model = MODELS["bert-gpt2"]()
    given = {"input_ids": ids(1, 7), "decoder_input_ids": ids(1, 5, seed=3)}
    read_by: list[Tensor] = []
    layer = model.decoder.transformer.h[0]
    hook = layer.ln_cross_attn.register_forward_hook(lambda module, args, output: read_by.append(output))
    with torch.no_grad():
        states = model.encoder(input_ids=given["input_ids"]).last_hidden_state[0]
        model(**given)
    hook.remove()
    cross = layer.crossattention
    query = (read_by[0][0] @ cross.q_attn.weight + cross.q_attn.bias).unflatten(-1, (6, 8))
    key, value = (one.unflatten(-1, (6, 8)) for one in (states @ cross.c_attn.weight + cross.c_attn.bias).chunk(2, -1))
    alpha = (torch.einsum("ihf,jhf->hij", query, key) / 8**0.5).softmax(-1)
    out = cross.c_proj.weight.unflatten(0, (6, 8))
    expected = torch.einsum("hij,jhf,hfd->ijd", alpha, value, out).norm(dim=-1)
    found = ffattr.attribute(model, given, scopes="cross.attn", layers=0)
    torch.testing.assert_close(found.stacks["cross"]["attn"][0, 0], expected, rtol=0, atol=1e-9)


def test_a_norm_of_what_cross_attention_returns_is_passed_by_each_head() -> None:
    """T5Gemma's heads add up to what they are together, behind their norm."""
    model, given = MODELS["t5gemma"](), read("t5gemma")
    names = ["cross.attn_heads", "cross.attn"]
    found = ffattr.vectors(model, given, scope=names, layers=1)
    torch.testing.assert_close(found["cross.attn_heads"].values.sum(2), found["cross.attn"].values, rtol=0, atol=1e-10)


def test_contributions_reach_the_encoder() -> None:
    model, given = MODELS["t5gemma"](), read("t5gemma")
    direction = torch.linspace(-1, 1, 48, dtype=torch.float64)
    found = ffattr.contributions(model, given, target=direction, position=-1)
    assert float(found.error.max()) < 1e-6  # its softmax is in float32


class CrossBlock(Block):
    """A block whose second attention, to an encoder's tokens, is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.both, self.back = nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(24, 24)
        self.reader = Reader()


class Reader(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (4, 6)).transpose(1, 2) for one in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Pair(nn.Module):
    """An encoder and a decoder of no library; ``sabotage`` adds something that no formula covers."""

    def __init__(self, sabotage: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.ModuleList(CrossBlock() for _ in range(2))
        for block in self.decoder:
            block.forward = self._make_forward(block, sabotage)
        _randomise(self)
        self.double().eval()

    def _make_forward(self, block: CrossBlock, sabotage: float) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(x: Tensor, states: Tensor) -> Tensor:
            x = x + block.attention(block.norm1(x))
            k, v = block.both(states).chunk(2, -1)
            x = x + block.back(block.reader(block.query(x), k, v * (1 + sabotage * v)))
            return x + block.ff(block.norm2(x))

        return forward

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        states, x = self.embedding(input_ids), self.embedding(decoder_input_ids)
        for block in self.encoder:
            states = block(states)
        for block in self.decoder:
            x = block(x, states)
        return x


def test_modules_of_no_library() -> None:
    model = Pair()
    given = {"input_ids": ids(2, 7) % 50, "decoder_input_ids": ids(2, 5) % 50}
    parts = detect_layers(model, given).parts[0]
    assert (parts["cross_out"], parts["cross_heads"], parts["cross_attention"]) == ("back", 4, "reader")
    found = ffattr.attribute(model, given, scopes="all", dtype=torch.float64)
    expected = ffattr.attribute(model, given, scopes="all", backend="reference", dtype=torch.float64)
    for stack, one in expected.stacks.items():
        for scope, tile in one.maps.items():
            torch.testing.assert_close(found.stacks[stack].maps[scope], tile, rtol=0, atol=1e-10)


def test_values_of_the_encoder_that_something_acts_on() -> None:
    given = {"input_ids": ids(2, 7) % 50, "decoder_input_ids": ids(2, 5) % 50}
    with pytest.raises(UnsupportedModel, match="no projection reads what its attention to the encoder's tokens makes"):
        ffattr.attribute(Pair(sabotage=0.1), given)


def test_a_decoder_alone_with_cross_attention_that_does_not_run() -> None:
    """BERT as a decoder reads an encoder only where it is given one."""
    model = build("bert", is_decoder=True, add_cross_attention=True)
    found = ffattr.attribute(model, ids(), dtype=torch.float64)
    assert float(found.error.max()) < 1e-12
