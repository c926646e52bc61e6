"""The head is the one that gives the model's own numbers, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_models
import torch
from tiny_models import build

import ffattr
from ffattr.models.heads import HeadSpec, list_heads
from ffattr.pipeline.options import Options
from ffattr.pipeline.toward.question import Question
from ffattr.pipeline.toward.read_head import HeadReader, Row, read_row

pytestmark = pytest.mark.usefixtures("one_thread")


def make(target=3, position=-1) -> tuple[Question, Row, torch.Tensor]:
    model, inputs = build("llama", head="ForCausalLM"), tiny_models.inputs("llama")
    question = Question.from_arguments(model, inputs, None, Options(), target, position, None, False, "dense")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        before = []
        handle = model.model.norm.register_forward_pre_hook(lambda module, given: before.append(given[0]))
        model(**inputs)
        handle.remove()
    return question, read_row(question, output, 1, 1, None, before[0][1]), output.logits


def test_numbers_and_columns_are_those_of_the_position():
    question, row, logits = make([4, (5, 6), "predicted"], [-1, 2])
    reader = HeadReader(question, list_heads(question.head, question.request.description.base))
    answer = reader.read_numbers(row, slice(0, 6))
    best = [int(logits[1, place].argmax()) for place in (-1, 2)]
    assert answer.columns == [(4, None), (5, 6), (best[0], None), (4, None), (5, 6), (best[1], None)]
    pairs = zip([-1] * 3 + [2] * 3, answer.columns, strict=True)
    expected = [logits[1, at, plus] - (0 if minus is None else logits[1, at, minus]) for at, (plus, minus) in pairs]
    assert torch.allclose(answer.own, torch.stack(expected), rtol=0, atol=1e-12)
    assert torch.allclose(answer.out.value, answer.own, rtol=0, atol=1e-12)
    some = reader.read_numbers(row, slice(2, 4))
    assert torch.equal(some.out.directions, answer.out.directions[2:4])


def test_a_head_that_gives_other_numbers_is_not_taken():
    question, row, _ = make()
    every = list(list_heads(question.head, question.request.description.base))
    without_norm = [spec for spec in every if not spec.each]
    with pytest.raises(ffattr.UnsupportedModel, match="1 known heads were tried, the nearest is off by"):
        HeadReader(question, without_norm).read_numbers(row, slice(0, 1))
    scaled = [replace(spec, factor=1.01) for spec in every]
    with pytest.raises(ffattr.UnsupportedModel, match="does with the output of its last layer is not known"):
        HeadReader(question, scaled).read_numbers(row, slice(0, 1))
    with pytest.raises(ffattr.UnsupportedModel, match="no known head fits"):
        HeadReader(question, []).read_numbers(row, slice(0, 1))
    other_width = HeadSpec((), (), torch.nn.Linear(3, 61))
    assert HeadReader(question, [other_width, *every]).read_numbers(row, slice(0, 1)).columns == [(3, None)]


def test_numbers_that_are_none_are_an_error():
    question, row, logits = make()
    broken = logits.clone()
    broken[1] = float("nan")
    with pytest.raises(ffattr.NonFiniteError, match="output of sequence 1 is NaN"):
        read_row(question, broken, 1, 1, None, row.hidden)
