"""`ffattr.contributions`: gradient times input of the frozen network, which adds up at every boundary."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from frozen_models import frozen
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = (
    ("bert", "ForMaskedLM"),
    ("bert", "ForSequenceClassification"),
    ("distilbert", "ForTokenClassification"),
    ("gpt2", "LMHeadModel"),
    ("opt", "ForCausalLM"),
    ("llama", "ForCausalLM"),
    ("glm4", "ForCausalLM"),
    ("olmo2", "ForCausalLM"),
    ("gpt-neox", "ForCausalLM"),
    ("cohere", "ForCausalLM"),
    ("mixtral", "ForCausalLM"),
    ("modernbert", "ForMaskedLM"),
    ("vit", "ForImageClassification"),
    ("bart", "ForConditionalGeneration"),
    ("t5-gated", "ForConditionalGeneration"),
)
"""One family of each kind of layer, each with a head."""


def gradients(model: nn.Module, given: dict[str, Any], read: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """The number that ``read`` takes from the output, and gradient times input ``[B, T]`` of every layer's input."""
    description = resolve(model)
    inputs: dict[int, Tensor] = {}
    handles = []
    for index, spec in enumerate(description.layers):

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> Any:
            hidden = (
                (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
                if index == 0
                else (args[0] if args else kwargs["hidden_states"])
            )
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            hidden.retain_grad()
            inputs[index] = hidden
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        handles.append(spec.module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with frozen(model):
            value = read(model(**given).logits)
            value.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return value.detach(), {i: (x.grad * x).sum(-1).detach() for i, x in inputs.items() if x.grad is not None}


@pytest.mark.parametrize(("name", "head"), KINDS)
def test_scores_are_gradient_times_input_of_the_frozen_network(name, head):
    padding = "right" if "right" in tiny_models.paddings(name) else None
    model, given = build(name, head=head), tiny_models.inputs(name, padding=padding)
    last = given.get("decoder_attention_mask", given.get("attention_mask"))
    places = None if last is None else [int(row.nonzero()[-1]) for row in last]

    def read(logits: Tensor) -> Tensor:
        if logits.dim() == 2:
            return logits[:, 1] - logits[:, 0]
        at = [logits.shape[1] - 1] * len(logits) if places is None else places
        return torch.stack([row[place, 1] - row[place, 0] for row, place in zip(logits, at, strict=True)])

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    value, expected = gradients(model, given, read)
    found = ffattr.contributions(model, given, target=(1, 0))
    assert torch.allclose(found.value[0], value, rtol=0, atol=1e-10)
    stacks = resolve(model).stacks
    first = stacks["decoder"].start if stacks else 0
    for layer in range(len(found.layers)):
        scores = expected[first + layer]
        scores = scores if found.mask is None else scores.masked_fill(~found.mask, 0)
        assert torch.allclose(found.scores[0, layer], scores, rtol=0, atol=1e-10), layer
    if found.encoder is not None:
        for layer in range(len(found.encoder.layers)):
            scores = expected[layer].masked_fill(~found.encoder.mask, 0)
            assert torch.allclose(found.encoder.scores[0, layer], scores, rtol=0, atol=1e-10), layer


def total(found: ffattr.Contributions) -> Tensor:
    across = 0 if found.cross_scores is None else found.cross_scores.sum(-1)
    return found.scores.sum(-1) + found.bias + across


@pytest.mark.parametrize("name", tiny_models.EVERY_FAMILY)
def test_everything_adds_up_in_every_family(name):
    """Directions that read the last hidden states of any model; of two positions, in a padded batch."""
    model, given = build(name), tiny_models.inputs(name, padding="right")
    if name == "deberta-v2-conv":
        with pytest.raises(ffattr.UnsupportedModel, match="between layers 0 and 1 of DebertaV2Model something else"):
            ffattr.contributions(model, given, target=torch.ones(40))
        return
    with torch.no_grad():
        width = read_hidden(model, given).shape[-1]
    directions = torch.randn(2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ffattr.contributions(model, given, target=directions, position=[-1, 0], flow=True)
    assert found.value.shape == (4, len(found.mask))
    size = found.value.abs().max()
    exact = 1e-6 if name == "gemma2" else 1e-10  # whose attention rounds to float32
    assert ((total(found) - found.value[:, None]).abs() / size).max() < exact
    assert found.error.max() < exact
    assert found.scores.abs().amax((0, 1))[~found.mask].sum() == 0
    # Into each query token: the flow, and what comes from none. With the residual it is what the token has to give.
    assert found.flow is not None
    assert found.flow.shape == (4, len(found.layers), *found.mask.shape, found.mask.shape[1])
    into = found.flow.sum(-1)
    if found.cross_flow is not None:
        into = into + found.cross_flow.sum(-1)
    assert into.abs().amax((0, 1))[~found.mask].sum() == 0
    if found.encoder is not None:
        assert ((total(found.encoder) - found.encoder.value[:, None]).abs() / size).max() < exact
        assert torch.allclose(found.encoder.value, found.cross_scores[:, 0].sum(-1), rtol=0, atol=1e-10)


def read_hidden(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    output = model(**given)
    return output if isinstance(output, Tensor) else output[0]


SAMPLES = (
    ("bert", "ForMaskedLM"),
    ("llama", "ForCausalLM"),
    ("mixtral", "ForCausalLM"),
    ("bart", "ForConditionalGeneration"),
)
SAMPLE = pytest.mark.parametrize(("name", "head"), SAMPLES)


@SAMPLE
def test_flow_out_of_a_token_is_its_score_where_values_biases_are_apart(name, head):
    model, given = build(name, head=head), tiny_models.inputs(name, padding="right")
    found = ffattr.contributions(model, given, target=[3, (4, 5)], flow=True, value_bias="separate")
    assert found.flow is not None
    assert torch.allclose(found.flow.sum(-2), found.scores[:, :-1], rtol=0, atol=1e-11)
    with_token = ffattr.contributions(model, given, target=[3, (4, 5)], flow=True)
    assert torch.allclose(with_token.scores, found.scores, rtol=0, atol=1e-12)
    has_biases = name in ("bert", "bart")
    assert torch.allclose(with_token.flow, found.flow, rtol=0, atol=1e-9) != has_biases
    # Into all tokens of a layer: what they give at the next boundary, but for what comes from none.
    into = found.flow.sum((-1, -2)) + (0 if found.cross_flow is None else found.cross_flow.sum((-1, -2)))
    from_none = found.bias[:, :-1] - found.bias[:, 1:]
    assert torch.allclose(into + from_none, found.scores[:, 1:].sum(-1), rtol=0, atol=1e-11)


@SAMPLE
def test_heads_and_residual_add_up_to_the_flow(name, head):
    model, given = build(name, head=head), tiny_models.inputs(name, padding="right")
    whole = ffattr.contributions(model, given, target=3, flow=True)
    by_head = ffattr.contributions(model, given, target=3, flow="heads")
    assert by_head.flow.dim() == 6
    added = by_head.flow.sum(3) + torch.diag_embed(by_head.residual)
    assert torch.allclose(added, whole.flow, rtol=0, atol=1e-12)
    assert torch.equal(by_head.scores, whole.scores)


@SAMPLE
def test_what_bypasses_the_block_and_what_goes_through_it_is_all(name, head):
    model, given = build(name, head=head), tiny_models.inputs(name)
    prefix = "decoder." if name == "bart" else ""
    scopes = {"llama": "atb_ln_ff", "mixtral": "atb_ln_ff"}
    both, before, through = (
        ffattr.contributions(model, given, target=3, flow=True, scope=prefix + scope).flow
        for scope in ("layer", "atb", scopes.get(name, "atb_ff"))
    )
    assert torch.allclose(before + through, both, rtol=0, atol=1e-12)


@SAMPLE
def test_recording_in_parts_and_few_numbers_at_once_change_nothing(name, head, monkeypatch):
    model, given = build(name, head=head), tiny_models.inputs(name, padding="right")
    asked = {"target": [1, (2, 3), "predicted"], "position": [-1, 0, 2], "flow": True}
    whole = ffattr.contributions(model, given, **asked)
    monkeypatch.setattr("ffattr.pipeline.toward.follow._AT_ONCE", 1)
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    parts = ffattr.contributions(model, given, **asked, memory_budget=1)
    handle.remove()
    assert len(runs) > len(whole.layers)
    for part in ("value", "scores", "bias", "flow", "cross_scores"):
        found, expected = getattr(parts, part), getattr(whole, part)
        assert found is None if expected is None else torch.allclose(found, expected, rtol=0, atol=1e-12), part


def test_only_the_boundaries_of_the_layers_asked_for_are_kept():
    model, given = build("llama", head="ForCausalLM", num_hidden_layers=4), tiny_models.inputs("llama")
    every = ffattr.contributions(model, given, target=3, flow=True)
    some = ffattr.contributions(model, given, target=3, layers=[3, 1], flow=True)
    assert some.layers == (1, 3)
    assert torch.equal(some.scores, every.scores[:, [1, 3, 4]])
    assert torch.equal(some.flow, every.flow[:, [1, 3]])


def test_the_state_at_a_token_is_read_for_the_next_one():
    """The first generated token is read at the prompt's last token; one number for each."""
    model = build("gpt2", head="LMHeadModel")
    ids = tiny_models.ids(2, 9)
    found = ffattr.contributions(model, ids, target="next", position="generated", prompt_length=4)
    with torch.no_grad():
        logits = model(ids).logits
    expected = torch.stack([logits[:, place].gather(1, ids[:, place + 1 : place + 2])[:, 0] for place in range(3, 8)])
    assert torch.allclose(found.value, expected, rtol=0, atol=1e-12)
    assert found.positions.tolist() == [[place] * 2 for place in range(3, 8)]
    assert found.targets == [[str(int(ids[row, place + 1])) for row in range(2)] for place in range(3, 8)]
    # A causal model: what is read at a token comes from no later one.
    for number, place in enumerate(range(3, 8)):
        assert not found.scores[number, :, :, place + 1 :].any()
        assert found.scores[number, :-1, :, : place + 1].abs().min() > 0
