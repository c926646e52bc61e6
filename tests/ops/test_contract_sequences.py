"""The argument ``sequences`` of the maps: several sequences in one call are as many calls of one sequence."""

from __future__ import annotations

import pytest
import torch
from op_cases import COLUMNS, MAPS, OPERATORS, WRONG, batch, case, converted, table
from torch import Tensor

from ffattr.ops import torch_kernels

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

SIZES = [(1, 1), (4, 33), (0, 7), (5, 5), (2, 0), (3, 40)]
"""Queries and keys of every sequence: none, fewer queries than keys, as many, and queries without keys."""
IMPLEMENTATIONS = {"registered": OPERATORS, "torch": torch_kernels}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", ["none", "all"])
@pytest.mark.parametrize("operator", MAPS)
def test_as_one_call_for_each(operator: str, tail: str, dtype: torch.dtype, implementation: str) -> None:
    function = getattr(IMPLEMENTATIONS[implementation], operator)
    single, joined = batch(
        operator, SIZES, tail=tail, dtype=dtype, **({} if operator == "gram_norms" else {"streams": 2})
    )
    before = {name: t.clone() for name, t in joined.items() if isinstance(t, Tensor)}
    out = function(*joined.values())
    assert all(torch.equal(joined[name].nan_to_num(7), t.nan_to_num(7)) for name, t in before.items())
    assert out.dtype == dtype
    expected = torch.zeros_like(out)
    for start, (queries, keys), given in zip(joined["sequences"][:, 0].tolist(), SIZES, single, strict=False):
        expected[..., start : start + queries, :keys] = function(*given.values())
    # PyTorch may choose other kernels for memory that lies otherwise.
    limit = 0 if implementation == "registered" else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=limit, atol=limit * expected.max().item())
    assert (out[expected == 0] == 0).all()  # what no sequence reaches


@pytest.mark.parametrize("operator", MAPS)
def test_registered_against_float64(operator: str) -> None:
    _, joined = batch(operator, SIZES, heads=12)
    expected = getattr(torch_kernels, operator)(*converted(joined, torch.float64).values())
    out = getattr(OPERATORS, operator)(*joined.values())
    assert ((out - expected).abs() <= 3e-6 * expected.amax((-1, -2), keepdim=True)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("operator", MAPS)
def test_one_sequence_and_none(operator: str, implementation: str) -> None:
    function = getattr(IMPLEMENTATIONS[implementation], operator)
    given = case(operator, 4, 9)
    expected = function(*given.values())
    assert torch.equal(function(*given.values(), None), expected)
    assert torch.equal(function(*given.values(), table([(4, 9)])), expected)
    # Sequences that are not contiguous, and none at all.
    assert torch.equal(function(*given.values(), table([(4, 9)]).T.contiguous().T), expected)
    nothing = batch(operator, [(0, 0)])[1]
    assert function(*{**nothing, "sequences": table([])[:1]}.values()).shape[-2:] == (0, COLUMNS)


@pytest.mark.parametrize("operator", MAPS)
def test_chunks_of_queries(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, joined = batch(operator, SIZES, dtype=torch.float64)
    expected = getattr(torch_kernels, operator)(*joined.values())
    monkeypatch.setattr(torch_kernels, "CHUNK", 1)  # one query at a time
    torch.testing.assert_close(getattr(torch_kernels, operator)(*joined.values()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("operator", MAPS)
def test_errors(operator: str, wrong: str, implementation: str) -> None:
    given, (sequences, message) = case(operator), WRONG[wrong]
    given["alpha"] = given["alpha"][..., :3]
    with pytest.raises((RuntimeError, ValueError), match=f"{operator}: sequences .*{message}"):
        getattr(IMPLEMENTATIONS[implementation], operator)(*given.values(), sequences)


@pytest.mark.parametrize("operator", MAPS)
def test_errors_of_plain_pytorch(operator: str) -> None:
    given, function = case(operator), getattr(torch_kernels, operator)
    with pytest.raises(ValueError, match=f"{operator}: sequences is torch.int64 on meta, expected.* on the CPU"):
        function(*given.values(), table([(5, 5)]).to("meta"))
    given["alpha"] = given["alpha"][..., :3]
    with pytest.raises(ValueError, match=f"{operator}: alpha has 3 columns, expected 5"):
        function(*given.values())


@pytest.mark.parametrize("operator", MAPS)
def test_opcheck(operator: str) -> None:
    _, joined = batch(operator, SIZES)
    # Its comparisons take no NaN for equal to itself; the padding is tested above.
    joined["alpha"] = joined["alpha"].nan_to_num(1)
    torch.library.opcheck(getattr(OPERATORS, operator).default, tuple(joined.values()))


@pytest.mark.parametrize("operator", MAPS)
def test_compiles_without_a_break(operator: str) -> None:
    torch.compiler.reset()  # every operator's is the same code, whose recompilations are counted together
    function = getattr(OPERATORS, operator)
    compiled = torch.compile(lambda *args, **named: function(*args, **named) * 2, fullgraph=True, backend="eager")
    for tail in ("none", "all"):
        _, joined = batch(operator, SIZES, tail=tail)
        expected = function(*joined.values()) * 2
        assert torch.equal(compiled(*joined.values()), expected)
        sequences = joined.pop("sequences")
        assert torch.equal(compiled(*joined.values(), sequences=sequences), expected)
