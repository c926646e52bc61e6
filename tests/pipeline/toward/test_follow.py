"""One batch followed back: steps are counted, and sequences do not meet."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import build

import ffattr
from ffattr.pipeline.options import Options
from ffattr.pipeline.toward.follow import Follower
from ffattr.pipeline.toward.gather import Gathered
from ffattr.pipeline.toward.question import Question

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_layer_of_every_part_is_a_step(monkeypatch):
    model, inputs = build("bart", head="ForConditionalGeneration"), tiny_models.inputs("bart")
    question = Question.from_arguments(model, inputs, None, Options(), [1, 2, 3], -1, None, False, "dense")
    for at_once, parts in ((1 << 25, 1), (1, 3)):
        monkeypatch.setattr("ffattr.pipeline.toward.follow._AT_ONCE", at_once)
        gathered = {
            stack.name: Gathered(stack, question.layers[stack.name], 3, torch.float64, None, False)
            for stack in question.request.stacks
        }
        follower = Follower(question, gathered, True)
        with torch.no_grad():
            steps = len(list(follower.follow([0, 1], question.request.inputs)))
        assert steps == follower.layers == parts * len(question.request.description.layers)
        assert not follower.reads_whole
        assert follower.columns == {row: [(1, None), (2, None), (3, None)] for row in (0, 1)}


def test_an_encoder_whose_states_are_changed_on_the_way_is_refused():
    model, inputs = build("bart", head="ForConditionalGeneration"), tiny_models.inputs("bart")

    def change(module, given, output):
        output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    model.model.encoder.register_forward_hook(change)
    with pytest.raises(ffattr.UnsupportedModel, match="output of its encoder's last layer is not known"):
        ffattr.contributions(model, inputs, target=1)
    alone = ffattr.contributions(model, inputs, target=1, scope="decoder.layer")
    assert alone.encoder is None
    assert alone.error.max() < 1e-12


def test_sequences_of_a_batch_do_not_meet():
    model, ids = build("gpt2", head="LMHeadModel"), tiny_models.ids(3, 6)
    together = ffattr.contributions(model, ids, target=[1, "predicted"])
    for row in range(3):
        alone = ffattr.contributions(model, ids[row : row + 1], target=[1, "predicted"])
        assert torch.allclose(together.scores[:, :, row], alone.scores[:, :, 0], rtol=0, atol=1e-12)
        assert [names[row] for names in together.targets] == [names[0] for names in alone.targets]
