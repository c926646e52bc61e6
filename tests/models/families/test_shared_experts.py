"""Mixtures with a network beside the experts that all tokens go through."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from compare_results import assert_same, ways_of
from materialised import (
    attend,
    divide_by_rms,
    exact_softmax,
    run_model,
    share_out_experts,
    share_out_gated,
    share_out_shared,
)
from tiny_models import MORE_SHARED_EXPERTS, SHARED_EXPERTS, build, ids
from torch import Tensor, nn

import ffattr
from ffattr.models.registry import resolve
from ffattr.results.contents import SHARED

pytestmark = pytest.mark.usefixtures("one_thread")

SCOPE = "atb_ln_ff_experts"


def mixtures(model: nn.Module) -> list[int]:
    return [index for index, spec in enumerate(resolve(model).layers) if spec.experts is not None]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", SHARED_EXPERTS)
def test_layers_and_maps(name: str, padding: str | None) -> None:
    model, given = build(name), tiny_models.inputs(name, padding=padding)
    expected = ffattr.attribute(model, given, scopes=["all", SCOPE], backend="reference")
    assert expected.error.max() < 1e-10
    for backend, method in ways_of(name, padding, SHARED_EXPERTS):
        options = {"scopes": ["all", SCOPE], "backend": backend, "method": method}
        found = ffattr.attribute(model, given, dtype=torch.float64, **options)
        assert_same(found, expected)
        assert found.error.max() < 1e-10


@pytest.mark.parametrize("name", MORE_SHARED_EXPERTS)
def test_families_of_the_same_layers(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name, padding="right")
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    found = ffattr.attribute(model, given, scopes="all", backend="torch", dtype=torch.float64)
    assert_same(found, expected, 1e-11)
    assert expected.error.max() < 1e-10


@pytest.mark.parametrize("name", SHARED_EXPERTS)
def test_vectors_add_up_over_tokens_and_experts(name: str) -> None:
    model, given = build(name), tiny_models.inputs(name)
    layers = mixtures(model)
    whole = ffattr.vectors(model, given, scope="atb_ln_ff")
    torch.testing.assert_close(whole.values.sum(-2) + whole.bias, whole.total, rtol=0, atol=1e-10)
    apart = ffattr.vectors(model, given, scope=SCOPE)
    assert apart.values.shape[2] == 3
    torch.testing.assert_close(apart.values[layers].sum(2), whole.values[layers], rtol=0, atol=1e-10)


@exact_softmax()
def test_a_qwen2_moe_layer_written_out() -> None:
    """Maps of every expert, of the shared one and of the layer, by the definition from the model's own weights."""
    model = build("qwen2-moe", attn_implementation="eager")
    layer, tokens = model.layers[1], ids(1)
    states, attentions = run_model(model, tokens)
    x, alpha = states[1][0], attentions[1][0]
    read = divide_by_rms(x, x, layer.input_layernorm)
    values = (read @ layer.self_attn.v_proj.weight.T + layer.self_attn.v_proj.bias).unflatten(-1, (-1, 8))
    values = values.repeat_interleave(alpha.shape[0] // values.shape[1], 1)
    stream = attend(layer, x, alpha, values)
    # The value's bias belongs to its token; nothing else here has one, so that vectors are all of the stream.
    normed = divide_by_rms(stream, stream.sum(1, keepdim=True), layer.post_attention_layernorm)
    total = normed.sum(1)
    _, weight, index = layer.mlp.gate(total)
    parts: dict[int, Tensor] = {}
    added = share_out_experts(normed, layer.mlp.experts, index, weight, parts.__setitem__)
    shared = (
        share_out_shared(normed, layer.mlp.shared_expert) * layer.mlp.shared_expert_gate(total).sigmoid()[..., None]
    )
    found = ffattr.attribute(model, tokens, scopes=["all", SCOPE], layers=1)
    expected = {"atb": stream, "atb_ln": normed, "atb_ln_ff": added + shared, "atb_ln_ff_res": added + shared + stream}
    for scope, vectors in expected.items():
        torch.testing.assert_close(found[scope][0, 0], vectors.norm(dim=-1), rtol=0, atol=1e-9, msg=scope)
    torch.testing.assert_close(found.of_expert("shared")[0, 0], shared.norm(dim=-1), rtol=0, atol=1e-9)
    for number, part in parts.items():
        torch.testing.assert_close(found.of_expert(number)[0, 0], part.norm(dim=-1), rtol=0, atol=1e-9)
    with torch.no_grad():
        output = model(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.norm((added + shared + stream).sum(1)), output[-1][0], rtol=0, atol=1e-9)


def test_experts_of_llama4_read_what_the_router_weighed() -> None:
    model = build("llama4", attn_implementation="eager")
    layer, tokens = model.layers[1], ids(1)
    given = ffattr.vectors(model, tokens, scope=["atb_ln", SCOPE], layers=1)
    normed, apart = given["atb_ln"].values[0, 0], given[SCOPE].values[0, 0]
    scores, _ = layer.feed_forward.router(normed.sum(1))
    found = ffattr.attribute(model, tokens, scopes=SCOPE, layers=1)
    assert found.experts is not None
    for token, chosen in enumerate(found.experts[0, 0, :, :2].tolist()):
        assert sorted(chosen) == (scores[token] != 0).nonzero()[:, 0].tolist()
        for place, number in enumerate(chosen):
            gate, up = layer.feed_forward.experts.gate_up_proj[number].chunk(2, -1)
            down = layer.feed_forward.experts.down_proj[number]
            part = share_out_gated(scores[token, number] * normed[token : token + 1], gate, up, down)
            torch.testing.assert_close(apart[place, token], part[0], rtol=0, atol=1e-9)


def test_the_shared_expert_is_the_last_one_with_a_number_of_its_own() -> None:
    model, given = build("qwen2-moe"), tiny_models.inputs("qwen2-moe", padding="right")
    found = ffattr.attribute(model, given, scopes=["atb_ln_ff", SCOPE], queries=[6, 0, 4])
    assert found.experts is not None
    assert found.shares is not None
    real = found.mask[:, [6, 0, 4]]
    assert (found.experts[1, real][:, -1] == SHARED).all()
    assert (found.experts[:, ~real] == -1).all()
    assert (found.experts[0] == -1).all()
    assert ((found.shares[1, real] > 0) & (found.shares[1, real] < 1)).all()
    torch.testing.assert_close(found.of_expert("shared")[1], found[SCOPE][1, :, -1])
    frame = found.to_pandas(SCOPE)
    assert set(frame[frame["layer"] == 1]["expert"]) <= {SHARED, 0, 1, 2, 3, 4}
    for wrong, kind in (("routed", TypeError), (-2, ValueError), (True, TypeError)):
        with pytest.raises(kind, match=f"expert is {wrong!r}, expected"):
            found.of_expert(wrong)


def test_a_shared_expert_that_nothing_weighs_has_a_share_of_one() -> None:
    found = ffattr.attribute(build("granitemoe-shared"), tiny_models.inputs("granitemoe-shared"), scopes=SCOPE)
    assert found.shares is not None
    assert (found.shares[..., -1] == 1).all()


def test_a_mixture_may_have_no_shared_expert() -> None:
    assert all(spec.shared is None for spec in resolve(build("granitemoe")).layers)
    assert all(spec.shared is not None for spec in resolve(build("granitemoe-shared")).layers)


def test_a_baseline_of_one_width_does_not_fit_two() -> None:
    model, given = build("granitemoe-shared"), tiny_models.inputs("granitemoe-shared")
    with pytest.raises(ValueError, match="layer 0 has experts of 76 neurons and a shared one of 28"):
        ffattr.attribute(model, given, baseline=torch.zeros(76, dtype=torch.float64))
