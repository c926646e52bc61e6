"""Norms of every head's values, and a gain of the layer's whole output: found by structure, their maps against a
decomposition written out from the model's own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from own_modules import GEMMA4, VALUE_NORMS, Attention, Gained, Mine, NormedValues, mine, transformers_model
from tiny_models import ids
from torch import Tensor, nn
from torch.nn import functional as F
from versions import PINNED, needs

import ffattr
from ffattr.models.detection.detect import detect_layers
from ffattr.models.detection.parts import Cut, Gain, Product
from ffattr.models.registry import resolve
from ffattr.models.spec.norms import GainSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str) -> Mine:
    torch.manual_seed(5)
    if name.startswith("gain"):
        return Mine([Gained(24 if name == "gains" else 1) for _ in range(2)])
    return mine(attention=lambda: NormedValues(name))


EVERY = (*VALUE_NORMS, "gain", "gains")


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_layouts_of_heads(kv_heads: int, heads_first: bool) -> None:
    """Heads of a token side by side, or tokens of a head; one head of values for all queries."""
    torch.manual_seed(5)

    class Normed(nn.Module):
        heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 6 * kv_heads), nn.Linear(24, 6 * kv_heads)
            self.out, self.norm = nn.Linear(24, 24), nn.RMSNorm(6, eps=1e-3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part(x).unflatten(-1, (-1, 6)) for part in (self.q, self.k, self.v))
            v = v if heads_first else self.norm(v)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            v = self.norm(v) if heads_first else v
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    model, tokens = mine(attention=Normed), ids() % 50
    (parts,) = detect_layers(model).parts
    assert (parts["norm_of_values"], parts["value"], parts["kv_heads"]) == ("attention.norm", "attention.v", kv_heads)
    assert float(ffattr.attribute(model, tokens).error.max()) < 1e-12


class Turned(Attention):
    """Projects what heads return with tokens before sequences (MLCD), and multiplies values by a number (MiMo)."""

    def __init__(self, value_scale: float) -> None:
        super().__init__()
        self.value, self.value_scale = nn.Linear(24, 24), value_scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, _ = (part.unflatten(-1, (-1, 6)).transpose(1, 2) for part in self.qkv(x).split((24, 12, 12), -1))
        v = self.value(x).unflatten(-1, (-1, 6)).transpose(1, 2) * self.value_scale
        mixed = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v)
        return self.out(mixed.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_values_that_are_multiplied_and_rows_that_are_turned_round(scale: float) -> None:
    model, tokens = mine(attention=lambda: Turned(scale)), ids() % 50
    (parts,) = detect_layers(model, {"ids": tokens}).parts
    scaled = Product("attention.value", "attention.value_scale", is_number=True)
    assert parts["value"] == ("attention.value" if scale == 1.0 else scaled)
    expected = ffattr.attribute(model, tokens, scopes="all", backend="reference", dtype=torch.float64)
    found = ffattr.attribute(model, tokens, scopes="all", backend="torch")
    assert float(found.error.max()) < 1e-12
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)
    vectors = ffattr.vectors(model, tokens, scope="layer", value_bias="separate")
    torch.testing.assert_close(vectors.values.sum(-2) + vectors.bias, vectors.total, rtol=0, atol=1e-12)


def test_what_is_found() -> None:
    (parts,) = detect_layers(make("rms")).parts
    assert (parts["norm_of_values"], parts["kv_heads"]) == ("attention.norm", 2)
    assert parts["value"] == Cut("attention.qkv", 36, 48)
    (parts,) = detect_layers(make("gain")).parts
    assert parts["norm_after_ff"] == Gain("gain")
    assert "norm_of_values" not in parts


@torch.no_grad()
@pytest.mark.parametrize("kind", VALUE_NORMS)
def test_vectors_written_out(kind: str) -> None:
    """The statistics of the values' norm frozen, a token's vector is linear in what attention reads of it, which is
    a norm of the layer's input; its bias stays with the token."""
    model, tokens = make(kind), ids(1, 6) % 50
    block: Any = model.blocks[0]
    x = (model.embedding(tokens) + model.positions(torch.arange(6)))[0]
    q, k, v = (part[0] for part in block.attention.project(block.norm1(x)[None]))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    logits = torch.einsum("ihf,jhf->hij", q, k) / 6**0.5
    alpha = logits.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    out = block.attention.out.weight.T.unflatten(0, (4, 6))
    by_head = torch.einsum("hij,jhf,hfd->hijd", alpha, v, out)
    for backend in ("reference", "torch", "cpu"):
        found = ffattr.attribute(model, tokens, scopes=["attn_heads", "attn"], layers=0, backend=backend)
        torch.testing.assert_close(found["attn_heads"][0, 0], by_head.norm(dim=-1), rtol=0, atol=1e-10)
        torch.testing.assert_close(found["attn"][0, 0], by_head.sum(0).norm(dim=-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["direct", "operator", "pairs"])
@pytest.mark.parametrize("name", EVERY)
def test_maps_are_those_of_the_definition(name: str, method: str) -> None:
    model, tokens = make(name), ids() % 50
    options: dict[str, Any] = {"scopes": "all", "dtype": torch.float64}
    expected = ffattr.attribute(model, tokens, backend="reference", **options)
    found = ffattr.attribute(model, tokens, backend="torch", method=method, **options)
    assert float(found.error.max()) < 1e-12
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)


@pytest.mark.parametrize("value_bias", ["token", "separate"])
@pytest.mark.parametrize("name", EVERY)
def test_vectors_and_contributions_add_up(name: str, value_bias: str) -> None:
    model, tokens = make(name), ids(1, 6) % 50
    for scope in ("attn", "layer"):
        vectors = ffattr.vectors(model, tokens, scope=scope, value_bias=value_bias)
        torch.testing.assert_close(vectors.values.sum(-2) + vectors.bias, vectors.total, rtol=0, atol=1e-12)
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64)
    found = ffattr.contributions(model, tokens, target=direction, position=-1, flow=True, value_bias=value_bias)
    assert float(found.error.max()) < 1e-10
    vectors = ffattr.vectors(model, tokens, scope="layer", layers=-1, queries=[-1], value_bias=value_bias)
    torch.testing.assert_close(found.flow[0, -1, 0, -1], (vectors.values @ direction)[0, 0, 0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_gain_multiplies_the_maps_before_it() -> None:
    model, tokens = make("gain"), ids() % 50
    found = ffattr.attribute(model, tokens, scopes=["atb_ln_ff_res", "atb_ln_ff_res_ln"])
    gains = torch.stack([block.gain.abs() for block in model.blocks])[:, :, None, None]
    torch.testing.assert_close(found["atb_ln_ff_res_ln"], found["atb_ln_ff_res"] * gains, rtol=1e-12, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True], ids=["own values", "values are keys"])
def test_gemma_4(shared: bool) -> None:
    """Windows and whole attention with other heads, values without a projection of their own, a number at last: the
    map of the last layer written out from its weights."""
    needs(str(PINNED), "that has the family, of those that are tested")
    sizes = {
        **GEMMA4,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 3,
        "attention_k_eq_v": shared,
    }
    model = transformers_model("Gemma4Text", **sizes)
    for layer in model.layers:
        layer.layer_scalar.fill_(0.4)
    spec = resolve(model).layers[-1]
    assert spec.norm_after_ff == GainSpec(model.layers[-1], "layer_scalar")
    assert spec.norm_of_values is model.layers[-1].self_attn.v_norm
    tokens = ids()
    expected = ffattr.attribute(model, tokens, scopes="all", backend="reference", dtype=torch.float64)
    found = ffattr.attribute(model, tokens, scopes="all", backend="torch", dtype=torch.float64)
    assert float(found.error.max()) < 1e-10
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)
    written = write_out_gemma(model, tokens[:1])
    torch.testing.assert_close(found["layer"][-1, 0], written.norm(dim=-1), rtol=0, atol=1e-6)  # weights in float32


def write_out_gemma(model: Any, tokens: Tensor) -> Tensor:
    """The vectors ``[T, T, d]`` of the last layer, of every module's own formula with its numbers frozen."""
    states = {}
    layer = model.layers[-1]
    attention, mlp = layer.self_attn, layer.mlp
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: states.update({name: (args, output)}))
        for name, module in layer.named_modules()
    ]
    x = []
    handles.append(layer.register_forward_pre_hook(lambda module, args: x.append(args[0].clone())))
    model.set_attn_implementation("eager")
    model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    alpha, x = states["self_attn"][1][1][0], x[0][0]

    def freeze(norm: Any, name: str, vectors: Tensor) -> Tensor:
        """An RMSNorm that divides by what it divided its own input by, ``[T, ...]`` of queries."""
        read = states[name][0][0][0]
        divided = vectors / (read.square().mean(-1) + norm.eps).sqrt()[..., None, None]
        return divided if norm.weight is None else divided * norm.weight

    normed = freeze(layer.input_layernorm, "input_layernorm", x[:, None])[:, 0]
    value = attention.k_proj if attention.v_proj is None else attention.v_proj
    v = value(normed).unflatten(-1, (-1, attention.head_dim))  # [T, Hkv, dh]
    v = v / (v.square().mean(-1, keepdim=True) + attention.v_norm.eps).sqrt()
    v = v.repeat_interleave(6 // v.shape[1], 1)
    out = attention.o_proj.weight.T.unflatten(0, (6, -1))
    vectors = torch.einsum("hij,jhf,hfd->ijd", alpha, v, out)
    vectors = freeze(layer.post_attention_layernorm, "post_attention_layernorm", vectors)
    stream = vectors + torch.diag_embed(x.T).permute(1, 2, 0)
    t = freeze(layer.pre_feedforward_layernorm, "pre_feedforward_layernorm", stream)
    u, w = states["mlp.gate_proj"][1][0], states["mlp.up_proj"][1][0]
    steps = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # midpoints of the path
    mean = torch.stack([mlp.act_fn(step * u) for step in steps]).mean(0)
    slope = w * (mlp.act_fn(u) - mean) / u
    neurons = t @ mlp.gate_proj.weight.T * slope[:, None] + t @ mlp.up_proj.weight.T * mean[:, None]
    ff = freeze(layer.post_feedforward_layernorm, "post_feedforward_layernorm", neurons @ mlp.down_proj.weight.T)
    return (stream + ff) * layer.layer_scalar
