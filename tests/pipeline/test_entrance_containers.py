"""Every function that takes a model takes a pipeline of transformers, too, with its tokenizer."""

from __future__ import annotations

import pytest
import torch
import transformers
from made_tokenizers import make_tokenizer
from tiny_models import build

import ffattr

TEXT = "the cat sat"


@pytest.fixture(scope="module")
def pipe() -> transformers.Pipeline:
    return transformers.pipeline("feature-extraction", model=build("bert"), tokenizer=make_tokenizer())


def test_the_same_as_of_the_model(pipe: transformers.Pipeline) -> None:
    given = {"tokenizer": pipe.tokenizer}
    attr = ffattr.attribute(pipe, TEXT)
    assert torch.equal(attr["layer"], ffattr.attribute(pipe.model, TEXT, **given)["layer"])
    assert attr.tokens == ffattr.attribute(pipe.model, TEXT, **given).tokens
    assert torch.equal(ffattr.vectors(pipe, TEXT).values, ffattr.vectors(pipe.model, TEXT, **given).values)
    assert str(ffattr.plan(pipe, TEXT)) == str(ffattr.plan(pipe.model, TEXT, **given))
    target = torch.ones(pipe.model.config.hidden_size, dtype=pipe.model.dtype)
    options = {"target": target, "position": "mean"}
    found = ffattr.contributions(pipe, TEXT, **options).scores
    assert torch.equal(found, ffattr.contributions(pipe.model, TEXT, **options, **given).scores)
