"""Operators called directly, on sizes from zero on and with what does not fit: the reference, or their own error."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hostile import examples, judge, odd
from hypothesis import strategies as st
from op_cases import MAPS, OPERATORS, WIDE, case, converted, largest_norms
from torch import Tensor

from ffattr.ops import torch_kernels

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

small = st.integers(0, 9)


@st.composite
def operands(draw: Any) -> tuple[str, dict[str, Any]]:
    operator = draw(st.sampled_from(MAPS))
    sizes = {name: draw(small) for name in ("queries", "keys", "width", "neurons", "heads", "head_dim")}
    wide = {}
    if operator in WIDE:
        wide = {"streams": draw(st.sampled_from([1, 2])), "reduction": draw(st.sampled_from(["l2", "l1", "alti"]))}
    tail = draw(st.sampled_from(["none", "scale", "norm", "gamma", "rms", "all"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return operator, case(operator, tail=tail, dtype=dtype, seed=draw(st.integers(0, 99)), **sizes, **wide)


def is_right(operator: str, given: dict[str, Any], out: Tensor) -> bool:
    if any(isinstance(one, Tensor) and one.is_meta for one in (out, *given.values())):
        return True  # of which there are shapes and no numbers
    expected = getattr(torch_kernels, operator)(*converted(given, torch.float64).values())
    size = largest_norms(operator, given, expected)
    limit = 3e-5 if out.dtype == torch.float32 else 1e-13
    return out.shape == expected.shape and bool(((out.double() - expected).abs() <= limit * size + 1e-30).all())


@hypothesis.given(operands())
@examples(150)
def test_sizes_from_zero_on(drawn: tuple[str, dict[str, Any]]) -> None:
    operator, given = drawn
    judge(
        "operators", lambda: getattr(OPERATORS, operator)(*given.values()), lambda out: is_right(operator, given, out)
    )


def spoil(tensor: Tensor, how: str) -> Any:
    changes = {
        "longer": lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor[None],
        "another axis": lambda: tensor[None],
        "no axis": lambda: tensor.flatten(),
        "half": lambda: tensor.half(),
        "integers": lambda: tensor.int(),
        "sparse": lambda: tensor.to_sparse(),
        "meta": lambda: tensor.to("meta"),
        "complex": lambda: tensor.to(torch.complex64),
        "strided": lambda: tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() else tensor,
        "expanded": lambda: tensor[:1].expand_as(tensor) if tensor.dim() and len(tensor) else tensor,
        "far": lambda: tensor - 2**63 + 2**40 if tensor.dtype == torch.int64 else tensor,
    }
    return changes[how]()


HOW = (
    "longer",
    "another axis",
    "no axis",
    "half",
    "integers",
    "sparse",
    "meta",
    "complex",
    "strided",
    "expanded",
    "far",
)


@hypothesis.given(operands(), st.integers(0, 20), st.one_of(st.sampled_from(HOW), odd))
@examples(150)
def test_an_argument_that_does_not_fit(drawn: tuple[str, dict[str, Any]], which: int, how: Any) -> None:
    operator, given = drawn
    name = list(given)[which % len(given)]
    if how is None and given[name] is not None:
        return  # torch itself hands on what it takes for a tensor of no type
    if isinstance(how, str) and how in HOW and isinstance(given[name], Tensor):
        changed = {**given, name: spoil(given[name], how)}
    else:
        changed = {**given, name: how}
    fits = all(isinstance(one, (Tensor, type(None), bool, str)) for one in changed.values())
    judge(
        "operators",
        lambda: getattr(OPERATORS, operator)(*changed.values()),
        lambda out: not fits or is_right(operator, changed, out),
    )
