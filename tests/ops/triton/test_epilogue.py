"""From blocks of rows to norms, by one tiny kernel, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from guards import Guards
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
epilogue = pytest.importorskip("ffattr.ops.triton.epilogue")
column_sums, store_norms = epilogue.column_sums, epilogue.store_norms

pytestmark = pytest.mark.usefixtures("poisoned")

ROWS, COLUMNS, WIDTH = 8, 16, 40  # the last block of columns is half full


@triton.jit
def norms_kernel(
    alone,  # o [ROWS, width]
    added,  # o + r
    gamma,
    size,
    after_size,
    out,  # [2 or 3, ROWS]
    rows,
    width,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.arange(0, ROWS)
    squares = tl.zeros([ROWS], tl.float32)
    total_squares, total, weighted_squares, weighted = squares, squares, squares, squares
    gamma_squares = 0.0
    for start in range(0, width, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        at, inside = r[:, None] * width + c[None, :], (c < width)[None, :]
        o = tl.load(alone + at, mask=inside, other=0.0)
        squares += tl.sum(o * o, 1)
        s0, s1, s2, s3, s4 = column_sums(tl.load(added + at, mask=inside, other=0.0), gamma, start, width, COLUMNS)
        total_squares += s0
        total += s1
        weighted_squares += s2
        weighted += s3
        gamma_squares += s4
    after = None
    if after_size is not None:
        after = tl.load(after_size + r)
    store_norms(
        out + r,
        rows,
        r < rows,
        tl.load(size + r),
        2 * tl.load(size + r),
        after,
        squares,
        total_squares,
        total,
        weighted_squares,
        weighted,
        gamma_squares,
        width,
        CENTRE,
    )


def run(
    alone: Tensor, added: Tensor, gamma: Tensor | None, after_size: Tensor | None, centre: bool, rows: int = ROWS
) -> Tensor:
    """Sizes are 1, 2, ... of ``o``, and twice as large of ``o + r``; the first ``rows`` rows alone are live."""
    guards = Guards()
    size = torch.arange(1.0, ROWS + 1)
    given = [guards.copy(part) for part in (alone, added, gamma, size, after_size)]
    out = guards.empty((2 if after_size is None else 3, rows), torch.float32)
    norms_kernel[(1,)](*given, out, rows, alone.shape[1], centre, ROWS, COLUMNS)
    guards.check(out)
    return out.double().cpu()


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("rows", [ROWS, 5])
def test_norms_of_every_scope(rows: int, centre: bool, with_gamma: bool) -> None:
    alone, added = numbers(ROWS, WIDTH, seed=0), numbers(ROWS, WIDTH, seed=1) + 0.5
    gamma = numbers(WIDTH, seed=2) if with_gamma else None
    after_size = torch.linspace(0.5, 4, ROWS)
    found = run(alone, added, gamma, after_size, centre, rows)
    size, t = torch.arange(1.0, ROWS + 1).double(), added.double()
    normed = t - t.mean(1, keepdim=True) if centre else t
    normed = normed if gamma is None else normed * gamma
    expected = torch.stack(
        [
            alone.double().norm(dim=1) * size,
            t.norm(dim=1) * 2 * size,
            normed.norm(dim=1) * after_size,
        ]
    )
    torch.testing.assert_close(found, expected[:, :rows], rtol=3e-6, atol=0)


@pytest.mark.parametrize("centre", [False, True])
def test_without_a_norm_behind_it_two_scopes_are_written(centre: bool) -> None:
    alone, added = numbers(ROWS, WIDTH, seed=0), numbers(ROWS, WIDTH, seed=1)
    found = run(alone, added, None, None, centre)
    assert found.shape == (2, ROWS)
    torch.testing.assert_close(found[1], added.double().norm(dim=1) * 2 * torch.arange(1, ROWS + 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_gamma", [False, True])
def test_rows_that_centring_leaves_nothing_of_are_no_nan(with_gamma: bool) -> None:
    """Rounding leaves squares of either sign."""
    added = (torch.arange(ROWS) * 0.37 + 0.1)[:, None].expand(-1, WIDTH).contiguous()
    gamma = numbers(WIDTH, seed=2) if with_gamma else None
    found = run(added, added, gamma, torch.ones(ROWS), centre=True)
    assert (found[2] <= 1e-3 * added.double().norm(dim=1)).all()  # the root of one rounding error of the square


def test_a_nan_stays_in_its_row() -> None:
    alone, added = numbers(ROWS, WIDTH, seed=0), numbers(ROWS, WIDTH, seed=1)
    added[2, 39] = torch.nan
    alone[5, 0] = torch.nan
    found = run(alone, added, numbers(WIDTH, seed=2), torch.ones(ROWS), centre=True)
    assert [row.isnan().nonzero()[:, 0].tolist() for row in found] == [[5], [2], [2]]
