"""Tiles of matrices, by tiny kernels: what lies beyond a matrix reads as zero, and products keep their digits."""

from __future__ import annotations

import pytest
import torch
from guards import DEVICE, Guards
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
tiles = pytest.importorskip("ffattr.ops.triton.tiles")
INTERPRETED = pytest.importorskip("ffattr.ops.triton.runtime").INTERPRETED
add_product, load_rows, load_slab, scale_tile = tiles.add_product, tiles.load_rows, tiles.load_slab, tiles.scale_tile

pytestmark = pytest.mark.usefixtures("poisoned", "rounded_as_on_gpus")

TMA = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            not INTERPRETED and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no TMA"
        ),
    ),
]


@triton.jit
def rows_kernel(source, out, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    tile = load_rows(source, row, column, rows, columns, ROWS, COLUMNS, TMA)
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], tile)


@triton.jit
def slab_kernel(
    source, out, column, heads, columns, pitch, HEADS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    tile = load_slab(source, tl.program_id(0), column, heads, columns, pitch, HEADS, COLUMNS, TMA)
    at = (tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + at, tile)


@triton.jit
def product_kernel(a, b, accumulator, factor, out, scaled, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    left, right = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, add_product(left, right, tl.load(accumulator + at), PRECISION))
    tl.store(scaled + at, scale_tile(tl.load(accumulator + at), tl.load(factor + at)))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tma", TMA)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (16, 16), (16, 32), (32, 0)])
def test_rows_and_columns_beyond_a_matrix_are_zero(row: int, column: int, tma: bool) -> None:
    """Of 20 rows and 24 columns, in tiles of 16 by 16."""
    guards = Guards()
    given = numbers(20, 24)
    source = guards.copy(given)
    assert source is not None
    out = torch.empty(16, 16, device=DEVICE)
    assert tiles.tma_fits(source) or not tma
    rows_kernel[(1,)](tiles.describe_matrix(source, [16, 16], tma), out, row, column, 20, 24, 16, 16, tma)
    whole = torch.zeros(64, 64)
    whole[:20, :24] = given
    assert torch.equal(out.cpu(), whole[row : row + 16, column : column + 16])
    guards.check()


@pytest.mark.parametrize("tma", TMA)
def test_a_slab_is_its_first_rows_alone(tma: bool) -> None:
    """Of three slabs of six rows, the first five; the sixth, as where a residual lies, is not read."""
    given = numbers(3, 6, 24)
    given[:, 5] = torch.nan
    source = given.to(DEVICE)
    out = torch.empty(3, 16, 16, device=DEVICE)
    slab_kernel[(3,)](tiles.describe_matrix(source[:, :5], [1, 16, 16], tma), out, 16, 5, 24, 6 * 24, 16, 16, tma)
    assert torch.equal(out[:, :5, :8].cpu(), given[:, :5, 16:])
    assert not out[:, 5:].any()
    assert not out[:, :, 8:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_added_to_what_there_is(dtype: torch.dtype) -> None:
    size = 32
    a, b, factor = (numbers(size, size, seed=seed).to(dtype) for seed in range(3))
    accumulator = numbers(size, size, seed=3)
    out, scaled = torch.empty(size, size, device=DEVICE), torch.empty(size, size, device=DEVICE)
    arguments = [part.to(DEVICE) for part in (a, b, accumulator, factor)]
    product_kernel[(1,)](*arguments, out, scaled, size, tiles.product_precision(dtype))
    expected = accumulator.double() + a.double() @ b.double()  # of halves, too: their products are exact in float32
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=2e-5)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        scaled.double().cpu(), accumulator.double() * factor.double(), rtol=1.01 * rounding, atol=1e-6 * rounding
    )


def test_what_tma_can_read() -> None:
    """Rows and their beginning on 16 bytes, next to each other in a row."""
    given = torch.zeros(4, 8, 16)
    assert tiles.tma_fits(given)
    assert tiles.tma_fits(given[:, :5], given.half(), given[:, :, 4:])
    assert not tiles.tma_fits(given[:, :, 1:])  # begins in between
    assert not tiles.tma_fits(torch.zeros(4, 15))  # so do its rows
    assert not tiles.tma_fits(given.half()[:, :, :4].contiguous())
    assert not tiles.tma_fits(torch.zeros(8, 16).T)
    assert not tiles.tma_fits(given, torch.zeros(4, 15))


def test_descriptors_only_with_tma() -> None:
    given = torch.zeros(32, 16)
    assert tiles.describe_matrix(given, [16, 16], False) is given
    described = tiles.describe_matrix(given, [16, 8], True)
    assert (described.base is given, described.block_shape) == (True, [16, 8])


def test_precision_of_products() -> None:
    assert tiles.product_precision(torch.float32) == "tf32x3"
    assert tiles.product_precision(torch.bfloat16) != "tf32x3"
