"""Attention rows are the model's own: recomputed from what is recorded of a module, they equal the weights that the
model itself returns (``output_attentions=True``), and are exactly 0 for the same pairs."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from recording import state
from tiny_models import build
from torch import Tensor, nn

from ffattr.decomposition.attention import Attention, AttentionWeights, NormedValues, QueryKey
from ffattr.models.capture.attention_hooks import calls_interface, record_interface, record_own_attention
from ffattr.models.capture.run import list_configs

LENGTH = 7  # longer than every window
_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "head_dim": 8,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "pad_token_id": 0,
}
_T5: dict[str, Any] = {
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
}
_BART: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
}
# Where the attention modules of a model are, by what its output calls their weights.
_DECODER = {"attentions": "layers.{}.self_attn"}
_GPT = {"attentions": "h.{}.attn"}
_FALCON = {"attentions": "h.{}.self_attention"}
_DEBERTA = {"attentions": "encoder.layer.{}.attention.self"}
MODULES: dict[str, dict[str, str]] = {
    "mistral": _DECODER,
    "gemma2": _DECODER,
    "gemma3": _DECODER,
    "gpt-oss": _DECODER,
    "cohere2": _DECODER,
    "granite": _DECODER,
    "gptj": _GPT,
    "codegen": _GPT,
    "gpt-neo": {"attentions": "h.{}.attn.attention"},
    "mpt": {"attentions": "blocks.{}.attn"},
    "bloom": _FALCON,
    "falcon-7b": _FALCON,
    "falcon-40b": _FALCON,
    "falcon-rw": _FALCON,
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,
    "mpnet": {"attentions": "encoder.layer.{}.attention.attn"},
    "t5": {
        "encoder_attentions": "encoder.block.{}.layer.0.SelfAttention",
        "decoder_attentions": "decoder.block.{}.layer.0.SelfAttention",
        "cross_attentions": "decoder.block.{}.layer.1.EncDecAttention",
    },
    "bart": {
        "encoder_attentions": "encoder.layers.{}.self_attn",
        "decoder_attentions": "decoder.layers.{}.self_attn",
        "cross_attentions": "decoder.layers.{}.encoder_attn",
    },
}
INTERFACE = ("mistral", "gemma2", "gemma3", "gpt-oss", "cohere2", "granite", "t5", "bart")
# Soft-caps and sinks are eager alone. Falcon's eager function adds ALiBi twice, its sdpa once.
SDPA = ("mistral", "gemma3", "cohere2", "granite", "t5", "bart", "falcon-7b", "falcon-40b")


def model_of(name: str, implementation: str, dtype: torch.dtype) -> nn.Module:
    own = {"gpt-oss": ("GptOss", _SMALL), "t5": ("T5", _T5), "bart": ("Bart", _BART)}
    if name not in own:
        return build(name, dtype=dtype, attn_implementation=implementation)
    transformers: Any = importlib.import_module("transformers")
    prefix, settings = own[name]
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=tiny_models.VOCABULARY, attn_implementation=implementation, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{prefix}Model")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0)
    return model.to(dtype).eval()


def given_to(name: str, padding: str | None) -> dict[str, Tensor]:
    given = tiny_models.inputs("bert", length=LENGTH, padding=padding)
    if name in ("t5", "bart"):
        other = tiny_models.inputs("bert", length=5, padding=padding, seed=2)
        given |= {f"decoder_{key}": value for key, value in other.items()}
    return given


def recorded(name: str, model: nn.Module, given: dict[str, Tensor]) -> dict[tuple[str, int], Attention]:
    """What the modules hand over, by the output that has their weights and the number of the layer."""
    places = [(output, layer, path.format(layer)) for output, path in MODULES[name].items() for layer in (0, 1)]
    modules = {i: model.get_submodule(path) for i, (_, _, path) in enumerate(places)}
    found: dict[tuple[str, int], Attention] = {}

    def sink(index: int, attention: Attention) -> None:
        assert places[index][:2] not in found
        found[places[index][:2]] = attention

    if name in INTERFACE:
        capturing = record_interface(list_configs(model.modules()), modules, sink)
    else:
        capturing = record_own_attention(modules, dict.fromkeys(modules, model.config.num_attention_heads), sink)
    assert {calls_interface(module) for module in modules.values()} == {name in INTERFACE}
    before = state(model)
    with capturing, torch.no_grad():
        model(**given)
    assert state(model) == before
    assert len(found) == len(places)
    return found


def assert_rows(name: str, implementation: str, padding: str | None, dtype: torch.dtype) -> None:
    given = given_to(name, padding)
    with torch.no_grad():
        output = model_of(name, "eager", dtype)(**given, output_attentions=True)
    for (kind, layer), attention in recorded(name, model_of(name, implementation, dtype), given).items():
        expected = output[kind][layer].double()
        assert attention.shape == expected.shape
        # Modules of their own are seen computing weights, which nothing needs to compute again.
        assert isinstance(attention, QueryKey) == (name in INTERFACE or implementation == "sdpa")
        decoding = "decoder_attention_mask" in given and kind != "encoder_attentions"
        for batch in range(2):
            valid = given["decoder_attention_mask" if decoding else "attention_mask"][batch].bool()
            valid_keys = given["attention_mask"][batch].bool() if kind == "cross_attentions" else valid
            tokens, keys = valid.nonzero()[:, 0], valid_keys.nonzero()[:, 0]
            sequence, rows = attention.sequence(batch, tokens, torch.float64, keys), torch.arange(len(tokens))
            alpha, own = sequence.attention_weights(rows), expected[batch][:, valid][..., valid_keys]
            torch.testing.assert_close(alpha, own, rtol=0, atol=1e-6)
            torch.testing.assert_close(sequence.attention_weights(rows[2:3]), alpha[:, 2:3], rtol=0, atol=1e-15)
            attends = own != 0
            assert torch.equal(alpha != 0, attends)
            assert (expected[batch][:, valid][..., ~valid_keys] == 0).all()
            assert sequence.pairs(rows) == int(attends.any(0).sum())
            assert kind == "cross_attentions" or sequence.looks_ahead == bool(attends.any(0).triu(1).any())


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODULES)
def test_eager(name: str, padding: str | None) -> None:
    assert_rows(name, "eager", padding, torch.float32)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("name", SDPA)
def test_sdpa(name: str, padding: str | None) -> None:
    """In float64, so that two implementations of one layer do not part in the next."""
    assert_rows(name, "sdpa", padding, torch.float64)


@pytest.mark.parametrize(("name", "layer", "pairs"), [("mistral", 0, 18), ("gpt-neo", 0, 18), ("gpt-neo", 1, 28)])
def test_windows(name: str, layer: int, pairs: int) -> None:
    """Of three tokens, or all of seven."""
    found = recorded(name, model_of(name, "eager", torch.float32), given_to(name, None))["attentions", layer]
    assert found.sequence(0, torch.arange(LENGTH), torch.float32).pairs(torch.arange(LENGTH)) == pairs


def test_sinks_take_their_share() -> None:
    found = recorded("gpt-oss", model_of("gpt-oss", "eager", torch.float32), given_to("gpt-oss", None))
    rows = (
        found["attentions", 1].sequence(0, torch.arange(LENGTH), torch.float32).attention_weights(torch.arange(LENGTH))
    )
    assert (rows.sum(-1) < 0.99).any()
    assert (rows.sum(-1) < 1).all()


def test_position_bias_is_no_mask() -> None:
    """It is kept apart from the mask: one for all sequences, and every pair counts."""
    found = recorded("t5", model_of("t5", "sdpa", torch.float32), given_to("t5", "right"))
    attention = found["encoder_attentions", 1]
    assert isinstance(attention, QueryKey)
    assert attention.bias is not None
    assert attention.bias.shape == (1, 4, LENGTH, LENGTH)
    assert attention.mask is not None
    assert attention.mask.dtype == torch.bool
    without = replace(attention, bias=None).sequence(0, torch.arange(LENGTH), torch.float32)
    rows = torch.arange(LENGTH)
    with_bias = attention.sequence(0, rows, torch.float32)
    assert (without.attention_weights(rows) - with_bias.attention_weights(rows)).abs().max() > 0.01


def test_normed_values_weigh_each_key() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(2, 4, 5, 5, generator=generator, dtype=torch.float64).tril()
    gain = torch.rand(2, 5, 2, generator=generator, dtype=torch.float64)  # of two key/value heads
    found = NormedValues(AttentionWeights(alpha), gain)
    rows, tokens = torch.tensor([3, 1]), torch.tensor([0, 1, 2, 4])
    sequence = found.sequence(1, tokens, torch.float64)
    expected = alpha[1] * gain[1].T.repeat_interleave(2, 0)[:, None]
    torch.testing.assert_close(sequence.attention_weights(rows), expected[:, tokens][:, rows][..., tokens])
    assert (found.shape, found.rounds_to_float32) == ((2, 4, 5, 5), False)
    assert (sequence.pairs(rows), sequence.looks_ahead) == (4 + 2, False)


def test_weights_are_held_as_they_are() -> None:
    found = recorded("gptj", model_of("gptj", "eager", torch.float32), given_to("gptj", "left"))["attentions", 0]
    assert isinstance(found, AttentionWeights)
    rows = torch.tensor([4, 0])
    sequence = found.sequence(1, torch.arange(2, LENGTH), torch.float64)
    assert torch.equal(sequence.attention_weights(rows), found.alpha[1][:, 2:, 2:][:, rows].double())
    assert sequence.pairs(rows) == 5 + 1
    assert not sequence.looks_ahead
    assert found.looks_ahead  # rows of padding
