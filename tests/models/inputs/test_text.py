"""Tokens of text: how many there may be, which are valid, and what they are called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build, ids
from torch import nn

import ffattr
from ffattr.models.capture.recorder import record_layers
from ffattr.models.inputs.prepare import Inputs, prepare_inputs
from ffattr.models.inputs.text import check_rows, find_text_tokens, name_ids
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def ready(model: nn.Module, inputs: Any, tokenizer: Any = None) -> Inputs:
    return prepare_inputs(resolve(model), model, inputs, tokenizer)


@pytest.mark.parametrize("name", ["roberta", "opt", "gpt2", "distilbert"])
def test_as_long_as_the_positions_allow(name: str) -> None:
    model = build(name)
    prepared = ready(model, ids(1, 32))
    record_layers(resolve(model), prepared.kwargs, lambda recorded: None)
    with pytest.raises(ValueError, match="33 tokens"):
        ready(model, ids(1, 33))


def test_rotary_positions_are_not_bounded() -> None:
    model = build("llama")
    record_layers(resolve(model), ready(model, ids(1, 40)).kwargs, lambda recorded: None)


def test_a_ready_made_mask_leaves_out_what_attends_to_nothing() -> None:
    description, given = resolve(build("bert")), {"input_ids": ids(2, 4)}
    allowed = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    allowed[1, :, 2:] = allowed[1, :, :, 2:] = False
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        found = find_text_tokens(description, {**given, "attention_mask": mask}, "input_ids", None)
        assert found.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert found.tokens == [[str(number) for number in row] for row in given["input_ids"].tolist()]


def test_a_row_of_padding() -> None:
    check_rows(torch.tensor([[0, 1], [1, 1]]))
    check_rows(None)
    with pytest.raises(ValueError, match="batch row 1 is all padding"):
        check_rows(torch.tensor([[0, 1], [0, 0]]))


def test_names_of_ids() -> None:
    assert name_ids([3, 5], None) == ["3", "5"]
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda numbers: [f"<{number}>" for number in numbers])
    assert name_ids([3, 5], tokenizer) == ["<3>", "<5>"]
    broken = SimpleNamespace(convert_ids_to_tokens=lambda numbers: ["a\ud800b" for _ in numbers])
    assert name_ids([3], broken) == ["a?b"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("forbidden", [False, -torch.inf, torch.finfo(torch.float64).min])
def test_a_query_that_attends_to_nothing_is_no_padding_where_others_attend_to_it(name: str, forbidden: Any) -> None:
    model, given = build(name), ids(1, 6)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed[2] = False
    mask = allowed if forbidden is False else torch.zeros(6, 6, dtype=torch.float64).masked_fill(~allowed, forbidden)
    inputs = {"input_ids": given, "attention_mask": mask[None, None]}
    found = ffattr.attribute(model, inputs, scopes=["attn", "layer"])
    assert bool(found.mask.all())
    assert float(found.error.max()) < 1e-12
    exact = ffattr.attribute(model, inputs, scopes=["attn", "layer"], backend="reference")
    for scope in found.scopes:
        torch.testing.assert_close(found[scope], exact[scope], rtol=1e-10, atol=1e-10)
    assert bool((found["attn"][:, 0, 2] == 0).all()) == (forbidden != torch.finfo(torch.float64).min)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_ids_are_of_a_dtype_that_models_look_up(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"input_ids has dtype {dtype}, expected token ids .* Use \.long\(\)"):
        ready(build("bert"), ids(1, 4).to(dtype))


@pytest.mark.parametrize("names", [["a"], ["a"] * 5, "abcd", None])
def test_a_tokenizer_names_every_id(names: Any) -> None:
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: names)
    with pytest.raises(ValueError, match=r"convert_ids_to_tokens gave .* for 4 token ids, expected a list"):
        name_ids([1, 2, 3, 4], tokenizer)
