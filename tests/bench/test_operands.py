"""Calls of an operator on random operands: what they hold, and how an error is told."""

from __future__ import annotations

import math

import pytest
import torch
from bench_cases import TINY
from torch import Tensor

from ffattr.bench.operands import OPERATORS, Problem
from ffattr.ops import torch_kernels

CPU = torch.device("cpu")


def run(problem: Problem) -> Tensor:
    found: Tensor = getattr(torch_kernels, problem.operator)(*problem.arguments.values())
    return found


@pytest.mark.parametrize("lengths", [(7,), (3, 7)])
@pytest.mark.parametrize("shape", list(TINY))
@pytest.mark.parametrize("operator", OPERATORS)
def test_errors_are_those_of_the_result(operator: str, shape: str, lengths: tuple[int, ...]) -> None:
    problem = Problem.draw_random(operator, TINY[shape], lengths, torch.float32, CPU)
    found = run(problem)
    assert problem.measure_error(found) < 1e-5
    assert problem.measure_error(found * 1.01) == pytest.approx(0.01, rel=1e-2)
    found[..., 0, 0] = torch.nan
    assert math.isnan(problem.measure_error(found))


def test_the_same_numbers_each_time() -> None:
    first, second = (Problem.draw_random("ff_norms", TINY["minilm"], (5,), torch.float32, CPU) for _ in range(2))
    for name, value in first.arguments.items():
        other = second.arguments[name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_a_causal_layer_counts_half_of_the_pairs() -> None:
    minilm, gpt2 = TINY["minilm"], TINY["gpt2"]
    full, half = (Problem.draw_random("ff_norms", size, (6, 2), torch.float32, CPU) for size in (minilm, gpt2))
    assert full.flops == 2 * 40 * minilm.ff_width * minilm.width
    assert half.flops == 2 * 20 * gpt2.ff_width * gpt2.width
    assert Problem.draw_random("ig_slope", minilm, (6,), torch.float32, CPU).flops == 0
