"""Arguments of the operators of ``torch.ops.ffattr``, right ones and wrong ones, and their comparison with float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ffattr.ops import availability, backends, torch_kernels
from ffattr.ops.reduction import REDUCTIONS

BINARY = backends.select_backend("auto", torch.device("cpu"), torch.float32).name == "cpu"
needs_binary = pytest.mark.skipif(not BINARY, reason="the C++ library is not built")
WIDE = ("ff_norms", "operator_norms")
MAPS = ("gram_norms", *WIDE)
OPERATORS: Any = torch.ops.ffattr
FLOAT32_LIMIT = 2e-5 if "bfloat16" in backends.build_info().get("float32 by", "") else 3e-6
"""A matrix unit multiplies float32 numbers in two parts of 8 bits each: what it leaves out is 2^-17 of a number."""


def case(
    operator: str,
    queries: int = 5,
    keys: int = 5,
    width: int = 40,
    neurons: int = 56,
    heads: int = 5,
    head_dim: int = 3,
    streams: int = 1,
    dtype: torch.dtype = torch.float32,
    tail: str = "all",
    seed: int = 0,
    density: float = 1,
    reduction: str = "l2",
) -> dict[str, Any]:
    """Returns random arguments by name. ``tail`` says which of the optional ones are there; ``density`` is the share of
    neurons with a slope other than zero, not the same for each query. The last ones are there where ``reduction`` is
    not the default."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    alpha = random(heads, queries, keys).softmax(-1)
    position = torch.randint(-1, keys + 2, (queries,), generator=generator)  # outside the block too
    scale, norm_scale = random(queries).abs() + 0.5, random(queries).abs() + 0.5
    if operator == "gram_norms":
        size = heads if tail == "none" else heads + 1
        features = random(keys, size, width).double()
        gram = features @ features.mT
        return {"alpha": alpha, "position": position, "gram": gram, "row_scale": None if tail == "none" else scale}
    given: dict[str, Any] = {"alpha": alpha, "position": position}
    if operator == "ff_norms":
        given["features"] = random(streams, keys, heads + 1, neurons)
    else:
        given["values"] = random(keys, heads, head_dim)
        given["maps"] = random(streams, heads * head_dim, neurons)
        given["own"] = random(streams, queries, neurons)
    slope = random(streams, queries, neurons)
    if density < 1:  # from numbers of their own, so that all others stay as they are
        slope *= torch.rand(queries, neurons, generator=torch.Generator().manual_seed(seed)) < density
    given |= {
        "slope": slope,
        "down": random(neurons, width),
        **({"down_scale": None} if operator == "ff_norms" else {}),
        "residual": random(keys, heads + 1, width),
        "residual_scale": scale if tail in ("all", "scale", "rms") else None,
        "gamma": random(width) if tail in ("all", "rms", "gamma") else None,
        "norm_scale": norm_scale if tail in ("all", "rms", "norm", "gamma") else None,
        "centre": tail in ("all", "norm"),
    }
    if reduction != "l2":
        given |= {"sequences": None, "reduction": reduction, "totals": None}
    if reduction == "alti":
        whole = make_vectors(operator, given).sum(2)
        given["totals"] = (whole + torch.randn(whole.shape, generator=generator)).to(dtype)  # and a bias
    return given


def make_triangular(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a wide operator with ``down`` zero right of its diagonal, of which it is told."""
    rest = {"sequences": None, "reduction": "l2", "totals": None}
    return {**given, "down": given["down"].tril(), **{n: given.get(n, v) for n, v in rest.items()}, "triangular": True}


def make_vectors(operator: str, given: dict[str, Any]) -> Tensor:
    """Returns the vectors of all pairs, ``[2 or 3, N, M, d]`` in float64, as `ffattr.ops.contract` defines them."""
    given = converted(given, torch.float64)
    alpha, position = given["alpha"], given["position"]
    itself = position[:, None] == torch.arange(alpha.shape[2])
    weights = torch.cat([alpha, itself[None]])  # [H + 1, N, M]
    if operator == "ff_norms":
        z = torch.einsum("hnm,smhf->snmf", weights, given["features"])
    else:
        brought = torch.einsum("hnm,mhe->nmhe", alpha, given["values"]).flatten(2)
        z = torch.einsum("nmi,sif->snmf", brought, given["maps"]) + itself[..., None] * given["own"][:, :, None]
    ff = torch.einsum("snf,snmf,fd->nmd", given["slope"], z, given["down"])
    residual = torch.einsum("hnm,mhd->nmd", weights, given["residual"])
    if given["residual_scale"] is not None:
        residual *= given["residual_scale"][:, None, None]
    found = [ff, ff + residual]
    if given["norm_scale"] is not None:
        after = found[1] - found[1].mean(-1, keepdim=True) if given["centre"] else found[1]
        after = after if given["gamma"] is None else after * given["gamma"]
        found.append(after * given["norm_scale"][:, None, None])
    return torch.stack(found)


def define_reduction(operator: str, given: dict[str, Any]) -> Tensor:
    """Returns what the vectors of all pairs are reduced to, ``[2 or 3, N, M]`` in float64, straight from its
    definition."""
    vectors, reduction = make_vectors(operator, given), given.get("reduction", "l2")
    if reduction == "l2":
        return vectors.square().sum(-1).sqrt()
    if reduction == "l1":
        return vectors.abs().sum(-1)
    totals = given["totals"].double()[:, :, None]
    return (totals.abs().sum(-1) - (totals - vectors).abs().sum(-1)).clamp_min(0)


def largest_norms(operator: str, given: dict[str, Any], expected: Tensor) -> Tensor:
    """Returns what an error is measured in, ``[2 or 3, 1, 1]``: a scope's largest entry. For ALTI, of which
    cancellation may leave next to nothing, it is the largest L1 norm."""
    if given.get("reduction") == "alti":
        given = {**given, "reduction": "l1", "totals": None}
        expected = getattr(torch_kernels, operator)(*converted(given, torch.float64).values())
    return expected.amax((-1, -2), keepdim=True) if expected.numel() else expected


def converted(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments with their floating-point tensors in ``dtype``."""
    return {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()}


def check(operator: str, given: dict[str, Any]) -> Tensor:
    """Asserts that the operator is right within rounding of its scope's largest entry, and leaves its inputs alone."""
    before = {name: t.clone() for name, t in given.items() if isinstance(t, Tensor)}
    out: Tensor = getattr(OPERATORS, operator)(*given.values())
    assert all(torch.equal(given[name], t) for name, t in before.items())
    expected = getattr(torch_kernels, operator)(*converted(given, torch.float64).values())
    assert out.shape == expected.shape
    assert out.dtype == given["alpha"].dtype
    limit = FLOAT32_LIMIT if out.dtype == torch.float32 else 1e-14
    size = largest_norms(operator, given, expected)
    assert ((out - expected).abs() <= limit * size).all(), f"{((out - expected).abs() / size).max():.1e}"
    return out


def varied_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields name, operator and arguments of cases that every instruction set has to compute alike; those in bfloat16
    where something multiplies it: odd sizes, several tiles of rows, tiny weights."""
    kinds: dict[str, dict[str, Any]] = {"dense": {}, "sparse": {"density": 0.2}, "many heads": {"heads": 50}}
    for operator, dtype, keys, kind in itertools.product(MAPS, (torch.float32, torch.float64), (5, 33), kinds):
        yield (
            f"{operator} {dtype} {keys} {kind}",
            operator,
            case(operator, 9, keys, 72, 200, dtype=dtype, **kinds[kind]),
        )
    sizes = {"small": (3, 5, 40, 56), "odd": (9, 33, 257, 301), "tiles": (20, 40, 96, 640)}
    for operator, name, streams in itertools.product(WIDE, sizes, (1, 2)):
        given = case(operator, *sizes[name], heads=5, streams=streams)
        yield f"{operator} {name} {streams}", operator, given
        yield f"{operator} {name} {streams} triangular", operator, make_triangular(given)
        if availability.describe_product("cpu", torch.bfloat16):
            tiny = {**given, "alpha": given["alpha"] * 1e-30}
            yield f"{operator} bfloat16 {name} {streams}", operator, narrow(tiny)
            yield f"{operator} bfloat16 {name} {streams} triangular", operator, make_triangular(narrow(tiny))
            yield f"{operator} bfloat16 down {name} {streams}", operator, narrow(tiny, ("down",))
    for operator, reduction, dtype, name in itertools.product(
        WIDE, REDUCTIONS[1:], (torch.float32, torch.float64), sizes
    ):
        given = case(operator, *sizes[name], heads=5, dtype=dtype, reduction=reduction)
        yield f"{operator} {reduction} {dtype} {name}", operator, given
        if dtype == torch.float32 and availability.describe_product("cpu", torch.bfloat16):
            yield f"{operator} {reduction} bfloat16 {name}", operator, narrow(given)


def compute_cases() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns what the operators give for `varied_cases`, the definition in float64, and `largest_norms`."""
    found = {}
    for name, operator, given in varied_cases():
        expected = getattr(torch_kernels, operator)(*converted(given, torch.float64).values())
        size = largest_norms(operator, given, expected)
        found[name] = (getattr(OPERATORS, operator)(*given.values()), expected, size)
    return found


WIDE_OPERANDS = ("features", "slope", "down", "residual", "values", "maps", "own")


def narrow(given: dict[str, Any], names: tuple[str, ...] = WIDE_OPERANDS) -> dict[str, Any]:
    """Returns the arguments with their wide operands, or those of ``names`` alone, in bfloat16."""
    return {name: value.bfloat16() if name in names else value for name, value in given.items()}


DEFINING = {"alpha": (0, 1, 2), "residual": (2,), "features": (0, 3), "values": (2,), "maps": (0, 2)}
"""Axes by which the others are measured: a change there is an error of another argument."""


def wrong(operator: str) -> Iterator[tuple[str, Tensor]]:
    """Yields arguments of a wrong shape or dtype, one at a time."""
    for name, tensor in case(operator).items():
        if isinstance(tensor, Tensor):
            for axis in set(range(tensor.dim())).difference(DEFINING.get(name, ())):
                yield name, torch.cat([tensor, tensor], axis)
            yield name, tensor[None]
            if name != "alpha":  # whose dtype is the others' measure
                yield name, tensor.int() if name == "position" else tensor.half()


COLUMNS = 42  # more than the longest needs
QUERY_AXIS = {"position": 0, "slope": 1, "own": 1, "residual_scale": 0, "norm_scale": 0, "row_scale": 0, "totals": 1}
KEY_AXIS = {"features": 1, "values": 0, "residual": 0, "gram": 0}


def table(sizes: list[tuple[int, int]]) -> Tensor:
    """Returns the argument ``sequences``, ``[B + 1, 2]``, for sequences of so many queries and keys."""
    return torch.tensor([(0, 0), *sizes]).cumsum(0)


def batch(operator: str, sizes: list[tuple[int, int]], **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the arguments of every sequence, and those of all in one call, with NaN where alpha must not be read."""
    single = [case(operator, *size, seed=b, **options) for b, size in enumerate(sizes)]
    shared = {n: t for n, t in single[0].items() if n != "alpha" and n not in QUERY_AXIS and n not in KEY_AXIS}
    single = [{**given, **shared} for given in single]
    joined = dict(single[0])
    for name, axis in (QUERY_AXIS | KEY_AXIS).items():
        if joined.get(name) is not None:
            joined[name] = torch.cat([given[name] for given in single], axis)
    sequences = table(sizes)
    first = single[0]["alpha"]
    alpha = first.new_full((len(first), int(sequences[-1, 0]), COLUMNS), torch.nan)
    for start, given in zip(sequences[:, 0].tolist(), single, strict=False):
        weights = given["alpha"]
        alpha[:, start : start + weights.shape[1], : weights.shape[2]] = weights
    return single, {**joined, "alpha": alpha, "sequences": sequences}


WRONG = {
    "int32": (table([(2, 3), (3, 2)]).int(), "int32.*expected.*int64"),
    "three columns": (torch.zeros(3, 3, dtype=torch.int64), r"\[3, 3\].*expected \[B \+ 1, 2\]"),
    "no rows": (torch.zeros(0, 2, dtype=torch.int64), r"\[0, 2\].*expected \[B \+ 1, 2\]"),
    "one axis": (torch.zeros(2, dtype=torch.int64), r"\[2\].*expected \[B \+ 1, 2\]"),
    "late start": (torch.tensor([[0, 1], [5, 5]]), r"from \[0, 1\] to \[5, 5\], expected from \[0, 0\]"),
    "too few queries": (table([(2, 3), (2, 2)]), r"to \[4, 5\], expected.* to \[5, 5\]"),
    "too many keys": (table([(2, 3), (3, 3)]), r"to \[5, 6\], expected.* to \[5, 5\]"),
    "queries decrease": (
        torch.tensor([[0, 0], [4, 1], [3, 2], [5, 5]]),
        r"decreases from \[4, 1\] in row 1 to \[3, 2\]",
    ),
    "keys decrease": (torch.tensor([[0, 0], [1, 3], [2, 2], [5, 5]]), r"decreases from \[1, 3\] in row 1 to \[2, 2\]"),
    "too few columns": (table([(2, 1), (3, 4)]), r"4 keys in sequence 1, but alpha only 3 columns"),
}


def arguments(operator: str, dtype: torch.dtype, wide: torch.dtype) -> list[Any]:
    """Returns small tensors, enough to tell where a call goes."""
    alpha, position = torch.rand(2, 3, 4, dtype=dtype), torch.tensor([0, 1, 2])
    if operator == "ig_slope":
        return [torch.rand(1, 3, 5, dtype=dtype), None, None, "gelu", "exact", 0]
    if operator == "gram_norms":
        return [alpha, position, torch.rand(4, 2, 2, dtype=torch.float64), None]
    slope, down, residual = (torch.rand(*size).to(wide) for size in ((1, 3, 5), (5, 6), (4, 3, 6)))
    tail = [residual, None, None, None, False]
    if operator == "ff_norms":
        return [alpha, position, torch.rand(1, 4, 3, 5).to(wide), slope, down, None, *tail]
    values, maps, own = (torch.rand(*size).to(wide) for size in ((4, 2, 3), (1, 6, 5), (1, 3, 5)))
    return [alpha, position, values, maps, own, slope, down, *tail]
