"""What the precision asked for means for each operand."""

from __future__ import annotations

import pytest
import torch

from ffattr.decomposition.precision import are_finite, operand_dtype, output_tolerance, quantised, result_dtype


def test_result_and_operands() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        assert result_dtype(dtype) == torch.float32
    assert result_dtype(torch.float64) == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert operand_dtype(dtype) == dtype
    assert operand_dtype(torch.float8_e4m3fn) == torch.bfloat16


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_quantised(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 7, generator=generator) * torch.logspace(-4, 4, 7) * size
    matrix[:, 3] = 0
    narrow, scale = quantised(matrix)
    assert (narrow.dtype, narrow.shape, scale.dtype, scale.shape) == (
        torch.float8_e4m3fn,
        (300, 7),
        torch.float32,
        (7,),
    )
    back = narrow.float() * scale
    assert (back[:, 3] == 0).all()
    largest = matrix.abs().amax(0)
    assert (back.abs().amax(0) == largest).all() or torch.allclose(back.abs().amax(0), largest, rtol=1e-6)
    # Three bits after the leading one: off by a sixteenth at most, or by half a step of what is too small for that.
    bound = torch.maximum(matrix.abs() / 16, largest * 2.0**-10 / 448)
    assert ((back - matrix).abs() <= bound * (1 + 1e-5)).all()


def test_tolerance_of_an_output_is_that_of_the_coarser_side() -> None:
    double, single, half = torch.float64, torch.float32, torch.bfloat16
    assert output_tolerance(double, double, rounds_to_float32=False) == 1e-9
    assert output_tolerance(double, double, rounds_to_float32=True) == 1e-6
    assert (
        output_tolerance(double, single, rounds_to_float32=True)
        == output_tolerance(single, double, rounds_to_float32=False)
        == 2e-5
    )
    assert output_tolerance(half, single, rounds_to_float32=False) == 1e-1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_are_finite(dtype: torch.dtype) -> None:
    numbers = torch.full((40, 50), torch.finfo(dtype).max, dtype=dtype)  # their sum is infinite
    assert are_finite(numbers)
    assert are_finite(numbers[:0])
    for value in (torch.nan, torch.inf, -torch.inf):
        numbers[7, 3] = value
        assert not are_finite(numbers)
        assert not are_finite(numbers.T)
    numbers[7, 4] = -numbers[7, 3]  # infinities that would cancel
    assert not are_finite(numbers)
