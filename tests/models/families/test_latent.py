"""Multi-head latent attention: values that are made of a narrow vector, behind a norm."""

from __future__ import annotations

import pytest
import torch
from materialised import attend, divide_by_rms, exact_softmax, run_model, share_out_experts, share_out_shared
from tiny_models import build, ids
from versions import PINNED, needs

import ffattr
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "glm4-moe-lite", "minicpm3", "youtu"])
def test_description(name: str) -> None:
    for spec in resolve(build(name)).layers:
        weights = spec.weights(torch.float64)
        assert weights.latent is not None
        assert weights.latent.down.weight.shape == (48, 10)
        assert weights.latent.norm.kind == "rms"
        assert weights.value.weight.shape == (10, 6 * 8)
        assert (weights.heads, weights.kv_heads, weights.head_dim) == (6, 6, 8)


@exact_softmax()
def test_a_deepseek_layer_written_out() -> None:
    """Maps by the definition from the model's own weights: latent attention, experts and the shared one."""
    needs(str(PINNED), "whose router returns its logits as well, of those that are tested")
    model = build("deepseek-v3", attn_implementation="eager")
    layer, tokens = model.layers[1], ids(1)
    states, attentions = run_model(model, tokens)
    x, alpha, attention = states[1][0], attentions[1][0], layer.self_attn
    read = divide_by_rms(x, x, layer.input_layernorm)
    latent = (read @ attention.kv_a_proj_with_mqa.weight.T)[:, :10]
    latent = divide_by_rms(latent, latent, attention.kv_a_layernorm)
    values = (latent @ attention.kv_b_proj.weight.T).view(len(x), 6, 14)[..., 6:]
    stream = attend(layer, x, alpha, values)
    normed = divide_by_rms(stream, stream.sum(1, keepdim=True), layer.post_attention_layernorm)
    _, weight, index = layer.mlp.gate(normed.sum(1))
    added = share_out_experts(normed, layer.mlp.experts, index, weight, lambda number, part: None)
    added = added + share_out_shared(normed, layer.mlp.shared_experts)
    found = ffattr.attribute(model, tokens, scopes="all", layers=1)
    expected = {"atb": stream, "atb_ln": normed, "atb_ln_ff": added, "atb_ln_ff_res": added + stream}
    for scope, vectors in expected.items():
        torch.testing.assert_close(found[scope][0, 0], vectors.norm(dim=-1), rtol=0, atol=1e-9, msg=scope)
    with torch.no_grad():
        output = model(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.norm((added + stream).sum(1)), output[-1][0], rtol=0, atol=1e-9)


def test_two_kinds_of_value_bias_are_the_same_where_there_is_none() -> None:
    model, tokens = build("deepseek-v3"), ids(1)
    one, other = (ffattr.attribute(model, tokens, value_bias=kind)["layer"] for kind in ("token", "separate"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_bias_ahead_of_the_latents_norm_stays_with_its_token() -> None:
    model, tokens = build("deepseek-v3", attention_bias=True), ids(1)
    for kind in ("token", "separate"):
        found = ffattr.vectors(model, tokens, scope="layer", value_bias=kind)
        torch.testing.assert_close(found.values.sum(-2) + found.bias, found.total, rtol=0, atol=1e-9)
