"""Gates that multiply what the heads of an attention return: found by structure, and their maps against a
decomposition written out from the model's own weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from own_modules import Block, Mine, transformers_model
from tiny_models import ids
from torch import Tensor, nn
from torch.nn import functional as F
from versions import PINNED, needs

import ffattr
from ffattr.errors import UnsupportedModel
from ffattr.models.detection.detect import detect_layers
from ffattr.models.detection.parts import Cut, Gate
from ffattr.models.detection.template import write_template
from ffattr.models.registry import resolve
from ffattr.models.spec.layer import GateSpec

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, GROUPS, FEATURES = 4, 2, 6
KINDS = ("feature", "beside the query", "behind the queries", "head", "softplus")


class GatedAttention(nn.Module):
    """Grouped heads whose mixed values a gate multiplies ahead of the output projection."""

    heads = HEADS

    def __init__(self, kind: str) -> None:
        super().__init__()
        fused = kind in ("beside the query", "behind the queries")
        self.kind = kind
        self.q_proj = nn.Linear(24, 48 if fused else 24)
        self.kv_proj = nn.Linear(24, 24)
        self.out = nn.Linear(24, 24)
        self.gate = None if fused else nn.Linear(24, HEADS if kind == "head" else 24)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query and the gate's factors ``[B, T, H, dh]`` (or 1), keys and values of all heads."""
        q = self.q_proj(x)
        if self.kind == "beside the query":
            q, gate = q.unflatten(-1, (HEADS, -1)).chunk(2, -1)
        elif self.kind == "behind the queries":
            q, gate = (part.unflatten(-1, (HEADS, -1)) for part in q.chunk(2, -1))
        else:
            assert self.gate is not None
            q, gate = q.unflatten(-1, (HEADS, -1)), self.gate(x).unflatten(-1, (HEADS, -1))
        gain = F.softplus(gate) if self.kind == "softplus" else gate.sigmoid()
        k, v = (part.unflatten(-1, (GROUPS, -1)).repeat_interleave(2, -2) for part in self.kv_proj(x).chunk(2, -1))
        return q, k, v, gain

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gain = self.project(x)
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
        return self.out((mixed.transpose(1, 2) * gain).flatten(2))


def gated(kind: str) -> Mine:
    torch.manual_seed(5)
    return Mine([Block(lambda: GatedAttention(kind)) for _ in range(2)])


def write_out(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors by head ``[H, T, T, d]`` and of all heads with the residual, of the first layer of one sequence."""
    block = model.blocks[0]
    x = (model.embedding(tokens) + model.positions(torch.arange(tokens.shape[1])))[0]
    q, k, v, gain = (part[0] for part in block.attention.project(block.norm1(x)[None]))
    logits = torch.einsum("ihf,jhf->hij", q, k) / FEATURES**0.5
    alpha = logits.masked_fill(torch.ones_like(logits[0]).triu(1).bool(), -torch.inf).softmax(-1)
    out = block.attention.out.weight.T.unflatten(0, (HEADS, -1))
    gain = gain.expand(-1, -1, FEATURES)
    by_head = torch.einsum("hij,ihf,jhf,hfd->hijd", alpha, gain, v, out)
    return by_head, by_head.sum(0) + torch.diag_embed(x.T).permute(1, 2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_is_found(kind: str) -> None:
    (parts,) = detect_layers(gated(kind)).parts
    expected = {
        "feature": Gate("attention.gate", "sigmoid"),
        "beside the query": Gate(Cut("attention.q_proj", 6, 12, 4), "sigmoid"),
        "behind the queries": Gate(Cut("attention.q_proj", 24, 48), "sigmoid"),
        "head": Gate("attention.gate", "sigmoid"),
        "softplus": Gate("attention.gate", "softplus"),
    }
    assert parts["attention_gate"] == expected[kind]
    assert (parts["heads"], parts["kv_heads"], parts["value"]) == (4, 2, Cut("attention.kv_proj", 12, 24))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_maps_written_out(kind: str) -> None:
    model, tokens = gated(kind), ids(1, 6) % 50
    by_head, stream = write_out(model, tokens)
    for backend in ("reference", "torch", "cpu"):
        found = ffattr.attribute(model, tokens, scopes="all", layers=0, backend=backend)
        torch.testing.assert_close(found["attn_heads"][0, 0], by_head.norm(dim=-1), rtol=0, atol=1e-10)
        torch.testing.assert_close(found["attn"][0, 0], by_head.sum(0).norm(dim=-1), rtol=0, atol=1e-10)
        torch.testing.assert_close(found["atb"][0, 0], stream.norm(dim=-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduce", ["l2", "l1", "alti"])
@pytest.mark.parametrize("method", ["direct", "operator", "pairs"])
def test_feed_forward_maps_are_those_of_the_definition(method: str, reduce: str) -> None:
    model, tokens = gated("beside the query"), ids() % 50
    options: dict[str, Any] = {"scopes": "all", "dtype": torch.float64, "reduce": reduce}
    expected = ffattr.attribute(model, tokens, backend="reference", **options)
    found = ffattr.attribute(model, tokens, backend="torch", method=method, **options)
    assert float(found.error.max()) < 1e-12
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)
        torch.testing.assert_close(found.bias[scope], expected.bias[scope], rtol=0, atol=1e-10, msg=scope)


@pytest.mark.parametrize("value_bias", ["token", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_add_up(kind: str, value_bias: str) -> None:
    for scope in ("attn", "layer"):
        found = ffattr.vectors(gated(kind), ids() % 50, scope=scope, value_bias=value_bias)
        torch.testing.assert_close(found.values.sum(-2) + found.bias, found.total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["feature", "head"])
def test_groups_add_up_tokens(kind: str) -> None:
    model, tokens = gated(kind), ids(1, 6) % 50
    groups = [[(0, 2), (2, 5), (5, 6)]]
    one = ffattr.attribute(model, tokens, groups=groups, scopes=["attn", "layer"], backend="torch")
    vectors = ffattr.vectors(model, tokens, scope="layer").values
    expected = torch.stack([vectors[..., start:stop, :].sum(-2) for start, stop in groups[0]], -2).norm(dim=-1)
    torch.testing.assert_close(one["layer"], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("value_bias", ["token", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_contributions_follow_the_same_vectors(kind: str, value_bias: str) -> None:
    """What flows toward a direction of the last hidden states is that direction times the vectors."""
    model, tokens = gated(kind), ids(1, 6) % 50
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64)
    given: dict[str, Any] = {"target": direction, "position": -1, "value_bias": value_bias}
    found = ffattr.contributions(model, tokens, flow=True, **given)
    heads = ffattr.contributions(model, tokens, flow="heads", **given)
    assert float(found.error.max()) < 1e-10
    vectors = ffattr.vectors(model, tokens, scope="layer", layers=-1, queries=[-1], value_bias=value_bias)
    torch.testing.assert_close(found.flow[0, -1, 0, -1], (vectors.values @ direction)[0, 0, 0], rtol=0, atol=1e-10)
    by_head = heads.flow[0, -1, 0]
    assert by_head.shape == (HEADS, 6, 6)
    torch.testing.assert_close(by_head.sum(0)[-1, :-1], found.flow[0, -1, 0, -1, :-1], rtol=0, atol=1e-10)


def test_qwen_with_linear_attention_between() -> None:
    """Its layers without attention are left out by name, those that attend have a gate beside the query."""
    needs(str(PINNED), "that has the family, of those that are tested")
    shapes = {"head_dim": 8, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6}
    linear = {f"linear_{name}": size for name, size in (("num_key_heads", 2), ("num_value_heads", 2))}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = {"num_hidden_layers": 2, "num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
    model = transformers_model("Qwen3_5Text", **shapes, **linear, **kinds, pad_token_id=0)
    description = resolve(model)
    (spec,) = description.layers
    assert spec.attention_gate == GateSpec(spec.attention_gate.module, F.sigmoid)
    assert (description.numbers, spec.heads, spec.mixed_heads) == ((1,), 6, 48)
    found = ffattr.attribute(model, ids(), scopes="all", backend="torch", dtype=torch.float64)
    expected = ffattr.attribute(model, ids(), scopes="all", backend="reference", dtype=torch.float64)
    assert found["attn_heads"].shape == (1, 2, 6, 7, 7)
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)
    with pytest.raises(UnsupportedModel, match="layer 0 of Qwen3_5TextModel is a Qwen3_5DecoderLayer without"):
        ffattr.attribute(model, ids(), layers=[0])


def test_a_gate_of_another_width_is_refused() -> None:
    spec = resolve(gated("head")).layers[0]
    wrong = replace(spec, attention_gate=GateSpec(nn.Linear(24, 7).double()))
    with pytest.raises(UnsupportedModel, match="gate of attention makes 7 numbers, expected 4, one for each"):
        wrong.weights(torch.float64)


def test_the_description_is_written_with_its_gate() -> None:
    (parts,) = detect_layers(gated("beside the query")).parts
    written = write_template("mine", "blocks", parts)
    gate = "ffattr.Columns(layer.attention.q_proj, 6, 12, groups=4), torch.nn.functional.sigmoid"
    assert f"attention_gate=ffattr.GateSpec({gate})" in written
