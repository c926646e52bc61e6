"""How `ffattr.contributions` runs: padding, precision, progress and memory, what it hands on, and its errors."""

from __future__ import annotations

import pytest
import recording
import tiny_models
import torch
from tiny_models import build
from torch import nn

import ffattr
from ffattr.models.registry import resolve
from ffattr.pipeline.request import Request

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(padding):
    model = build("llama", head="ForCausalLM")
    given = tiny_models.inputs("llama", padding=padding)
    found = ffattr.contributions(model, given, target=[3, "predicted"])
    alone = given["input_ids"][-1:, given["attention_mask"][-1].bool()]
    expected = ffattr.contributions(model, alone, target=[3, "predicted"])
    exact = 1e-12 if padding == "right" else 1e-6  # positions are rotated in float32
    assert torch.allclose(found.value[:, -1], expected.value[:, 0], rtol=0, atol=exact)
    real = found.mask[-1]
    assert torch.allclose(found.scores[:, :, -1, real], expected.scores[:, :, 0], rtol=0, atol=exact)
    assert found.targets[1][-1] == expected.targets[1][0]


def test_the_baseline_of_biases_and_rules_of_quadrature_add_up_as_well():
    model, given = build("bert", head="ForSequenceClassification"), tiny_models.inputs("bert")
    exact = ffattr.contributions(model, given, target=1)
    for value_bias in ("token", "separate"):
        found = ffattr.contributions(model, given, target=1, baseline="bias", value_bias=value_bias)
        assert found.error.max() < 1e-12
        assert not torch.allclose(found.scores, exact.scores, rtol=0, atol=1e-6)
    close = ffattr.contributions(model, given, target=1, ig=ffattr.GaussLegendre(40))
    assert torch.allclose(close.scores, exact.scores, rtol=0, atol=1e-9)
    # A quadrature of few nodes does not add up, by as much as it is off.
    coarse = ffattr.contributions(model, given, target=1, ig=ffattr.Riemann(3))
    assert 1e-3 < coarse.error.max() < 2


@pytest.mark.parametrize(("target", "position"), [(3, -1), (torch.ones(40), "cls"), (torch.ones(40), "mean")])
def test_float32_is_close_and_complete(target, position):
    exact = build("bert", head="ForMaskedLM")
    given = tiny_models.inputs("bert", padding="right")
    expected = ffattr.contributions(exact, given, target=target, position=position)
    found = ffattr.contributions(exact.float(), given, target=target, position=position)
    assert found.scores.dtype == torch.float32
    assert found.error.max() < 1e-5
    assert torch.allclose(found.scores.double(), expected.scores, rtol=0, atol=1e-4)


def test_under_autocast_numbers_are_those_of_the_model_and_add_up_within_its_rounding():
    model, given = build("llama", head="ForCausalLM").float(), tiny_models.inputs("llama")
    exact = ffattr.contributions(model, given, target=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = ffattr.contributions(model, given, target=3)
        with torch.no_grad():
            own = model(**given).logits[:, -1, 3].float()
    assert torch.equal(found.value[0], own)
    assert found.scores.dtype == torch.float32
    assert found.error.max() < 2e-2
    assert torch.allclose(found.scores, exact.scores, rtol=0, atol=5e-2 * float(exact.scores.abs().max()))


def test_the_model_stays_as_it_was_also_when_it_fails():
    model, given = build("llama", head="ForCausalLM"), tiny_models.inputs("llama")
    before = recording.state(model)
    ffattr.contributions(model, given, target=3, flow=True)
    assert recording.state(model) == before

    def fail(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ffattr.contributions(model, given, target=3, progress=fail)
    assert recording.state(model) == before


def test_progress_comes_to_its_end():
    seen: list[tuple[int, int]] = []
    model = build("bart", head="ForConditionalGeneration")
    ffattr.contributions(model, tiny_models.inputs("bart"), target=3, progress=lambda *now: seen.append(now))
    assert seen == [(step, len(seen)) for step in range(1, len(seen) + 1)]
    assert len(seen) == len(resolve(model).layers)


def test_a_layers_weights_are_read_once_for_all_sequences_and_its_step_is_its_own(monkeypatch):
    """Reading them copies those of a half model."""
    read: list[int] = []
    weights_of_layer = Request.weights_of_layer

    def count(self, stack, layer):
        read.append(layer)
        return weights_of_layer(self, stack, layer)

    monkeypatch.setattr(Request, "weights_of_layer", count)
    model, ids = build("llama", head="ForCausalLM", num_hidden_layers=3), tiny_models.ids(3, 5)
    at_step: list[list[int]] = []
    ffattr.contributions(model, ids, target=3, progress=lambda *_: at_step.append(list(read)))
    first = at_step[0].index(2)
    assert [step[first:] for step in at_step] == [[2], [2, 1], [2, 1, 0]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 10**6}, ValueError, "target is 1000000, but the model has 61 logits"),
        ({"target": "Paris"}, ValueError, "pass the model's tokenizer"),
        ({"target": []}, ValueError, "empty list"),
        ({"target": 3, "position": 99}, IndexError, "position 99 does not exist in sequence 0, which has 7 tokens"),
        ({"target": 3, "position": "middle"}, ValueError, "unknown position 'middle'"),
        ({"target": 3, "position": "mean"}, ValueError, "position='mean' is for directions"),
        ({"target": "next"}, ValueError, "which none follows"),
        ({"target": "next", "position": "generated"}, TypeError, "needs prompt_length="),
        ({"target": torch.ones(3)}, ValueError, "direction has 3 entries, but the last hidden states have 48"),
        ({"target": [3, torch.ones(40)]}, ValueError, "mixes directions and logits"),
        ({"target": 3, "dtype": torch.bfloat16}, ValueError, "expected torch.float32 or float64"),
        ({"target": 3, "flow": "all"}, ValueError, "flow is 'all'"),
        ({"target": 3, "scope": "attn_heads"}, ValueError, "not by head or expert"),
        ({"target": 3, "scope": ["atb", "layer"]}, ValueError, "expected one"),
    ],
)
def test_what_cannot_be_asked_is_an_error_of_its_own(arguments, error, message):
    model, given = build("llama", head="ForCausalLM"), tiny_models.inputs("llama")
    with pytest.raises(error, match=message):
        ffattr.contributions(model, given, **arguments)


def test_models_whose_head_is_not_known_are_refused_by_name():
    with pytest.raises(ffattr.UnsupportedModel, match="LlamaModel has no head"):
        ffattr.contributions(build("llama"), tiny_models.inputs("llama"), target=3)
    capped = build("gemma2", head="ForCausalLM")
    with pytest.raises(ffattr.UnsupportedModel, match="caps its logits"):
        ffattr.contributions(capped, tiny_models.inputs("gemma2"), target=3)
    other = build("llama", head="ForCausalLM")
    other.lm_head = nn.Sequential(other.lm_head, nn.Tanh()).eval()
    with pytest.raises(ffattr.UnsupportedModel, match="what LlamaForCausalLM does with the output of its last layer"):
        ffattr.contributions(other, tiny_models.inputs("llama"), target=3)
    changed = build("llama", head="ForCausalLM")
    changed.lm_head.register_forward_hook(lambda module, given, output: output * 1.001)
    with pytest.raises(ffattr.UnsupportedModel, match="the nearest is off by"):
        ffattr.contributions(changed, tiny_models.inputs("llama"), target=3)
    classifier = build("bert", head="ForSequenceClassification")
    with pytest.raises(ValueError, match="reads its whole input, no position"):
        ffattr.contributions(classifier, tiny_models.inputs("bert"), target=0, position=1)
    with pytest.raises(ValueError, match="target is class 7, but the model has 0: 'LABEL_0', 1: 'LABEL_1'"):
        ffattr.contributions(classifier, tiny_models.inputs("bert"), target=7)
    with pytest.raises(ValueError, match="none of the model's classes"):
        ffattr.contributions(classifier, tiny_models.inputs("bert"), target="good")


def test_a_layer_that_is_not_what_its_description_says_is_an_error():
    model, given = build("llama", head="ForCausalLM"), tiny_models.inputs("llama")
    projection = model.model.layers[1].mlp.down_proj
    hook = projection.register_forward_hook(lambda module, given, output: output.abs())
    with pytest.raises(ffattr.UnsupportedModel, match=r"what 'mlp.down_proj' \(Linear\) returns is changed by a hook"):
        ffattr.contributions(model, given, target=3)
    hook.remove()
    forward = projection.forward
    projection.forward = lambda hidden: forward(hidden) * 1.01
    with pytest.raises(ffattr.ArchitectureMismatch, match="layer 1, batch row 0: the recomputed output differs"):
        ffattr.contributions(model, given, target=3)
    found = ffattr.contributions(model, given, target=3, check=False)
    assert found.error.max() > 1e-6


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_function_can_tell_whose_flow_it_is_handed(name):
    """Encoder's, decoder's, and what comes to the decoder from the encoder."""
    model, given = build(name, head="ForConditionalGeneration"), tiny_models.inputs(name)
    whole = ffattr.contributions(model, given, target=[3, 4], flow=True)
    sums: dict[tuple[str, int, int], torch.Tensor] = {}

    def add_up(rows: ffattr.Rows) -> None:
        ((scope, tile),) = rows.maps.items()
        key = (scope, rows.layer, rows.place)
        sums[key] = sums.get(key, torch.zeros(())) + tile.sum()

    found = ffattr.contributions(model, given, target=[3, 4], flow=True, keep=ffattr.Reduce(add_up))
    assert torch.equal(found.scores, whole.scores)
    assert whole.encoder is not None
    first = len(whole.encoder.layers)  # the decoder's layers are numbered on from there
    for part, offset, scope in (
        (whole.encoder.flow, 0, "flow"),
        (whole.flow, first, "flow"),
        (whole.cross_flow, first, "cross.flow"),
    ):
        assert part is not None
        for target in range(2):
            for layer in range(part.shape[1]):
                place = target * part.shape[1] + layer
                torch.testing.assert_close(sums.pop((scope, offset + layer, place)), part[target, layer].sum())
    assert not sums
