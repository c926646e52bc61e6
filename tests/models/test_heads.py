"""Heads of loaded models: every one of the classes below is read by exactly the model's own numbers."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import nn

import ffattr
from ffattr.models.heads import list_final_norms, list_heads

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = (
    ("bert", "ForTokenClassification"),
    ("bert", "LMHeadModel"),
    ("roberta", "ForMaskedLM"),
    ("roberta", "ForSequenceClassification"),
    ("distilbert", "ForMaskedLM"),
    ("distilbert", "ForSequenceClassification"),
    ("electra", "ForMaskedLM"),
    ("electra", "ForSequenceClassification"),
    ("albert", "ForMaskedLM"),
    ("albert", "ForSequenceClassification"),
    ("deberta", "ForMaskedLM"),
    ("deberta-v2", "ForSequenceClassification"),
    ("mpnet", "ForMaskedLM"),
    ("rembert", "ForMaskedLM"),
    ("megatron-bert", "ForCausalLM"),
    ("modernbert", "ForSequenceClassification"),
    ("modernbert", "ForTokenClassification"),
    ("gpt2", "ForSequenceClassification"),
    ("opt-350m", "ForCausalLM"),
    ("gptj", "ForCausalLM"),
    ("granite", "ForCausalLM"),
    ("cohere2", "ForCausalLM"),
    ("falcon-40b", "ForCausalLM"),
    ("gemma2", "ForTokenClassification"),
    ("llama", "ForSequenceClassification"),
    ("gpt-oss", "ForCausalLM"),
    ("deit", "ForImageClassification"),
    ("dinov2", "ForImageClassification"),
    ("dinov2-registers", "ForImageClassification"),
    ("beit", "ForImageClassification"),
    ("wav2vec2", "ForCTC"),
    ("wav2vec2-stable", "ForSequenceClassification"),
    ("mbart", "ForConditionalGeneration"),
    ("umt5", "ForConditionalGeneration"),
    ("whisper", "ForConditionalGeneration"),
    ("marian", "MTModel"),
)


@pytest.mark.parametrize(("name", "head"), CLASSES)
def test_numbers_are_the_models_own_and_add_up(name, head):
    options = {"pad_token_id": 0} if head == "ForSequenceClassification" else {}
    model, given = build(name, head=head, **options), tiny_models.inputs(name)
    if "input_ids" in given:
        given["input_ids"] = given["input_ids"].clamp_min(1)
    found = ffattr.contributions(model, given, target=[1, (1, 0), "predicted"])
    with torch.no_grad():
        logits = model(**given).logits
    logits = logits if logits.dim() == 2 else logits[:, -1]
    expected = torch.stack([logits[:, 1], logits[:, 1] - logits[:, 0], logits.amax(-1)])
    assert torch.allclose(found.value, expected, rtol=0, atol=1e-10)
    assert found.error.max() < (1e-6 if name == "gemma2" else 1e-10)


def test_what_follows_the_last_layer_is_found_in_order():
    assert list(list_final_norms(build("bert"))) == [()]
    llama = build("llama")
    assert list(list_final_norms(llama)) == [(), (llama.norm,)]


def test_heads_are_those_whose_parts_are_all_there():
    model = build("bert", head="ForSequenceClassification")
    found = list(list_heads(model, model.bert))
    pooled = [spec for spec in found if spec.then]
    assert [spec.then for spec in pooled] == [(model.bert.pooler.dense, model.bert.pooler.activation)]
    assert {spec.reads for spec in found if not spec.then} == {
        ("position",),
        ("first",),
        ("rest",),
        ("mean",),
        ("first", "rest"),
    }
    assert all(spec.last is model.classifier for spec in found)
    assert list(list_heads(nn.Linear(3, 3), model.bert)) == []


def test_parameters_are_read_in_the_dtype_asked_for_but_for_the_last_projection():
    model = build("bert", head="ForMaskedLM").float()
    spec = next(iter(list_heads(model, model.bert)))
    head = spec.weights(torch.float64)
    assert [type(piece).__name__ for piece in head.then] == ["Linear", "Activation", "Norm"]
    assert head.then[0].weight.dtype == torch.float64
    assert head.last.weight.data_ptr() == model.cls.predictions.decoder.weight.data_ptr()
