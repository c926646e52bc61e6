"""``torch.ops.ffattr.ig_slope`` on the CPU, whichever implementation is registered, against
`ffattr.decomposition.integrated_gradients` in float64."""

from __future__ import annotations

import math

import pytest
import torch
from slope_cases import EXTREMES, expected, random
from torch import Tensor

import ffattr.ops.contract  # noqa: F401  declares the operators
from ffattr.decomposition import integrated_gradients as ig


def check(z: Tensor, base: Tensor | None, scale: Tensor | None, name: str, rule: str = "exact", steps: int = 0) -> None:
    out = torch.ops.ffattr.ig_slope(z, base, scale, name, rule, steps)
    assert out.shape == z.shape
    assert out.dtype == z.dtype
    reference = expected(z, base, scale, name, rule, steps)
    size = reference.abs().clamp_min(1)
    if len(z) == 2:  # one rounding of the gate's factor is eps times the up stream times the derivative
        gate, up = (z if base is None else torch.maximum(z.abs(), base.abs())).abs()
        size = torch.maximum(size, up * gate.clamp_min(1) if name == "relu2" else up)
    if scale is not None:
        size = size * scale.abs().clamp_min(1)[:, None]
    error = (out.double() - reference).abs() / size
    # float32: 2 roundings for the argument, 5 for the function, and those of a sum of `steps` terms
    limit = (1e-6 if rule == "exact" else 2e-6) if z.dtype == torch.float32 else 1e-13
    assert (error <= limit).all(), f"{error.max().item():.2e} at {z.flatten(1)[:, error.sum(0).argmax()].tolist()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("name", ig.ACTIVATIONS)
@pytest.mark.parametrize(
    ("rule", "steps"),
    [("exact", 0), ("right", 7), ("left", 1), ("midpoint", 4), ("trapezoid", 5), ("gauss-legendre", 9)],
)
def test_every_activation_and_rule(name: str, rule: str, steps: int, streams: int, dtype: torch.dtype) -> None:
    z = random(streams, 5, 56, dtype=dtype)
    scale = random(5, dtype=dtype, seed=1)
    check(z, None, None, name, rule, steps)
    check(z, None, scale, name, rule, steps)
    check(z, random(streams, 1, 56, dtype=dtype, seed=2), None, name, rule, steps)
    check(z, random(streams, 5, 56, dtype=dtype, seed=3), scale, name, rule, steps)


@pytest.mark.parametrize("rows", [0, 1, 5, 33])
@pytest.mark.parametrize("neurons", [1, 56, 200])
@pytest.mark.parametrize("streams", [1, 2])
def test_sizes(streams: int, rows: int, neurons: int) -> None:
    z, scale = random(streams, rows, neurons), random(rows, seed=1)
    for base_rows in (1, rows):
        base = random(streams, base_rows, neurons, seed=2)
        check(z, base, scale, "gelu")
        check(z, base, scale, "gelu", "right", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ig.ACTIVATIONS)
def test_extreme_values(name: str, dtype: torch.dtype) -> None:
    u = torch.tensor(EXTREMES, dtype=dtype)
    v = torch.linspace(-3, 3, len(u), dtype=dtype)
    check(u.view(1, 1, -1), None, None, name)
    check(torch.stack([u, v])[:, None], None, None, name)
    for offset in (0.0, 1e-6, 0.999, -1.001, 25.0):
        start = torch.stack([u + offset, -v])[:, None]
        check(u.view(1, 1, -1), start[:1], None, name)
        check(torch.stack([u, v])[:, None], start, None, name)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_left_tail_keeps_its_digits(name: str) -> None:
    z = torch.linspace(-12, 0, 500)
    out = torch.ops.ffattr.ig_slope(z.view(1, 1, -1), None, None, name, "exact", 0).flatten().double()
    reference = ig.slope(z.double(), ig.ACTIVATIONS[name])
    # The argument of the exponential has a rounding error of its own.
    known = (out / reference - 1).abs() <= (4 - reference.log()) * 4 * torch.finfo(torch.float32).eps
    assert (known | (reference < torch.finfo(torch.float32).tiny)).all()


@pytest.mark.parametrize("name", ig.ACTIVATIONS)
@pytest.mark.parametrize(("rule", "steps"), [("exact", 0), ("right", 3)])
@pytest.mark.parametrize("with_base", [False, True])
def test_nan_goes_through_and_harms_no_neighbour(name: str, rule: str, steps: int, with_base: bool) -> None:
    for streams in (1, 2):
        z = random(streams, 3, 37)
        z[0, 1, 5] = math.nan
        base = random(streams, 1, 37, seed=1) if with_base else None
        out = torch.ops.ffattr.ig_slope(z, base, None, name, rule, steps)
        assert torch.equal(out.isnan().nonzero()[:, 1:].unique(dim=0), torch.tensor([[1, 5]]))
        assert out[:, 1, 5].isnan().all()


def test_inputs_that_are_not_contiguous() -> None:
    z = random(56, 5, 2).permute(2, 1, 0)
    base = random(2, 56, 5, seed=1).transpose(1, 2)
    check(z, base, random(10, seed=2)[::2], "silu")
    check(z, base[:, ::5], None, "silu", "midpoint", 3)


def test_threads_agree() -> None:
    z = random(1, 64, 1024)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.ops.ffattr.ig_slope(z, None, None, "gelu", "right", 5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("activation", "rule", "steps", "named"),
    [
        ("swiglu", "exact", 0, "swiglu"),
        ("gelu", "simpson", 3, "simpson"),
        ("gelu", "right", 0, "right.*0"),
        ("gelu", "trapezoid", 1, "trapezoid.*1"),
        ("gelu", "right", 2**16 + 1, "at most 65536 steps, got 65537"),
        ("gelu", "midpoint", 2**40, "at most 65536 steps"),
        ("gelu", "gauss-legendre", 1025, "at most 1024 steps, got 1025"),
    ],
)
def test_bad_arguments_are_named(activation: str, rule: str, steps: int, named: str) -> None:
    with pytest.raises((RuntimeError, ValueError, KeyError), match=named):
        torch.ops.ffattr.ig_slope(torch.ones(1, 2, 3), None, None, activation, rule, steps)


@pytest.mark.parametrize("streams", [1, 2])
def test_opcheck(streams: int) -> None:
    z, base, scale = random(streams, 3, 8), random(streams, 1, 8, seed=1), random(3, seed=2)
    operator = torch.ops.ffattr.ig_slope.default
    torch.library.opcheck(operator, (z, None, None, "gelu", "exact", 0))
    torch.library.opcheck(operator, (z, base, scale, "silu", "right", 4))
