"""The operator method with its heads mixed first: what ``ff_norms`` gives for the same features and projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import FLOAT32_LIMIT, OPERATORS, batch, case, converted, needs_binary
from torch import Tensor

from ffattr.ops import mixed_operator, torch_kernels
from ffattr.ops.contract import Epilogue
from ffattr.ops.mixed_operator import mixed_operator_norms

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

WIDTH, NEURONS = 12, 56  # of what the block reads, and of the block
IMPLEMENTATIONS = [
    pytest.param(OPERATORS, id="registered", marks=needs_binary),
    pytest.param(torch_kernels, id="torch"),
]
SIZES = [(1, 1), (3, 33), (0, 7), (5, 5), (2, 0)]


def projections(streams: int, dtype: torch.dtype) -> list[Tensor]:
    drawn = torch.randn(streams, WIDTH, NEURONS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return list(drawn.to(dtype))


def narrow(given: dict[str, Any], streams: int) -> dict[str, Any]:
    """The case with features ``[K, H + 1, D]`` of one stream, before the projections."""
    return {**given, "features": given["features"][0, ..., :WIDTH].contiguous(), "streams": streams}


def mixed(operators: Any, given: dict[str, Any]) -> Tensor:
    tail = [given[name] for name in ("residual", "residual_scale", "gamma", "norm_scale", "centre")]
    epilogue, made = Epilogue(*tail, given.get("sequences")), projections(given["streams"], given["features"].dtype)
    shared = given["features"], made, given["slope"], given["down"]
    return mixed_operator_norms(operators, given["alpha"], given["position"], *shared, epilogue)


def direct(given: dict[str, Any]) -> Tensor:
    """The same vectors by the direct method, in float64: what is projected before it is mixed."""
    exact = converted(given, torch.float64)
    features = torch.stack([exact["features"] @ part for part in projections(given["streams"], torch.float64)])
    del exact["streams"]
    out: Tensor = torch_kernels.ff_norms(**{**exact, "features": features})
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1, 0.6, 0.3, 0])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("operators", IMPLEMENTATIONS)
def test_as_the_direct_method(operators: Any, streams: int, density: float, dtype: torch.dtype) -> None:
    for tail in ("none", "scale", "rms", "all"):
        given = narrow(case("ff_norms", 6, 33, streams=streams, dtype=dtype, tail=tail, density=density), streams)
        before = {name: t.clone() for name, t in given.items() if isinstance(t, Tensor)}
        out, expected = mixed(operators, given), direct(given)
        assert all(torch.equal(given[name], t) for name, t in before.items())
        assert out.dtype == dtype
        limit = FLOAT32_LIMIT if dtype == torch.float32 else 1e-14
        assert ((out - expected).abs() <= limit * expected.amax((-1, -2), keepdim=True)).all()


@pytest.mark.parametrize("operators", IMPLEMENTATIONS)
def test_sequences_are_calls_of_their_own(operators: Any) -> None:
    single, joined = batch("ff_norms", SIZES, streams=2, dtype=torch.float64)
    out = mixed(operators, narrow(joined, 2))
    expected = torch.zeros_like(out)
    for start, (queries, keys), given in zip(joined["sequences"][:, 0].tolist(), SIZES, single, strict=False):
        expected[..., start : start + queries, :keys] = direct(narrow(given, 2))
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("operators", IMPLEMENTATIONS)
def test_pairs_without_weight_are_exact_zeros(operators: Any) -> None:
    given = narrow(case("ff_norms", 9, 9, streams=2, dtype=torch.float64), 2)
    given["alpha"] = given["alpha"].tril()
    given["position"] = torch.arange(9)
    assert torch.equal(mixed(operators, given) != 0, torch.ones(3, 9, 9).tril().bool())


def test_half_types() -> None:
    given = narrow(case("ff_norms", 9, 21, streams=2, tail="all"), 2)
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):  # K is rounded once more than its factors
        wide = ("features", "slope", "down", "residual")
        for names in (wide, ("down",)):
            rounded = {name: value.to(dtype) if name in names else value for name, value in given.items()}
            out, expected = mixed(torch_kernels, rounded), direct(rounded)
            assert out.dtype == torch.float32
            assert ((out - expected).abs() <= limit * expected.amax((-1, -2), keepdim=True)).all()


def test_neurons_without_a_slope_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in what belongs to them does not show; one that counts in one stream alone is not skipped."""
    given = narrow(case("ff_norms", 1, 5, streams=2, dtype=torch.float64), 2)
    given["slope"][..., 20:] = 0
    given["slope"][1, :, 30] = 1
    expected = mixed(torch_kernels, given)
    given["down"] = given["down"].clone()
    given["down"][40:] = torch.nan
    assert torch.equal(mixed(torch_kernels, given), expected)
    monkeypatch.setattr(mixed_operator, "SPARSE", -1)
    assert mixed(torch_kernels, given).isnan().all()
    given["down"][30] = torch.nan
    monkeypatch.undo()
    assert mixed(torch_kernels, given)[:, given["alpha"].sum(0) != 0].isnan().all()


def test_sequences_have_to_agree() -> None:
    given = narrow(case("ff_norms", 3, 5), 1)
    given["sequences"] = torch.tensor([[0, 0], [3, 4]])
    with pytest.raises(
        ValueError, match=r"mixed_operator_norms: sequences goes .* to \[3, 4\], expected .* to \[3, 5\]"
    ):
        mixed(torch_kernels, given)
