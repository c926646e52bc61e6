"""Arguments of the wide kernels: refused by name, or made contiguous."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

arguments = pytest.importorskip("ffattr.ops.triton.arguments")

NAMES = ("alpha", "position", "residual", "residual_scale", "gamma", "norm_scale")
HEADS, QUERIES, COLUMNS, KEYS, WIDTH = 3, 4, 5, 6, 8


def given(**changed: Any) -> list[Any]:
    made: dict[str, Any] = {
        "alpha": torch.rand(HEADS, QUERIES, COLUMNS),
        "position": torch.arange(QUERIES),
        "residual": torch.rand(KEYS, HEADS + 1, WIDTH),
        "residual_scale": torch.rand(QUERIES),
        "gamma": torch.rand(WIDTH),
        "norm_scale": torch.rand(QUERIES),
    }
    assert made.keys() == set(NAMES)
    return list({**made, **changed}.values())


@pytest.mark.parametrize("wide", arguments.WIDE)
def test_sizes_are_read_off_the_tensors(wide: torch.dtype) -> None:
    """There may be fewer columns than keys, of several sequences."""
    found = arguments.WideArguments.from_tensors("op", *given(residual=torch.rand(KEYS, HEADS + 1, WIDTH).to(wide)))
    sizes = (found.heads, found.queries, found.columns, found.keys, found.width)
    assert sizes == (HEADS, QUERIES, COLUMNS, KEYS, WIDTH)
    assert found.wide == wide


def test_operands_are_contiguous_and_no_other_numbers() -> None:
    slanted = given(
        alpha=torch.rand(COLUMNS, QUERIES, HEADS).permute(2, 1, 0),
        residual=torch.rand(WIDTH, HEADS + 1, KEYS).permute(2, 1, 0),
        gamma=torch.rand(2 * WIDTH)[::2],
    )
    found = arguments.WideArguments.from_tensors("op", *slanted)
    for name, before in zip(NAMES, slanted, strict=True):
        after = getattr(found, name)
        assert after.is_contiguous()
        assert torch.equal(after, before)
    assert found.position is slanted[1]  # what is contiguous is not copied


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"alpha": torch.rand(4, 5)}, r"op: alpha has shape \[4, 5\], expected \[H, N, M\]"),
        ({"residual": torch.rand(6, 8)}, r"residual \[6, 8\], expected \[K, H \+ 1, d\]"),
        ({"residual": torch.rand(6, 4, 8).double()}, r"residual has dtype torch.float64, .*backend=\"torch\""),
        ({"residual": torch.rand(6, 3, 8)}, r"op: residual has shape \[6, 3, 8\], expected \[6, 4, 8\]"),
        ({"alpha": torch.rand(3, 4, 5).half()}, "op: alpha has dtype torch.float16, expected torch.float32"),
        ({"alpha": torch.rand(129, 4, 5)}, "op: alpha has 129 heads, expected at most 128"),
        ({"position": torch.arange(4).int()}, "op: position has dtype torch.int32, expected torch.int64"),
        ({"position": torch.arange(5)}, r"op: position has shape \[5\], expected \[4\]"),
        ({"residual_scale": torch.rand(5)}, r"op: residual_scale has shape \[5\], expected \[4\]"),
        ({"gamma": torch.rand(8).bfloat16()}, "op: gamma has dtype torch.bfloat16, expected torch.float32"),
        ({"norm_scale": torch.rand(4, 1)}, r"op: norm_scale has shape \[4, 1\], expected \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        arguments.WideArguments.from_tensors("op", *given(**changed))


def test_what_is_left_out_is_not_checked() -> None:
    found = arguments.WideArguments.from_tensors("op", *given(residual_scale=None, gamma=None, norm_scale=None))
    assert (found.residual_scale, found.gamma, found.norm_scale) == (None, None, None)
    arguments.check_argument("op", "gamma", None, (3,), torch.float32)


@pytest.mark.parametrize(("norm_scale", "scopes"), [(None, 2), (torch.rand(QUERIES), 3)])
def test_the_output_begins_as_zeros(norm_scale: Tensor | None, scopes: int) -> None:
    out = arguments.WideArguments.from_tensors("op", *given(norm_scale=norm_scale)).allocate_output()
    assert out.shape == (scopes, QUERIES, COLUMNS)
    assert out.dtype == torch.float32
    assert not out.any()
