"""The Triton kernel of ``ff_norms``, on the GPU or in Triton's interpreter, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from op_cases import case, define_reduction, largest_norms
from triton_cases import (
    DEVICE,
    INTERPRETED,
    TritonPromises,
    check,
    check_last_pair,
    needs_float8,
    run,
    watch_tma,
)
from wide_cases import FLOAT8, LIMITS, DirectPromises, needs_memory

# A lane that is not selected may well divide by zero: the interpreter's NumPy warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned", "one_thread", "rounded_as_on_gpus"),
]

# queries, keys, width, neurons, heads, streams. The last three leave TMA no aligned rows: of all matrices, or of some.
CASES = [
    (1, 1, 40, 56, 1, 1),
    (5, 5, 40, 56, 5, 1),
    (33, 2, 40, 56, 12, 1),
    (1, 33, 40, 56, 1, 2),
    (5, 2, 72, 200, 17, 2),
    (1, 5, 72, 200, 12, 1),
    (5, 1, 72, 56, 17, 2),
    (3, 4, 72, 200, 33, 1),
    (2, 3, 40, 56, 65, 2),
    (2, 2, 40, 72, 128, 1),
    (5, 5, 41, 57, 5, 2),
    (33, 1, 41, 56, 1, 1),
    (2, 5, 40, 57, 12, 2),
]
LOADS = [(sizes, True) for sizes in CASES]
# With pointers as well, in the interpreter's time half of them; rows that are not aligned have no other.
LOADS += [(sizes, False) for sizes in (CASES[2:9:2] if INTERPRETED else CASES[:10])]


class TestPromises(TritonPromises, DirectPromises):
    pass


@pytest.mark.parametrize(("sizes", "tma"), LOADS, ids=str)
def test_sizes(sizes: tuple[int, ...], tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with TMA, where its rows are aligned, and with pointers."""
    queries, keys, width, neurons, heads, streams = sizes
    asked = watch_tma(monkeypatch, "ff_norms", tma)
    check("ff_norms", case("ff_norms", queries, keys, width, neurons, heads, streams=streams))
    assert all(fits == (tma and width % 8 == neurons % 8 == 0) for fits in asked)


@pytest.mark.parametrize("sizes", [CASES[1], CASES[4], CASES[8], CASES[10]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FLOAT8], ids=str)
def test_narrow_products(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    needs_float8(dtype)
    queries, keys, width, neurons, heads, streams = sizes
    check("ff_norms", case("ff_norms", queries, keys, width, neurons, heads, streams=streams), dtype)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_pointers_that_are_not_aligned(dtype: torch.dtype) -> None:
    """To more than an element, in a float8 `down` to an odd byte."""
    needs_float8(dtype)
    check("ff_norms", case("ff_norms", 3, 2, 72, 80, 3, streams=2), dtype, margin=67)


@pytest.mark.parametrize("reduction", ["l2", "l1", "alti"])
def test_no_neurons(reduction: str) -> None:
    """What is added to the feed-forward row, which is zero, is all there is."""
    given = case("ff_norms", 5, 9, 40, 0, heads=3, tail="scale", reduction=reduction)
    found, expected = run("ff_norms", given), define_reduction("ff_norms", given)
    size = largest_norms("ff_norms", given, expected)[1:]
    assert (found[0] == 0).all()
    assert ((found[1] - expected[1]).abs() <= LIMITS[torch.float32] * size).all()


# ---- offsets beyond 32 bits


@pytest.mark.parametrize("huge", [False, needs_memory(24, DEVICE)])
def test_many_features(huge: bool) -> None:
    keys, heads, neurons = (129, 15, 1 << 20) if huge else (3, 5, 40)
    few = case("ff_norms", 1, 1, 16, neurons, heads)
    given = {**few, "alpha": torch.zeros(heads, 1, keys), "position": torch.tensor([keys - 1])}
    given["alpha"][..., -1:] = few["alpha"]
    for name, axis in (("features", 1), ("residual", 0)):
        shape = list(few[name].shape)
        shape[axis] = keys
        given[name] = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
        given[name].narrow(axis, keys - 1, 1).copy_(few[name])
    check_last_pair("ff_norms", {**given, "slope": few["slope"].bfloat16(), "down": few["down"].bfloat16()})


@pytest.mark.parametrize("huge", [False, needs_memory(24, DEVICE)])
def test_many_slopes(huge: bool) -> None:
    queries, neurons = (2100, 1 << 20) if huge else (40, 40)
    few = case("ff_norms", 1, 1, 16, neurons, 3)
    scale = torch.ones(queries)
    given = {**few, "alpha": torch.zeros(3, queries, 1), "residual_scale": scale, "norm_scale": scale}
    given["position"] = torch.full((queries,), -1)
    given["alpha"][:, -1:] = few["alpha"]
    given["slope"] = torch.zeros(1, queries, neurons, dtype=torch.bfloat16, device=DEVICE)
    given["slope"][:, -1:] = few["slope"]
    for name in ("features", "down", "residual"):
        given[name] = few[name].bfloat16()
    check_last_pair("ff_norms", given)


@pytest.mark.parametrize("huge", [False, needs_memory(40, DEVICE)])
def test_many_pairs(huge: bool) -> None:
    tokens = 33_000 if huge else 35
    given = case("ff_norms", tokens, tokens, 16, 24, 2)
    given["alpha"] = torch.zeros(2, tokens, tokens, device=DEVICE)
    given["alpha"][:, -1, -1] = 0.5
    given["position"] = torch.full((tokens,), -1)
    check_last_pair("ff_norms", given)
