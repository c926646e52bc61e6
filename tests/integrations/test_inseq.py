"""The method that inseq knows as "ffattr": step by step what `ffattr.contributions` gives for the tokens so far."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import tiny_models
import torch
from made_tokenizers import make_tokenizer

import ffattr

inseq = pytest.importorskip("inseq")
importlib.import_module("ffattr.integrations.inseq")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(pad_token="[PAD]", bos_token="[CLS]", eos_token="</s>")


def test_a_decoder(tokenizer: Any) -> None:
    model = tiny_models.build("gpt2", head="LMHeadModel", dtype=torch.float32, pad_token_id=0, bos_token_id=2)
    wrapped = inseq.load_model(model, "ffattr", tokenizer=tokenizer)
    text, whole = "the cat sat", "the cat sat on a mat"
    out = wrapped.attribute(text, whole, value_bias="separate", show_progress=False)
    (sequence,) = out.sequence_attributions
    assert out.info["attribution_method"] == "ffattr"
    scores = sequence.target_attributions  # [tokens, steps]
    ids = torch.tensor([[token.id for token in sequence.target]])
    start = sequence.attr_pos_start
    assert scores.shape[1] == ids.shape[1] - start == 3
    for step in range(scores.shape[1]):
        before, following = ids[:, : start + step], int(ids[0, start + step])
        found = ffattr.contributions(model, before, target=following, value_bias="separate")
        assert torch.allclose(scores[: before.shape[1], step], found.scores[0, 0, 0], rtol=1e-4, atol=1e-5)
        assert scores[before.shape[1] :, step].isnan().all(), "no token gives to one before it"


def test_an_encoder_with_a_decoder(tokenizer: Any) -> None:
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 4, "decoder_start_token_id": 2}
    model = tiny_models.build("bart", head="ForConditionalGeneration", dtype=torch.float32, **special)
    wrapped = inseq.load_model(model, "ffattr", tokenizer=tokenizer)
    out = wrapped.attribute("the cat sat", "a dog ran", attribute_target=True, show_progress=False)
    (sequence,) = out.sequence_attributions
    source = torch.tensor([[token.id for token in sequence.source]])
    target = torch.tensor([[token.id for token in sequence.target]])
    assert sequence.source_attributions.shape[0] == source.shape[1]
    step = 1
    before = target[:, : sequence.attr_pos_start + step]
    given = {"input_ids": source, "decoder_input_ids": before}
    found = ffattr.contributions(model, given, target=int(target[0, before.shape[1]]))
    assert found.encoder is not None
    assert torch.allclose(sequence.source_attributions[:, step], found.encoder.scores[0, 0, 0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(
        sequence.target_attributions[: before.shape[1], step], found.scores[0, 0, 0], rtol=1e-4, atol=1e-5
    )
