"""Texts in every container, lists of ids and conversations: the same maps as of the tensors they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from made_tokenizers import make_tokenizer
from tiny_models import build
from torch import Tensor

import ffattr
from ffattr.models.inputs.prepare import Inputs, prepare_inputs
from ffattr.models.inputs.sequences import as_texts, unify_inputs
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["the cat sat on a mat", "a dog"]
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


def ready(inputs: Any, tokenizer: Any = None) -> Inputs:
    model = build("bert")
    return prepare_inputs(resolve(model), model, inputs, tokenizer)


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer(pad_token="[PAD]")


@pytest.mark.parametrize("container", [tuple, np.array, pd.Series, lambda texts: np.array(texts, dtype=object)])
def test_texts_in_any_container(container: Any, tokenizer: Any) -> None:
    given, expected = ready(container(TEXTS), tokenizer), ready(TEXTS, tokenizer)
    assert as_texts(container(TEXTS)) == TEXTS
    assert torch.equal(given.kwargs["input_ids"], expected.kwargs["input_ids"])
    assert given.lengths == expected.lengths == (6, 2)


@pytest.mark.parametrize("inner", [list, tuple, np.array, torch.tensor])
def test_lists_of_ids(inner: Any, tokenizer: Any) -> None:
    """The maps are those of each list on its own, and it takes no tokenizer."""
    model, lists = build("bert"), [[5, 6, 7, 8], [9, 10]]
    found = ffattr.attribute(model, [inner(one) for one in lists])
    for row, one in enumerate(lists):
        alone = ffattr.attribute(model, torch.tensor([one]))["layer"][:, 0]
        assert torch.allclose(found["layer"][:, row, : len(one), : len(one)], alone, atol=1e-12)
    assert found.mask.tolist() == [[True] * 4, [True, True, False, False]]
    padded = ready(lists, tokenizer).kwargs["input_ids"]
    assert padded[1].tolist() == [9, 10, tokenizer.pad_token_id, tokenizer.pad_token_id]


def test_one_list_of_ids_is_one_sequence() -> None:
    assert ready([5, 6, 7]).kwargs["input_ids"].tolist() == [[5, 6, 7]]


def test_arrays_of_numbers_are_tensors() -> None:
    assert torch.equal(ready(np.array([[5, 6], [7, 8]])).kwargs["input_ids"], torch.tensor([[5, 6], [7, 8]]))
    features = np.ones((2, 3, 4), dtype=np.float32)
    assert isinstance(unify_inputs(features), Tensor)
    assert unify_inputs(features).shape == (2, 3, 4)


def test_conversations_go_through_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    expected = tokenizer("user the cat </s> assistant sat </s>")["input_ids"]
    assert ready(CHAT, tokenizer).kwargs["input_ids"].tolist() == [expected]
    several = ready([CHAT, CHAT[:1]], tokenizer)
    short = len(tokenizer("user the cat </s>")["input_ids"])
    assert several.lengths == (len(expected), short)
    assert several.kwargs["attention_mask"].sum().item() == len(expected) + short


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([[5, 6], "the cat"], TypeError, "inputs is a list with 'the cat' at 1, expected all of it"),
        ([[5, 6.5]], TypeError, r"inputs\[0\] has 6.5 among its token ids"),
        ([[True, False]], TypeError, r"inputs\[0\] has True"),
        ([[5], []], ValueError, r"inputs\[1\] has no tokens"),
        (pd.Series(["the cat", None]), TypeError, "inputs is a list with"),
        (pd.Series(["the cat", ""]), ValueError, r"text 1 \(''\) has no tokens"),
        ([{"role": "user"}], TypeError, "conversation 0 has {'role': 'user'}, expected messages"),
        (CHAT, ValueError, "has no chat_template"),
    ],
)
def test_errors(inputs: Any, error: type[Exception], message: str, tokenizer: Any) -> None:
    with pytest.raises(error, match=message):
        ready(inputs, tokenizer)


def test_a_conversation_needs_the_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"inputs is a conversation .* pass the model's tokenizer"):
        ready(CHAT)


@pytest.mark.parametrize(
    "returned",
    ["x", {"ids": [1]}, {"input_ids": 5}, {"input_ids": ["a"]}, {"input_ids": [[1, 2]]}, {"input_ids": "ab"}, None],
    ids=str,
)
def test_what_a_tokenizer_returns_has_ids(returned: Any) -> None:
    with pytest.raises(TypeError, match=r"returned .*, expected a mapping whose 'input_ids' are a list of integers"):
        ready("the cat", lambda text: returned)


def test_a_tokenizer_says_as_much_of_every_token() -> None:
    with pytest.raises(TypeError, match="returned 1 attention_mask for 2 input_ids of sequence 0, expected as many"):
        ready("the cat", lambda text: {"input_ids": [5, 6], "attention_mask": [1]})
