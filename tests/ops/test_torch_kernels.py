"""What `ffattr.ops.torch_kernels` has beyond the C++ kernels: half types and float8 for the wide operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import OPERATORS, WIDE, case, converted, needs_binary
from torch import Tensor

from ffattr.decomposition import integrated_gradients as ig
from ffattr.ops import torch_kernels

LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Of a norm, relative to the largest of its scope: a few roundings (2^-9 and 2^-12), most of which average out."""
NARROW = ("features", "slope", "down", "residual", "values", "maps", "own")


def narrowed(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if name in NARROW else value for name, value in given.items()}


def compute(operator: str, given: dict[str, Any]) -> Tensor:
    out: Tensor = getattr(torch_kernels, operator)(*given.values())
    return out


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("operator", WIDE)
def test_half_types(operator: str, streams: int, dtype: torch.dtype, wide: torch.dtype) -> None:
    for tail in ("none", "all"):
        given = narrowed(case(operator, 9, 21, streams=streams, tail=tail, dtype=wide), dtype)
        out, expected = compute(operator, given), compute(operator, converted(given, torch.float64))
        assert out.dtype == wide
        assert ((out - expected).abs() <= LIMITS[dtype] * expected.amax((-1, -2), keepdim=True)).all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("operator", WIDE)
def test_tiny_weights_keep_their_digits(operator: str, dtype: torch.dtype) -> None:
    """Of any size, within one map: 1e-9 is below the least float16."""
    given = narrowed(case(operator, 9, 21), dtype)
    given["position"] = torch.full((9,), -1)
    given["alpha"] *= 10.0 ** -torch.arange(9)[:, None] * 1e-9
    out, expected = compute(operator, given), compute(operator, converted(given, torch.float64))
    assert ((out / expected - 1).abs() <= 4 * LIMITS[dtype]).all()  # of every pair, not only of the largest


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("operator", WIDE)
def test_zero_and_nan(operator: str, dtype: torch.dtype) -> None:
    given = narrowed(case(operator, 6, 40), dtype)
    given["position"] = torch.arange(6)
    given["alpha"][:, :, 7:9] = 0
    given["alpha"][2, 4, 9] = torch.nan
    out = compute(operator, given)
    assert (out[:, :, 7:9] == 0).all()
    assert all(torch.equal(scope.isnan().nonzero(), torch.tensor([[4, 9]])) for scope in out)


@pytest.mark.parametrize("dtype", [*LIMITS, torch.float32])
@pytest.mark.parametrize("depth", range(1, 10))
def test_a_nan_stays_in_its_row(depth: int, dtype: torch.dtype) -> None:
    """Whatever the number of terms, and also of many products at once: a library may read them two at a time."""
    for batch in ((), (3,)):
        a, b = torch.ones(*batch, 64, depth, dtype=dtype), torch.ones(*batch, depth, 32, dtype=dtype)
        a[..., 33, :] = torch.nan
        a[..., 50, 0] = torch.inf
        out = torch_kernels.multiply_matrices(a, b)
        assert out[..., 33, :].isnan().all()
        assert (out[..., 50, :] == torch.inf).all()
        rest = [row for row in range(64) if row not in (33, 50)]
        assert (out[..., rest, :] == depth).all()


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("streams", [1, 2])
def test_float8(streams: int, wide: torch.dtype) -> None:
    given = narrowed(case("ff_norms", 9, 21, streams=streams, dtype=wide), torch.bfloat16)
    given["down"] = given["down"].to(torch.float8_e4m3fn)
    scale = given["down_scale"] = torch.rand(40, dtype=wide, generator=torch.manual_seed(1)) + 0.5
    exact = converted(given, torch.float64)
    exact |= {"down": exact["down"] * scale.double(), "down_scale": None}
    out, expected = compute("ff_norms", given), compute("ff_norms", exact)
    assert out.dtype == wide
    assert ((out - expected).abs() <= LIMITS[torch.bfloat16] * expected.amax((-1, -2), keepdim=True)).all()
    sequences = torch.tensor([[0, 0], [4, 21], [9, 42]])
    twice = {**given, "sequences": sequences}
    for name, axis in (("features", 1), ("residual", 0)):
        twice[name] = torch.cat([given[name]] * 2, axis)
    torch.testing.assert_close(compute("ff_norms", twice), out, rtol=1e-5, atol=0)


@needs_binary
def test_kernels_refuse_float8() -> None:
    given = case("ff_norms")
    given["down_scale"] = torch.ones(40)
    message = "ff_norms: down_scale belongs to float8, which the CPU kernels do not have"
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.ff_norms(*given.values())


@needs_binary
@pytest.mark.parametrize("operator", WIDE)
def test_kernels_refuse_float16(operator: str) -> None:
    with pytest.raises(RuntimeError, match=f"{operator}: residual has dtype float16, expected float32"):
        getattr(OPERATORS, operator)(*narrowed(case(operator), torch.float16).values())


@needs_binary
@pytest.mark.parametrize("operator", WIDE)
def test_kernels_take_bfloat16(operator: str) -> None:
    """On any processor: one that multiplies it by nothing has the instructions written out."""
    given = narrowed(case(operator, streams=2), torch.bfloat16)
    out = getattr(OPERATORS, operator)(*given.values())
    expected = getattr(torch_kernels, operator)(*converted(given, torch.float64).values())
    assert out.dtype == torch.float32
    assert ((out - expected).abs() <= LIMITS[torch.bfloat16] * expected.amax((-1, -2), keepdim=True)).all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("streams", [1, 2])
def test_slopes_of_half_types(streams: int, dtype: torch.dtype) -> None:
    z = (4 * torch.randn(streams, 5, 56, generator=torch.manual_seed(0))).to(dtype)
    base, scale = z.roll(1, -1)[:, :1], torch.linspace(0.5, 2, 5)
    for start in (None, base):
        for row_scale in (None, scale, scale.to(dtype)):
            out = torch_kernels.ig_slope(z, start, row_scale, "gelu", "exact", 0)
            assert out.dtype == dtype
            expected = ig.slopes(
                z.double(), ig.ACTIVATIONS["gelu"], "exact", 0, None if start is None else start.double()
            )
            if row_scale is not None:
                expected *= row_scale.double()[:, None]
            # Two roundings: of the factor, and of its product with the scale.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(out.double(), expected, rtol=eps, atol=2e-5)
