"""The definition: it adds up, it agrees with Integrated Gradients by captum and with the formulas of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import random_layers
import tiny_models
import torch
from recording import run
from tiny_models import FAMILIES, TORCH_FAMILIES, build
from torch import Tensor, nn

from ffattr.decomposition.attention import Attention, LayerRecord
from ffattr.decomposition.layer import LayerWeights
from ffattr.decomposition.reference import (
    Baseline,
    Rule,
    ScopeVectors,
    attention_stream,
    compute_output,
    context,
    decompose,
    head_vectors,
    own_values,
    weigh_values,
)
from ffattr.models.spec.layer import LayerSpec

pytestmark = pytest.mark.usefixtures("one_thread")

GATED = ("llama", "llama-bias", "mistral", "qwen2")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Sequence:
    """One sequence of one recorded layer, without its padding."""

    def __init__(self, spec: LayerSpec, recorded: LayerRecord, batch: int, tokens: Tensor) -> None:
        self.spec = spec
        self.weights: LayerWeights = spec.weights(torch.float64)
        self.x, self.output = recorded.input[batch, tokens], recorded.output[batch, tokens]
        self.attention: Attention = recorded.attention.sequence(batch, tokens, torch.float64)

    def scopes(
        self, rule: Rule | None = None, value_bias: str = "token", rows: Tensor | None = None
    ) -> dict[str, ScopeVectors]:
        rows = torch.arange(len(self.x)) if rows is None else rows
        found = decompose(self.weights, self.x, self.attention, rows, rule or Rule(), value_bias)
        return {str(scope): stream for scope, stream in found}


def sequences(name: str, padding: str | None = None, **overrides: object) -> list[Sequence]:
    width = overrides.pop("length", 7)
    given = tiny_models.inputs(name, padding=padding, length=width)  # type: ignore[arg-type]
    description, records, mask = run(name, build(name, **overrides), given)
    return [
        Sequence(description.layers[r.index], r, batch, mask[batch].nonzero()[:, 0])
        for r in records
        for batch in range(len(mask))
    ]


def baselines(name: str) -> dict[str, Baseline]:
    width = 76 if name in GATED else 52
    found: dict[str, Baseline] = {"zero": "zero", "bias": "bias", "tensor": random(width, seed=5)}
    if name in GATED:
        found["gate and up"] = random(2, width, seed=6)
    return found


# ---- it adds up


@pytest.mark.parametrize("value_bias", ["token", "separate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_and_bias_add_up(name: str, value_bias: str) -> None:
    padding = "right" if name in TORCH_FAMILIES else "left"
    for sequence in sequences(name, padding)[1:3]:  # a padded one, and one of another layer
        for baseline in baselines(name).values():
            found = sequence.scopes(Rule(baseline=baseline), value_bias)
            assert tuple(found) == sequence.weights.scopes
            torch.testing.assert_close(found["attn_heads"].vectors.sum(0), found["attn"].vectors, rtol=0, atol=1e-12)
            for scope, stream in list(found.items())[1:]:
                size = stream.total.abs().max()
                gap = (stream.vectors.sum(1) + stream.bias - stream.total).abs().max()
                assert gap <= 1e-12 * size, f"{scope}: {gap / size:.1e}"
            torch.testing.assert_close(stream.total, sequence.output, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-bias"])
def test_selected_rows_are_rows_of_all(name: str) -> None:
    rows = torch.tensor([4, 0, 4])
    for sequence in sequences(name):
        whole, some = sequence.scopes(), sequence.scopes(rows=rows)
        for scope, stream in some.items():
            torch.testing.assert_close(stream.vectors, whole[scope].vectors[..., rows, :, :], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "torch-pre"])
def test_value_bias_moves_between_token_and_bias(name: str) -> None:
    for sequence in sequences(name):
        token, separate = sequence.scopes(), sequence.scopes(value_bias="separate")
        for scope in sequence.weights.scopes[1:]:
            torch.testing.assert_close(token[scope].total, separate[scope].total, rtol=0, atol=1e-12)
            assert not torch.allclose(token[scope].bias, separate[scope].bias)
        # Of attention the bias is b_O alone where value biases stay with their tokens.
        out = sequence.weights.out.bias
        assert out is not None
        torch.testing.assert_close(token["attn"].bias, out.expand_as(token["attn"].bias))


def test_rows_of_attention_may_sum_to_less_than_one() -> None:
    for sequence in sequences("gpt2"):
        weights = sequence.weights
        values, constant = own_values(weights, sequence.x, "separate")
        alpha = sequence.attention.attention_weights(torch.arange(7)) * 0.3
        assert constant is not None
        query, key = torch.arange(7).repeat_interleave(7), torch.arange(7).repeat(7)
        of_pairs = weigh_values(alpha, values[key], query, key), query
        stream = attention_stream(weights, alpha, context(alpha, values), constant, of_pairs)
        vectors = stream.vectors.view(7, 7, -1)
        torch.testing.assert_close(vectors, torch.einsum("hij,jhd->ijd", alpha, head_vectors(weights, values)))
        torch.testing.assert_close(vectors.sum(1) + stream.bias, stream.total)
        mixed = torch.einsum("hij,jhk->ihk", alpha, values + constant).flatten(1)
        torch.testing.assert_close(stream.total, weights.out(mixed))


@pytest.mark.parametrize(
    ("rule", "order"), [("right", 1), ("left", 1), ("midpoint", 2), ("trapezoid", 2), ("gauss-legendre", math.inf)]
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_quadrature_converges_at_its_order(name: str, rule: str, order: float) -> None:
    sequence = sequences(name)[0]
    scope = next(s for s in sequence.weights.scopes if s.endswith("_ff"))

    def gap(intervals: int) -> float:
        stream = sequence.scopes(Rule(rule, intervals + (rule == "trapezoid")))[scope]
        return float((stream.vectors.sum(1) + stream.bias - stream.total).norm() / stream.total.norm())

    if order == math.inf:
        assert gap(32) < 1e-12 < 1e-7 < gap(2)
        return
    coarse, fine = gap(256), gap(512)
    assert math.isclose(math.log2(coarse / fine), order, abs_tol=0.1)
    assert fine < 0.02


# ---- Integrated Gradients of the feed-forward block by captum


def feed_forward(spec: LayerSpec, tokens: int, *given: Tensor) -> Tensor:
    """The block's output from token vectors ``[B, d]`` each and, last, the bias stream's pre-activations."""
    total = torch.stack(given[:tokens]).sum(0)
    modules = [module for module in (spec.gate, spec.up) if module is not None]
    z = [total @ module.weight.T + bias for module, bias in zip(modules, given[tokens:], strict=True)]  # type: ignore
    hidden = spec.activation(z[0]) * (z[1] if len(z) == 2 else 1)
    assert isinstance(spec.down, nn.Linear)
    return hidden @ spec.down.weight.T


SMALL = {
    "torch-layer": {"d_model": 8, "nhead": 2, "dim_feedforward": 12},
    "bert": {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12},
    "llama-bias": {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 12,
    },
}


@pytest.mark.parametrize("baseline", ["zero", "bias", "tensor"])
@pytest.mark.parametrize("name", ["bert", "llama-bias"])
def test_captum_finds_the_same_vectors(name: str, baseline: str) -> None:
    captum = pytest.importorskip("captum.attr")
    (sequence, *_) = sequences(name, length=4, **SMALL[name])
    streams, query = 2 if name == "llama-bias" else 1, 2
    start: Baseline = random(streams, 12, seed=7).squeeze(0) if baseline == "tensor" else baseline
    found = sequence.scopes(Rule(baseline=start))
    names = sequence.weights.scopes
    scope = next(s for s in names if s.endswith("_ff"))
    before = found[names[names.index(scope) - 1]]
    linear = [p for p in (sequence.weights.branches[0].gate, sequence.weights.branches[0].up) if p is not None]
    bias = [projection(before.bias[query, None]) for projection in linear]
    token_vectors = list(before.vectors[query].split(1))
    from_ = bias if baseline == "bias" else [torch.zeros_like(b) for b in bias]
    if isinstance(start, Tensor):
        from_ = list(start.view(streams, 1, 12))
    method = captum.IntegratedGradients(partial(feed_forward, sequence.spec, len(token_vectors)))
    given, origin = (*token_vectors, *bias), (*(torch.zeros_like(t) for t in token_vectors), *from_)
    with torch.enable_grad():
        shares = [
            [part.sum() for part in method.attribute(given, origin, target=k, n_steps=64, method="gausslegendre")]
            for k in range(8)
        ]
    expected = torch.tensor(shares, dtype=torch.float64).T  # [tokens and bias streams, d]
    torch.testing.assert_close(found[scope].vectors[query], expected[:4], rtol=0, atol=1e-5)
    with torch.no_grad():
        nothing = feed_forward(sequence.spec, len(token_vectors), *origin)[0]
    shift = 0 if sequence.weights.branches[0].down.bias is None else sequence.weights.branches[0].down.bias
    torch.testing.assert_close(found[scope].bias[query], expected[4:].sum(0) + nothing + shift, rtol=0, atol=1e-5)


# ---- the formulas of the papers, by hand


def heads_by_hand(sequence: Sequence, x: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha[h, i, j]`` by a softmax written out, and ``f_h(x_j)`` head by head, ``[H, T, d]``."""
    weights, attention = sequence.weights, sequence.attention
    size, share = weights.head_dim, weights.heads // weights.kv_heads
    alpha, f = [], []
    for h in range(weights.heads):
        kv = h // share
        scores = attention.scale * attention.query[h] @ attention.key[kv].T
        if weights.branches[0].gate is not None:  # the only decoder of these tests
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        exponentials = (scores - scores.max(1, keepdim=True).values).exp()
        alpha.append(exponentials / exponentials.sum(1, keepdim=True))
        columns = slice(kv * size, (kv + 1) * size)
        value = x @ weights.value.weight[:, columns]
        if weights.value.bias is not None:
            value = value + weights.value.bias[columns]
        f.append(value @ weights.out.weight[h * size : (h + 1) * size])
    return torch.stack(alpha), torch.stack(f)


@pytest.mark.parametrize("name", ["bert", "torch-even-heads", "llama-bias"])
def test_attention_of_2020(name: str) -> None:
    for sequence in sequences(name):
        norm = sequence.weights.norm_before_attn
        alpha, f = heads_by_hand(sequence, sequence.x if norm is None else norm(sequence.x))
        rows = torch.arange(len(sequence.x))
        torch.testing.assert_close(sequence.attention.attention_weights(rows), alpha)
        found = sequence.scopes()
        maps = found["attn_heads"].vectors.norm(dim=-1)
        torch.testing.assert_close(maps, alpha * f.norm(dim=-1)[:, None])
        torch.testing.assert_close(found["attn"].vectors, torch.einsum("hij,hjd->ijd", alpha, f))


def test_mixing_ratio_of_2021() -> None:
    for sequence in sequences("bert"):
        alpha, f = heads_by_hand(sequence, sequence.x)
        norm = sequence.weights.norm_after_attn
        assert norm is not None
        assert norm.weight is not None
        mixed = torch.einsum("hij,hjd->ijd", alpha, f)
        for i, vectors in enumerate(sequence.scopes()["atb"].vectors):
            others, own = mixed[i].sum(0) - mixed[i, i], mixed[i, i] + sequence.x[i]
            whole = others + own + sequence.weights.out.bias
            deviation = (whole.var(correction=0) + norm.eps).sqrt()
            others, own = ((part - part.mean()) / deviation * norm.weight for part in (others, own))
            expected = others.norm() / (others.norm() + own.norm())
            mixing, preserving = (vectors.sum(0) - vectors[i]).norm(), vectors[i].norm()
            ratio = mixing / (mixing + preserving)
            assert 0 <= ratio <= 1
            torch.testing.assert_close(ratio, expected)


@pytest.mark.parametrize("name", ["bert", "torch-pre"])
def test_slope_is_the_quotient_of_the_activation(name: str) -> None:
    """2024, with a zero baseline: ``(z_ij * (g(z_i) - g(0)) / z_i) W2``, wherever ``z`` is not near zero."""
    gelu: Callable[[Tensor], Tensor] = nn.functional.gelu
    for sequence in sequences(name):
        found, weights = sequence.scopes(), sequence.weights
        names = weights.scopes
        scope = next(s for s in names if s.endswith("_ff"))
        before = found[names[names.index(scope) - 1]]
        z = weights.branches[0].up(before.total)
        assert z.abs().min() > 1e-5
        expected = (before.vectors @ weights.branches[0].up.weight * (gelu(z) / z)[:, None]) @ weights.branches[
            0
        ].down.weight
        torch.testing.assert_close(found[scope].vectors, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"norms": "post"}, {"norms": "of"}, {"experts": 3}, {"decoder": True}])
def test_a_layers_output_without_decomposition_is_what_its_streams_add_up_to(options: dict[str, Any]) -> None:
    made = random_layers.layer(**options)
    rows = torch.tensor([4, 0, 6])
    given = (made.weights, made.x, made.attention, rows)
    *_, (_, last) = decompose(*given, Rule(), routing=made.routing, encoder=made.encoder)
    found = compute_output(*given, made.routing, made.encoder)
    torch.testing.assert_close(found, last.total, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(last.vectors.sum(-2) + last.bias, found, rtol=1e-10, atol=1e-10)
