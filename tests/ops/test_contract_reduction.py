"""``reduction`` of both wide operators on the CPU: against the definition, materialised in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_cases import (
    FLOAT32_LIMIT,
    OPERATORS,
    WIDE,
    WIDE_OPERANDS,
    batch,
    case,
    check,
    converted,
    define_reduction,
    largest_norms,
    narrow,
    needs_binary,
)

from ffattr.ops import availability, torch_kernels

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

REDUCTIONS = ("l1", "alti")


@pytest.mark.parametrize("tail", ["none", "scale", "norm", "gamma", "rms", "all"])
@pytest.mark.parametrize("reduction", ["l2", *REDUCTIONS])
@pytest.mark.parametrize("operator", WIDE)
def test_plain_pytorch_is_the_definition(operator: str, reduction: str, tail: str) -> None:
    for streams in (1, 2):
        given = case(operator, 9, 21, streams=streams, tail=tail, dtype=torch.float64, reduction=reduction)
        found = getattr(torch_kernels, operator)(*given.values())
        expected = define_reduction(operator, given)
        size = largest_norms(operator, given, expected)
        assert ((found - expected).abs() <= 1e-13 * size).all()
        if reduction == "alti":
            assert 0.2 < (expected > 0).double().mean() < 0.9  # some point away from the whole


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 33), (33, 5), (33, 33)])
@pytest.mark.parametrize(("width", "neurons"), [(40, 56), (72, 200), (1, 300), (257, 1), (500, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_odd_sizes(operator: str, reduction: str, width: int, neurons: int, queries: int, keys: int) -> None:
    for streams, dtype in itertools.product((1, 2), (torch.float32, torch.float64)):
        check(
            operator, case(operator, queries, keys, width, neurons, streams=streams, dtype=dtype, reduction=reduction)
        )


@pytest.mark.parametrize("tail", ["none", "scale", "norm", "gamma", "rms", "all"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_optional_arguments(operator: str, reduction: str, tail: str) -> None:
    for dtype in (torch.float32, torch.float64):
        given = case(operator, 9, 21, tail=tail, dtype=dtype, reduction=reduction)
        assert check(operator, given).shape == (3 if tail in ("norm", "gamma", "rms", "all") else 2, 9, 21)


@pytest.mark.parametrize("heads", [1, 17, 390])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_heads(operator: str, reduction: str, heads: int) -> None:
    check(operator, case(operator, 7, 3, 24, 40, heads, 1, reduction=reduction))


@pytest.mark.parametrize("density", [0.1, 0.6])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_neurons_without_a_slope(operator: str, reduction: str, density: float) -> None:
    check(operator, case(operator, 20, 33, 72, 200, density=density, reduction=reduction))


@pytest.mark.parametrize("tail", ["none", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["l2", *REDUCTIONS])
def test_no_neurons(reduction: str, dtype: torch.dtype, tail: str) -> None:
    """The feed-forward row is zero, and what is added to it is all there is."""
    given = case("ff_norms", 13, 40, 72, 0, streams=2, dtype=dtype, tail=tail, reduction=reduction)
    found = check("ff_norms", given)
    assert (found[0] == 0).all()
    expected = define_reduction("ff_norms", given)
    size = largest_norms("ff_norms", given, expected).clamp_min(1e-300)
    assert ((found - expected).abs() <= (1e-5 if dtype == torch.float32 else 1e-13) * size).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_pairs_without_weight_are_exactly_zero(operator: str, reduction: str) -> None:
    given = case(operator, 33, 33, reduction=reduction)
    given["alpha"] = given["alpha"].tril()
    given["alpha"][:, 7] = 0
    given["position"] = torch.arange(33)
    found = check(operator, given)
    seen = torch.ones(33, 33).tril().bool()
    seen[7, :7] = False
    assert (found[:, ~seen] == 0).all()
    assert (found[:, seen] > 0).any(-1).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_nan_stays_in_its_pair(operator: str, reduction: str) -> None:
    given = case(operator, 6, 40, reduction=reduction)
    given["position"] = torch.arange(6)
    given["alpha"][2, 4, 9] = torch.nan
    given["alpha"][0, 1, 1] = torch.nan
    for function in (getattr(OPERATORS, operator), getattr(torch_kernels, operator)):
        found = function(*given.values())
        assert all(torch.equal(scope.isnan().nonzero(), torch.tensor([[1, 1], [4, 9]])) for scope in found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_sequences(operator: str, reduction: str) -> None:
    sizes = [(1, 1), (3, 33), (0, 7), (5, 5), (2, 0), (12, 40)]
    single, joined = batch(operator, sizes, reduction=reduction)
    found, start = getattr(OPERATORS, operator)(*joined.values()), 0
    for given, (queries, keys) in zip(single, sizes, strict=True):
        rows = found[:, start : start + queries]
        expected = getattr(OPERATORS, operator)(*given.values())
        if expected.numel():
            far = (rows[..., :keys] - expected).abs() / largest_norms(operator, given, expected)
            assert far.max() <= FLOAT32_LIMIT
        assert (rows[..., keys:] == 0).all()
        start += queries


@pytest.mark.skipif(not availability.describe_product("cpu", torch.bfloat16), reason="no unit multiplies bfloat16 here")
@pytest.mark.parametrize("names", [WIDE_OPERANDS, ("down",)], ids=["all", "down"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e12])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_bfloat16_with_weights_of_any_size(operator: str, reduction: str, scale: float, names: tuple[str, ...]) -> None:
    """Rows are divided by their largest weight before they are rounded, and have to be as large as the whole again."""
    given = case(operator, 9, 33, 96, 301, reduction=reduction)
    given["alpha"] *= scale
    given["position"] += 100
    if reduction == "alti":
        given["totals"] *= scale
    given = narrow(given, names)
    expected = getattr(torch_kernels, operator)(*converted(given, torch.float64).values())
    size = largest_norms(operator, given, expected)
    for function in (getattr(OPERATORS, operator), getattr(torch_kernels, operator)):
        assert ((function(*given.values()) - expected).abs() <= 5e-3 * size).all()


# ---- errors

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"reduction": "l3"}, "reduction is 'l3', expected one of 'l2', 'l1', 'alti'"),
    ({"reduction": "alti", "totals": None}, "reduction is 'alti' without totals, which go with 'alti' alone"),
    ({"reduction": "l1"}, "reduction is 'l1' with totals, which go with 'alti' alone"),
    ({"totals": torch.zeros(2, 5, 40)}, r"totals has shape \[2, 5, 40\].*expected.*\[3, 5, 40\]"),
    ({"totals": torch.zeros(3, 5, 40, dtype=torch.float64)}, r"totals has .*float64.*expected.*float32"),
]


@needs_binary
@pytest.mark.parametrize(("changed", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
@pytest.mark.parametrize("operator", WIDE)
def test_errors_name_operator_and_argument(operator: str, changed: dict[str, Any], words: str) -> None:
    given = {**case(operator, reduction="alti"), **changed}
    with pytest.raises(RuntimeError, match=f"{operator}: {words}"):
        getattr(OPERATORS, operator)(*given.values())
    with pytest.raises(ValueError, match=f"{operator}: {words}"):
        getattr(torch_kernels, operator)(*given.values())


# ---- torch.library and torch.compile


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("operator", WIDE)
def test_opcheck_and_compile(operator: str, reduction: str) -> None:
    function, given = getattr(OPERATORS, operator), case(operator, reduction=reduction)
    torch.library.opcheck(function.default, tuple(given.values()))
    compiled = torch.compile(lambda *args: function(*args) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given.values()), function(*given.values()) * 2)
