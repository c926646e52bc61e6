"""Random layers of known shapes, and the operations that are counted of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import TINY

from ffattr.bench.cases import SHAPES, Case


@pytest.mark.parametrize(
    ("name", "scopes", "parameters"),
    [
        ("minilm", ("attn_heads", "attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"), 12),
        ("gpt2", ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res"), 12),
        ("llama-7b", ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res"), 6),
    ],
)
def test_layers(name: str, scopes: tuple[str, ...], parameters: int) -> None:
    case = Case.draw_random(TINY[name], 5)
    assert case.weights.scopes == scopes
    assert (*case.narrow_scopes, *case.wide_scopes) == scopes[1:]
    tensors = dict(case.weights.tensors())
    assert len(tensors) == parameters + ("gate.weight" in tensors)
    assert ("gate.weight" in tensors) == (name == "llama-7b")
    half = Case.draw_random(TINY[name], 5, torch.bfloat16)
    for key, tensor in half.weights.tensors():
        assert torch.equal(tensor, tensors[key].bfloat16()) or key.startswith("norm")  # 1 + x is rounded twice
    assert {t.dtype for _, t in case.cast_to(torch.float64).weights.tensors()} == {torch.float64}
    assert case.cast_to(torch.float64).attention.query.dtype == case.cast_to(torch.float64).x.dtype == torch.float64


def test_sizes_are_those_of_the_models() -> None:
    assert {name: (s.width, s.heads, s.ff_width) for name, s in SHAPES.items()} == {
        "minilm": (384, 12, 1536),
        "bert-base": (768, 12, 3072),
        "gpt2": (768, 12, 3072),
        "llama-7b": (4096, 32, 11008),
    }


def test_heads_may_be_wider_than_the_model() -> None:
    case = Case.draw_random(replace(TINY["llama-7b"], head_dim=10), 5)
    assert (case.weights.head_dim, case.attention.key.shape[-1]) == (10, 10)
    assert case.weights.value.weight.shape == (24, 10 * case.weights.heads)


def test_shares_count_two_t_squared_f_d() -> None:
    full = Case.draw_random(TINY["bert-base"], 10)
    causal = Case.draw_random(replace(TINY["bert-base"], causal=True), 10)
    gated = Case.draw_random(replace(TINY["llama-7b"], causal=False), 10)
    assert full.flops == gated.flops == 2 * 10 * 10 * 40 * 24
    assert causal.flops == full.flops / 2


def test_another_seed_draws_other_numbers() -> None:
    first, again, other = (Case.draw_random(TINY["gpt2"], 5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.attention.query, again.attention.query)
    assert not torch.equal(first.x, other.x)
