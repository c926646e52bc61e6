"""What people hold a model in is opened, and what must not be is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from made_tokenizers import make_tokenizer
from tiny_models import build
from torch import nn

from ffattr.errors import UnsupportedModel
from ffattr.models.containers import open_container


def named(module: str, name: str, base: type = object) -> type:
    """Returns a class as another package, which is not installed here, would have it."""
    return type(name, (base,), {"__module__": f"{module}.somewhere"})


def test_models_and_anything_else_stay_what_they_are() -> None:
    model, tokenizer = build("bert"), object()
    for held in (model, nn.Linear(2, 2), "a name", None):
        assert open_container(held, tokenizer) == (held, tokenizer)


def test_a_pipeline_of_transformers() -> None:
    model, tokenizer = build("bert"), make_tokenizer()
    pipe = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    assert open_container(pipe) == (pipe.model, pipe.tokenizer)
    other = object()
    assert open_container(pipe, other) == (pipe.model, other)


def sentence_transformer(*modules: nn.Module) -> Any:
    held = named("sentence_transformers", "SentenceTransformer", nn.Sequential)(*modules)
    held.tokenizer = "its tokenizer"
    return held


def test_a_sentence_transformer() -> None:
    inner = nn.Module()
    inner.auto_model = build("bert")
    assert open_container(sentence_transformer(inner, nn.Identity())) == (inner.auto_model, "its tokenizer")
    with pytest.raises(UnsupportedModel, match="no Transformer of transformers in this SentenceTransformer"):
        open_container(sentence_transformer(nn.Identity()))


def test_weights_that_were_rewritten_are_refused() -> None:
    held = named("transformer_lens", "HookedTransformer", nn.Module)()
    with pytest.raises(
        UnsupportedModel, match="a HookedTransformer of TransformerLens has weights that were rewritten"
    ):
        open_container(held)
