"""Contributions on trained models: in float32 they add up to the model's own number at every layer boundary."""

from __future__ import annotations

import models
import pytest
import torch
from samples import inputs

import ffattr


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_logits_of_language_models_add_up(name: str) -> None:
    model = getattr(models, name)(head=True).model
    ids = inputs(name)["input_ids"]
    found = ffattr.contributions(model, ids, target=["predicted", "next"], position=[-2, -9])
    with torch.no_grad():
        logits = model(ids).logits[0, [-2, -2, -9, -9]]
    columns = torch.stack([logits[0].argmax(), ids[0, -1], logits[2].argmax(), ids[0, -8]])
    assert torch.allclose(found.value[:, 0], logits.gather(1, columns[:, None])[:, 0], rtol=0, atol=1e-3)
    assert found.error.max() < 1e-5
    assert torch.allclose(found.scores.sum(-1) + found.bias, found.value[:, None].expand_as(found.bias), atol=1e-2)


def test_directions_of_sentence_embeddings_add_up() -> None:
    loaded = models.minilm()
    given = loaded.tokenizer(["The cat sat on the mat.", "Dogs bark."], padding=True, return_tensors="pt")
    directions = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    found = ffattr.contributions(loaded.model, given, target=directions, position="mean", flow=True)
    assert found.error.max() < 1e-5
    with torch.no_grad():
        hidden, mask = loaded.model(**given)[0], given["attention_mask"][..., None]
    embedded = (hidden * mask).sum(1) / mask.sum(1)
    assert torch.allclose(found.value, directions @ embedded.T, rtol=0, atol=1e-4)
