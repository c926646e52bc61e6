"""Projections that keep norms approximately, on random rows; on trained models: benchmarks/cpu/bench_sketch.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ffattr.decomposition.sketch import Sketch, fit
from ffattr.errors import NonFiniteError

WIDTH = 160


def rows(count: int, seed: int = 0, kinds: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[count, WIDTH]`` like a layer's: directions fall off slowly, differently for each of a few kinds of rows, and
    norms are of all sizes."""
    shape = torch.Generator().manual_seed(99)
    bases = torch.linalg.qr(torch.randn(kinds, WIDTH, WIDTH, generator=shape, dtype=torch.float64)).Q
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -0.6
    found = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) * spread
    kind = torch.randint(kinds, (count,), generator=generator)
    found = (found[:, None] @ bases[kind])[:, 0]
    return (found * torch.randn(count, 1, generator=generator, dtype=torch.float64).mul(2).exp()).to(dtype)


def errors(matrix: Tensor, of: Tensor) -> Tensor:
    return ((of @ matrix).norm(dim=1) / of.norm(dim=1) - 1).abs()


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return rows(2048)


@pytest.fixture(scope="module")
def others() -> Tensor:
    return rows(4096, seed=1)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"components": 1.5}, TypeError, r"components=1\.5\): expected an int, got float"),
        ({"projections": True}, TypeError, "projections=True"),
        ({"seed": "0"}, TypeError, "seed='0'"),
        ({"components": -1}, ValueError, r"components=-1\): expected 0 or more"),
        ({"projections": -2}, ValueError, "projections=-2"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808"),
        ({"components": 0, "projections": 0}, ValueError, "at least one direction"),
        ({"tolerance": 1}, TypeError, r"tolerance=1\): expected a float or None, got int"),
        ({"tolerance": 0.0}, ValueError, r"tolerance=0\.0\): expected a relative error between 0 and 1"),
        ({"tolerance": 1.0}, ValueError, r"tolerance=1\.0"),
        ({"tolerance": math.nan}, ValueError, "tolerance=nan"),
    ],
)
def test_what_no_sketch_is(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Sketch(**arguments)


@pytest.mark.parametrize("sizes", [(20, 12), (32, 0), (0, 32)])
def test_the_matrix_has_the_size_asked_for(sample: Tensor, others: Tensor, sizes: tuple[int, int]) -> None:
    found = fit(sample, Sketch(*sizes), others)
    assert found.matrix.shape == (WIDTH, 32)
    assert found.sketch == Sketch(*sizes)
    assert not found.exact
    assert errors(found.matrix, others).median() < 0.15


@pytest.mark.parametrize("sizes", [(100, 60), (WIDTH, 0), (1000, 1000)])
def test_a_sketch_as_wide_as_the_model_is_exact(sample: Tensor, others: Tensor, sizes: tuple[int, int]) -> None:
    found = fit(sample, Sketch(*sizes), others)
    assert found.exact
    assert found.error == 0
    assert torch.equal(found.matrix, torch.eye(WIDTH, dtype=torch.float64))


def test_rows_within_the_principal_directions_keep_their_norms() -> None:
    generator = torch.Generator().manual_seed(3)
    inside = torch.randn(16, WIDTH, generator=generator, dtype=torch.float64)
    few = torch.randn(600, 16, generator=generator, dtype=torch.float64) @ inside
    found = fit(few[:400], Sketch(16, 8), few[400:])
    torch.testing.assert_close((few @ found.matrix).norm(dim=1), few.norm(dim=1), rtol=1e-9, atol=0)
    assert found.error < 1e-9


def test_it_is_better_than_the_unbiased_sketch(sample: Tensor, others: Tensor) -> None:
    """The published one: the top directions of the sample, and Gaussian ones of the rest."""
    unit = sample / sample.norm(dim=1, keepdim=True)
    principal = torch.linalg.eigh(unit.T @ unit).eigenvectors[:, -32:]
    gaussian = torch.randn(WIDTH, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 32**0.5
    published = torch.cat([principal, gaussian - principal @ (principal.T @ gaussian)], 1)
    found = errors(fit(sample, Sketch(32, 32), others).matrix, others)
    assert found.median() < 0.9 * errors(published, others).median()
    assert found.quantile(0.99) < 0.9 * errors(published, others).quantile(0.99)


def test_what_principal_directions_tell_of_the_rest_is_used() -> None:
    """Rows of two kinds, each with directions of its own and a share of its norm in the rest: random directions alone
    would tell this share to a few per cent."""
    generator = torch.Generator().manual_seed(5)
    kind = torch.arange(3000) % 2
    parts = [torch.randn(3000, size, generator=generator, dtype=torch.float64) for size in (8, WIDTH - 16)]
    own, rest = (part / part.norm(dim=1, keepdim=True) for part in parts)
    share = torch.tensor([0.1, 0.5], dtype=torch.float64)[kind][:, None]
    mixed = torch.zeros(3000, WIDTH, dtype=torch.float64)
    for number in (0, 1):
        mixed[kind == number, 8 * number : 8 * number + 8] = own[kind == number]
    mixed *= (1 - share).sqrt()
    mixed[:, 16:] = rest * share.sqrt()
    assert fit(mixed[:2000], Sketch(16, 16), mixed[2000:]).error < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_that_of_other_rows(others: Tensor, seed: int) -> None:
    """With fewer rows than a quadratic form has numbers, those fitted to look much better than others."""
    few = rows(600, seed=10 + seed)
    found = fit(few[100:], Sketch(24, 24, seed=seed), few[:100])
    true = float(errors(found.matrix, others).median())
    assert true / 1.5 < found.error < 1.5 * true
    assert errors(found.matrix, few[100:]).median() < 0.75 * true


def test_rows_held_are_not_fitted_to(sample: Tensor, others: Tensor) -> None:
    first, second = fit(sample, Sketch(16, 16), others), fit(sample, Sketch(16, 16), sample[:50])
    assert torch.equal(first.matrix, second.matrix)
    assert first.error != second.error
    assert first.error == pytest.approx(float(errors(first.matrix, others).median()), rel=1e-3)


def test_a_row_counts_by_its_direction_alone(sample: Tensor, others: Tensor) -> None:
    expected = fit(sample, Sketch(16, 16), others)
    sizes = torch.logspace(-250, 250, len(sample), dtype=torch.float64)[:, None]
    scaled = fit(sample / sample.norm(dim=1, keepdim=True) * sizes, Sketch(16, 16), others * 1e-200)
    norms = [(others @ found.matrix).norm(dim=1) for found in (scaled, expected)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)  # conjugate gradients magnify rounding
    assert scaled.error == pytest.approx(expected.error, rel=1e-3)


def test_rows_of_zeros_do_not_count(sample: Tensor, others: Tensor) -> None:
    zeros = torch.zeros(300, WIDTH, dtype=torch.float64)
    found = fit(torch.cat([zeros, sample]), Sketch(16, 16), torch.cat([others, zeros, zeros]))
    expected = fit(sample, Sketch(16, 16), others)
    assert torch.equal(found.matrix, expected.matrix)
    assert found.error == expected.error


def test_without_a_row_norms_are_kept_on_average() -> None:
    zeros = torch.zeros(20, WIDTH, dtype=torch.float64)
    found = fit(zeros, Sketch(16, 48), zeros)
    assert found.error == 0
    isotropic = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float((isotropic @ found.matrix).norm(dim=1).mean() / isotropic.norm(dim=1).mean()) == pytest.approx(1, 0.02)


def test_the_seed_decides(sample: Tensor, others: Tensor) -> None:
    first, again, other = (fit(sample, Sketch(16, 16, seed=seed), others) for seed in (1, 1, 2))
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.allclose(first.matrix, other.matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_dtypes(sample: Tensor, others: Tensor, dtype: torch.dtype) -> None:
    unit = sample / sample.norm(dim=1, keepdim=True)
    found = fit(unit.to(dtype), Sketch(32, 32), others.float())
    assert found.matrix.dtype == torch.float32
    true = errors(found.matrix.double(), others).median()
    assert true < 1.1 * errors(fit(unit, Sketch(32, 32), others).matrix, others).median()
    assert found.error == pytest.approx(float(true), rel=1e-3)


def test_tolerance_takes_the_smallest_sketch_that_keeps_it(sample: Tensor, others: Tensor) -> None:
    tolerance = 1.1 * fit(sample, Sketch(48, 48), others).error
    found = fit(sample, Sketch(tolerance=tolerance), others)
    assert found.error <= tolerance
    assert found.sketch.width == found.matrix.shape[1]
    assert found.sketch.width in (64, 96)
    half = found.sketch.width // 2
    shares = [(half, half), (half + half // 2, half // 2)]
    assert found.error == min(fit(sample, Sketch(*sizes), others).error for sizes in shares)
    smaller = {64: [(16, 16), (24, 8)], 96: [(32, 32), (48, 16)]}[found.sketch.width]
    assert all(fit(sample, Sketch(*sizes), others).error > tolerance for sizes in smaller)


def test_tolerance_of_rows_that_need_few_directions() -> None:
    generator = torch.Generator().manual_seed(3)
    inside = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64)
    few = torch.randn(600, 8, generator=generator, dtype=torch.float64) @ inside
    assert fit(few[:400], Sketch(tolerance=1e-6), few[400:]).sketch.width == 32


def test_tolerance_that_no_sketch_keeps(sample: Tensor, others: Tensor) -> None:
    found = fit(sample, Sketch(tolerance=1e-4), others)
    assert found.exact
    assert found.error == 0
    assert found.sketch.components == WIDTH


def test_tolerance_never_takes_a_sketch_as_wide_as_the_model(sample: Tensor, others: Tensor) -> None:
    found = fit(sample[:, :128], Sketch(tolerance=1e-3), others[:, :128])
    assert found.exact
    assert found.sketch.components == 128


def test_directions_that_the_sample_has_are_measured_best() -> None:
    """Of rows in 40 of 160 dimensions, the 16 random directions are not spent on the other 120."""
    generator = torch.Generator().manual_seed(7)
    few = torch.zeros(3000, WIDTH, dtype=torch.float64)
    few[:, :40] = torch.randn(3000, 40, generator=generator, dtype=torch.float64)
    matrix = fit(few[:2000], Sketch(8, 16), few[2000:]).matrix
    assert matrix[:40].square().sum() > 0.4 * matrix.square().sum()


def test_directions_that_the_sample_lacks_are_measured(sample: Tensor) -> None:
    few = sample[:60]
    lacking = torch.linalg.qr(few.T, mode="complete").Q[:, 60:].T
    assert (lacking @ fit(few, Sketch(16, 16), few).matrix).norm(dim=1).mean() > 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_numbers(sample: Tensor, bad: float) -> None:
    broken = sample.clone()
    broken[7, 3] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        fit(broken, Sketch(16, 16), sample)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        fit(sample, Sketch(16, 16), broken)


def test_shapes_that_do_not_fit(sample: Tensor) -> None:
    with pytest.raises(ValueError, match=r"got \[2048, 160\] and \[2048, 159\]"):
        fit(sample, Sketch(), sample[:, 1:])
    with pytest.raises(ValueError, match=r"expected rows \[p, d\].*got \[160\] and"):
        fit(sample[0], Sketch(), sample)
