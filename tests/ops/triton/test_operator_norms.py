"""The Triton kernels of ``operator_norms``, on the GPU or in Triton's interpreter, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from op_cases import batch, case
from triton_cases import (
    DEVICE,
    INTERPRETED,
    TritonPromises,
    assert_same,
    check,
    check_last_pair,
    function,
    module,
    tile,
    watch_tma,
)
from wide_cases import LIMITS, SIZES, needs_memory

# A lane that is not selected may well divide by zero: the interpreter's NumPy warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned", "one_thread", "rounded_as_on_gpus"),
]

# queries, keys, width, neurons, heads, head_dim, streams
CASES = [
    (1, 1, 40, 56, 1, 16, 1),
    (5, 5, 40, 56, 5, 16, 2),
    (2, 33, 40, 56, 12, 40, 1),
    (33, 1, 40, 56, 1, 64, 1),
    (2, 5, 72, 200, 3, 64, 2),
    (1, 33, 72, 56, 17, 16, 2),
    (2, 3, 40, 56, 33, 16, 1),
    (1, 2, 40, 56, 65, 16, 2),
    (1, 2, 40, 24, 128, 16, 1),
    # No aligned rows for TMA, of any matrix.
    (5, 3, 41, 57, 5, 3, 2),
    (1, 35, 41, 57, 12, 3, 1),
    # Of one kernel's matrices; in the last, of heads that start anywhere in an aligned row.
    (2, 3, 40, 57, 3, 16, 1),
    (2, 3, 40, 56, 5, 3, 2),
    (2, 3, 40, 56, 4, 6, 1),
]
LOADS = [(sizes, True) for sizes in CASES]
# With pointers as well, in the interpreter's time those of more than one tile; rows that are not aligned have no other.
LOADS += [(sizes, False) for sizes in (CASES[2:5:2] if INTERPRETED else CASES[:6])]


class TestPromises(TritonPromises):
    operator = "operator_norms"


@pytest.mark.parametrize(("sizes", "tma"), LOADS, ids=str)
def test_sizes(sizes: tuple[int, ...], tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with TMA, where its rows are aligned, and with pointers."""
    asked = watch_tma(monkeypatch, "operator_norms", tma)
    _, _, width, neurons, heads, head_dim, _ = sizes
    check("operator_norms", case("operator_norms", *sizes))
    if asked:
        apply = [tma and width % 8 == heads * head_dim % 8 == 0] if head_dim % 8 == 0 else []
        assert asked == [tma and neurons % 8 == 0, *apply]


@pytest.mark.parametrize("sizes", [CASES[1], CASES[2], CASES[4], CASES[9]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_products(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    check("operator_norms", case("operator_norms", *sizes), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pointers_that_are_not_aligned(dtype: torch.dtype) -> None:
    """To more than an element."""
    check("operator_norms", case("operator_norms", 3, 2, 72, 80, 3, 16, 2), dtype, margin=67)


@pytest.mark.parametrize("head_dim", [3, 16, 40, 64])
def test_several_steps_of_a_head(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one of 40 reads beyond its head."""
    tile(monkeypatch, 32, 64, 16)
    check("operator_norms", case("operator_norms", 2, 3, 24, 24, 3, head_dim))


# ---- batches of queries


def test_nan_stays_in_its_query() -> None:
    """Heads of 3 in steps of 16: what a step reads beyond the last head is the next query's operator."""
    given = case("operator_norms", 4, 3, 24, 24, heads=2, head_dim=3, streams=2)
    given["slope"][1, 2, 5] = torch.nan
    found = function("operator_norms")(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in given.values()))
    expected = torch.zeros(4, 3, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)
    assert all(torch.equal(scope.isnan().cpu(), expected) for scope in found)


@pytest.mark.parametrize("limit", [1, 2 * 5 * 3 * 40])
def test_batches(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one query, and of two: the last one has only one left."""
    given = case("operator_norms")
    expected = check("operator_norms", given)
    calls = []
    chunks = module("operator_norms").split_queries
    monkeypatch.setattr(
        module("operator_norms"), "split_queries", lambda *a: (calls.append(c) or c for c in chunks(*a))
    )
    monkeypatch.setattr(module("operator_norms"), "_BATCH", limit)
    found = check("operator_norms", given)
    assert [part.stop - part.start for part, _, _ in calls] == ([1] * 5 if limit == 1 else [2, 2, 1])
    assert_same("operator_norms", found, expected, torch.float32)


def test_batches_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("operator_norms"), "_BATCH", 3 * 2 * 16 * 24)
    _, joined = batch("operator_norms", SIZES, width=24, neurons=24, heads=2, head_dim=16, streams=2)
    check("operator_norms", joined)


# ---- offsets beyond 32 bits


@pytest.mark.parametrize("huge", [False, needs_memory(24, DEVICE)])
def test_many_maps(huge: bool) -> None:
    """The last head's rows of ``maps`` alone have weight."""
    heads, head_dim, neurons = (33, 64, 1 << 20) if huge else (3, 16, 40)
    few = case("operator_norms", 1, 1, 16, neurons, 1, head_dim)
    given = {n: t.bfloat16() if n in ("own", "slope", "down") else t for n, t in few.items()}
    for name, axis in (("alpha", 0), ("values", 1), ("maps", 1), ("residual", 1)):
        dtype = torch.float32 if name == "alpha" else torch.bfloat16
        shape = list(few[name].shape)
        shape[axis] = heads * head_dim if name == "maps" else heads + (name == "residual")
        given[name] = torch.zeros(shape, dtype=dtype, device=DEVICE)
        given[name].narrow(axis, shape[axis] - few[name].shape[axis], few[name].shape[axis]).copy_(few[name])
    given = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    out = function("operator_norms")(*given.values())
    alone = {**given, "alpha": given["alpha"][-1:], "values": given["values"][:, -1:]}
    alone |= {"maps": given["maps"][:, -head_dim:], "residual": given["residual"][:, -2:]}
    expected = function("operator_norms")(*alone.values())
    torch.testing.assert_close(out, expected, rtol=LIMITS[torch.bfloat16], atol=0)
    check("operator_norms", few, torch.bfloat16)


@pytest.mark.parametrize("huge", [False, needs_memory(24, DEVICE)])
def test_many_slopes(huge: bool) -> None:
    queries, neurons = (2100, 1 << 20) if huge else (5, 40)
    few = case("operator_norms", 1, 1, 16, neurons, 1, 16)
    scale = torch.ones(queries)
    given = {n: t.bfloat16() if n in ("values", "maps", "down", "residual") else t for n, t in few.items()}
    given |= {"alpha": torch.zeros(1, queries, 1), "residual_scale": scale, "norm_scale": scale}
    given["position"] = torch.full((queries,), -1)
    given["position"][-1] = 0
    given["alpha"][:, -1:] = few["alpha"]
    for name in ("slope", "own"):
        given[name] = torch.zeros(1, queries, neurons, dtype=torch.bfloat16, device=DEVICE)
        given[name][:, -1:] = few[name]
    check_last_pair("operator_norms", given)


@pytest.mark.parametrize("huge", [False, needs_memory(40, DEVICE)])
def test_many_pairs(huge: bool) -> None:
    tokens = 33_000 if huge else 35
    given = case("operator_norms", tokens, tokens, 16, 24, 2, 8)
    given["alpha"] = torch.zeros(2, tokens, tokens, device=DEVICE)
    given["alpha"][:, -1, -1] = 0.5
    given["position"] = torch.full((tokens,), -1)
    check_last_pair("operator_norms", given)
