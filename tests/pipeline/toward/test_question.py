"""A question is checked before the model runs, and knows which tokens it reads."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build

import ffattr
from ffattr.pipeline.options import Options
from ffattr.pipeline.toward.question import Question

pytestmark = pytest.mark.usefixtures("one_thread")


def asked(name: str = "gpt2", head: str = "LMHeadModel", **given: Any) -> Question:
    options = Options("layer", given.pop("layers", None), dtype=given.pop("dtype", None))
    target, position = given.pop("target", 3), given.pop("position", -1)
    inputs = tiny_models.inputs(name, padding=given.pop("padding", None))
    model = build(name, head=head)
    return Question.from_arguments(model, inputs, None, options, target, position, None, False, "dense")


def test_the_users_model_runs_for_logits_and_its_base_for_directions():
    question = asked()
    assert question.model is question.head
    assert not question.directed
    directed = asked(target=torch.ones(2, 48), position=[0, 1, 2])
    assert directed.model is directed.request.description.base
    assert directed.count == 6


def test_places_are_those_of_the_padded_input():
    question = asked(padding="left", position=[0, -1])
    mask = question.request.stacks[0].mask
    assert question.locate(0) == [0, 6]
    assert question.locate(1) == [int(mask[1].int().argmax()), 6]
    ids = question.request.inputs.kwargs["input_ids"]
    assert question.find_following(1) == [int(ids[1, question.locate(1)[0] + 1]), -1]


def test_no_more_logits_are_computed_than_are_read():
    question = asked(padding="right", position=[0, -1])
    given, kept = question.prepare_inputs(question.request.inputs, [0, 1])
    places = sorted({*question.locate(0), *question.locate(1)})
    assert given.kwargs["logits_to_keep"].tolist() == places
    assert kept == {place: number for number, place in enumerate(places)}
    whole = asked("bert", "ForMaskedLM")
    assert whole.prepare_inputs(whole.request.inputs, [0, 1])[1] is None


def test_layers_are_sorted_and_counted_once():
    assert asked(layers=[-1, 0, 1]).layers == {"": (0, 1)}
    with pytest.raises(IndexError):
        asked(layers=[9])


def test_a_model_without_a_head_has_no_logits():
    with pytest.raises(ffattr.UnsupportedModel, match="GPT2Model has no head"):
        asked(head="Model")
    with pytest.raises(ValueError, match=r"dtype is torch.float16, expected torch.float32 or float64"):
        asked(dtype=torch.float16)
