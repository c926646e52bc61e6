"""The way from the last hidden states to a number and back: linear where it is frozen, and complete."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffattr.decomposition.activations import ACTIVATIONS
from ffattr.decomposition.adjoint.head import Head, Reads, pull_states, read_out
from ffattr.decomposition.affine import Linear, Norm
from ffattr.decomposition.reference import Rule

TOKENS, WIDTH = 5, 6


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HIDDEN = random(TOKENS, WIDTH, seed=0)
EACH = (Norm("rms", random(WIDTH, seed=1), None, 1e-6),)
THEN = (
    Linear(random(2 * WIDTH, 7, seed=2), random(7, seed=3)),
    ACTIVATIONS["gelu"],
    Norm("layer", random(7, seed=4), random(7, seed=5), 1e-6),
    0.5,
)
TARGETS, SHIFT = random(3, 7, seed=6), random(3, seed=7)
ONE = torch.zeros(2, TOKENS, dtype=torch.float64)
ONE[0, 1] = ONE[1, 4] = 1
MEAN = torch.full((2, TOKENS), 1 / TOKENS, dtype=torch.float64)
READS = Reads((ONE, MEAN), torch.tensor([0, 1, 1]))  # a token beside the mean of all


def compute(hidden: Tensor) -> Tensor:
    """The same by nobody's code: what the three targets are."""
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * EACH[0].weight
    read = torch.cat([normed[[1, 4]], normed.mean(0).expand(2, -1)], -1)
    hidden = torch.nn.functional.gelu(read @ THEN[0].weight + THEN[0].bias)
    normed = torch.nn.functional.layer_norm(hidden, (7,), THEN[2].weight, THEN[2].bias, 1e-6) * 0.5
    return (normed[[0, 1, 1]] * TARGETS).sum(-1) + SHIFT


@pytest.mark.parametrize("baseline", ["zero", "bias"])
def test_numbers_are_those_of_the_head_and_all_of_them_is_given(baseline):
    out = read_out(Head(EACH, THEN), HIDDEN, READS, TARGETS, SHIFT, Rule(baseline=baseline))
    assert torch.allclose(out.value, compute(HIDDEN), rtol=0, atol=1e-12)
    assert torch.allclose((out.directions * HIDDEN).sum((1, 2)) + out.constant, out.value, rtol=0, atol=1e-12)
    assert (out.size >= out.value.abs() - 1e-12).all()


def test_a_single_token_that_is_read_is_the_only_one_that_gives():
    out = read_out(Head(EACH), HIDDEN, Reads((ONE,), torch.tensor([0, 1])), random(2, WIDTH, seed=8), SHIFT[:2], Rule())
    assert out.directions.any(-1).tolist() == [[False, True, False, False, False], [False] * 4 + [True]]
    assert torch.equal(out.constant, SHIFT[:2])


def test_a_head_without_activations_is_frozen_but_for_its_norms():
    """Scaled hidden states leave the norm's output as it is, but not what is read through the frozen norm."""
    targets = random(2, WIDTH, seed=8)
    reads = Reads((ONE,), torch.tensor([0, 1]))
    out = read_out(Head(EACH), HIDDEN, reads, targets, torch.zeros(2, dtype=torch.float64), Rule())
    twice = read_out(Head(EACH), 2 * HIDDEN, reads, targets, torch.zeros(2, dtype=torch.float64), Rule())
    assert torch.allclose(twice.value, out.value, rtol=0, atol=1e-5)
    assert torch.allclose(twice.directions, out.directions / 2, rtol=0, atol=1e-5)


def test_the_slope_is_that_of_the_rule():
    exact, coarse = (
        read_out(Head(EACH, THEN), HIDDEN, READS, TARGETS, SHIFT, rule) for rule in (Rule(), Rule("right", 2))
    )
    assert torch.equal(exact.value, coarse.value)
    assert not torch.allclose(exact.directions, coarse.directions, rtol=0, atol=1e-3)


def test_states_of_an_encoder_are_pulled_back_token_by_token():
    directions = random(2, TOKENS, WIDTH, seed=9)
    norm = Norm("layer", random(WIDTH, seed=1), random(WIDTH, seed=2), 1e-6)
    states, pulled, constant = pull_states((norm,), HIDDEN, directions, Rule())
    assert torch.allclose(states, norm(HIDDEN), rtol=0, atol=1e-14)
    value = (directions * states).sum((1, 2))
    assert torch.allclose((pulled * HIDDEN).sum((1, 2)) + constant, value, rtol=0, atol=1e-12)
    same, back, nothing = pull_states((), HIDDEN, directions, Rule())
    assert torch.equal(same, HIDDEN)
    assert torch.equal(back, directions)
    assert not nothing.any()
