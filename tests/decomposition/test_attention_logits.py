"""Logits and masks of recorded queries and keys, and which pairs they leave."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from plain_layers import random
from recording import run
from tiny_models import build
from torch import Tensor
from torch.nn import functional as F

from ffattr.decomposition.attention import QueryKey, allows_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def attention(mask: Tensor | None = None, causal: bool = False, batch: int = 2, tokens: int = 5) -> QueryKey:
    return QueryKey(random(batch, 6, tokens, 4, seed=1), random(batch, 2, tokens, 4, seed=2), 0.7, mask, causal)


def weights_of(given: QueryKey, batch: int) -> Tensor:
    """Softmax by PyTorch's own attention: with the identity as values, its output is the weights."""
    tokens = given.query.shape[2]
    mask = given.mask
    if given.causal:
        lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mask = lower if mask is None else mask & lower if mask.dtype == torch.bool else mask.masked_fill(~lower, -1e300)
    eye = torch.eye(tokens, dtype=torch.float64).expand(len(given.query), 6, tokens, tokens)
    key = given.key.repeat_interleave(3, dim=1)
    return F.scaled_dot_product_attention(given.query, key, eye, mask, scale=given.scale)[batch]


def masks(tokens: int = 5) -> dict[str, Tensor | None]:
    allowed = random(2, 1, tokens, tokens, seed=3) > -0.3
    allowed |= torch.eye(tokens, dtype=torch.bool)  # no row without a key
    additive = torch.zeros(allowed.shape, dtype=torch.float64)
    padding = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    padding[1, ..., -2:] = False
    lowest = torch.finfo(torch.float64).min
    return {
        "none": None,
        "bool": allowed,
        "one for all sequences": allowed[:1],
        "additive": additive.masked_fill(~allowed, lowest),
        "infinite": additive.masked_fill(~allowed, -torch.inf),
        "float32": additive.float().masked_fill(~allowed, torch.finfo(torch.float32).min),
        "bias": random(2, 6, tokens, tokens, seed=4),
        "padding": padding,
        "additive padding": torch.zeros(padding.shape, dtype=torch.float64).masked_fill(~padding, -torch.inf),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", masks())
def test_logits(name: str, causal: bool) -> None:
    mask = masks()[name]
    given = attention(mask, causal)
    rows = torch.tensor([3, 0, 4, 3])
    for batch in (0, 1):
        sequence = given.sequence(batch, torch.arange(5), torch.float64)
        wide = given if mask is None or mask.dtype == torch.bool else attention(mask.double(), causal)
        expected = weights_of(wide, batch)[:, rows]
        torch.testing.assert_close(sequence.logits(rows).softmax(-1), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", masks())
def test_a_sequence_without_some_tokens(name: str) -> None:
    mask, kept = masks()[name], torch.tensor([0, 1, 4])
    sequence = attention(mask).sequence(1, kept, torch.float64)
    assert (sequence.query.shape, sequence.key.shape) == ((6, 3, 4), (2, 3, 4))
    whole = attention(mask).sequence(1, torch.arange(5), torch.float64).logits(torch.arange(5))
    assert torch.equal(sequence.logits(torch.arange(3)), whole[:, kept][:, :, kept])
    assert sequence.logits(torch.arange(3)).dtype == torch.float64
    assert attention(mask).sequence(1, kept, torch.float32).logits(torch.arange(3)).dtype == torch.float32


def test_logits_leave_query_key_and_mask_alone() -> None:
    given = attention(masks()["additive"]).sequence(0, torch.arange(5), torch.float64)
    assert given.mask is not None
    tensors = (given.query, given.key, given.mask)
    before = [t.clone() for t in tensors]
    given.logits(torch.arange(5))
    assert all(map(torch.equal, tensors, before))


def test_sinks_take_attention_that_no_token_gets() -> None:
    query, key, sinks = random(2, 4, 3), random(1, 4, 3, seed=1), random(2, seed=2)
    attention = QueryKey(query, key, scale=0.5, causal=True, sinks=sinks)
    rows = torch.tensor([2, 0])
    logits = (0.5 * query @ key.mT)[:, rows].masked_fill(torch.arange(4) > rows[:, None], -torch.inf).exp()
    expected = logits / (logits.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(attention.attention_weights(rows), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", masks())
def test_pairs_counts_what_may_attend(name: str, causal: bool) -> None:
    rows = torch.tensor([4, 2, 0])
    for batch in (0, 1):
        sequence = attention(masks()[name], causal).sequence(batch, torch.arange(5), torch.float64)
        alive = (sequence.logits(rows) > torch.finfo(torch.float32).min / 2).any(0)
        assert sequence.pairs(rows) == int(alive.sum())


def test_a_pair_masked_for_some_heads_counts() -> None:
    mask = torch.ones(1, 6, 5, 5, dtype=torch.bool)
    mask[:, :5, 0, 1] = False
    mask[:, :, 0, 2] = False
    assert attention(mask).sequence(0, torch.arange(5), torch.float64).pairs(torch.tensor([0])) == 4


def test_looks_ahead() -> None:
    lower = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    additive = torch.zeros(lower.shape).masked_fill(~lower, torch.finfo(torch.float32).min)
    assert attention().looks_ahead
    assert not attention(causal=True).looks_ahead
    assert not attention(lower).looks_ahead
    assert not attention(additive).looks_ahead
    assert not attention(additive.masked_fill(~lower, -torch.inf)).looks_ahead
    assert attention(lower[..., -1:, :]).looks_ahead  # keys alone: padding
    one = lower.expand(2, -1, -1, -1).clone()
    one[1, 0, 0, 4] = True
    assert attention(one).looks_ahead


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "torch-pre"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_only_decoders_look_back(name: str, padding: str | None) -> None:
    _, records, _ = run(name, build(name), tiny_models.inputs(name, padding=padding))
    assert [r.attention.looks_ahead for r in records] == [name in ("bert", "torch-pre")] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_a_mask_allows(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([0.0, -3.0, lowest, -torch.inf, lowest / 4, 0.75 * lowest], dtype=dtype)
    assert allows_attention(mask).tolist() == [True, True, False, False, True, False]
    assert allows_attention(mask > -1).tolist() == [True, False, False, False, False, False]
