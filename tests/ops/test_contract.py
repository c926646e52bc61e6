"""``torch.ops.ffattr.{gram_norms,ff_norms,operator_norms}`` on the CPU against plain PyTorch in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import (
    MAPS,
    OPERATORS,
    WIDE,
    case,
    check,
    converted,
    needs_binary,
    wrong,
)
from paths import environment
from torch import Tensor

from ffattr.ops import torch_kernels

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

# ---- sizes and arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 33), (5, 5), (33, 5), (33, 33)])
@pytest.mark.parametrize(("width", "neurons"), [(40, 56), (72, 200), (1, 300), (257, 1)])
@pytest.mark.parametrize("operator", MAPS)
def test_odd_sizes(operator: str, width: int, neurons: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    for streams in (1, 2) if operator in WIDE else (1,):
        check(operator, case(operator, queries, keys, width, neurons, streams=streams, dtype=dtype))


@pytest.mark.parametrize("head_dim", [1, 3, 64])
@pytest.mark.parametrize("heads", [1, 5, 12, 17])
@pytest.mark.parametrize("operator", MAPS)
def test_heads(operator: str, heads: int, head_dim: int) -> None:
    for dtype in (torch.float32, torch.float64):
        check(operator, case(operator, heads=heads, head_dim=head_dim, streams=2, dtype=dtype))


@pytest.mark.parametrize(("heads", "queries"), [(33, 7), (47, 150), (48, 150), (390, 3)])
@pytest.mark.parametrize("operator", MAPS)
def test_many_heads(operator: str, heads: int, queries: int) -> None:
    """As of groups of tokens: more than are mixed at once, and on both sides of what `gram_norms` has as lanes."""
    for dtype in (torch.float32, torch.float64):
        check(operator, case(operator, queries, 3, 24, 40, heads, 1, dtype=dtype))


@needs_binary
def test_rows_do_not_depend_on_those_beside_them() -> None:
    """Bit by bit: of several queries with a key, as many as fit are mixed at once."""
    for streams, dtype in itertools.product((1, 2), (torch.float32, torch.float64)):
        given = case("ff_norms", 8, 3, 72, 431, streams=streams, dtype=dtype)
        given["position"] %= 3
        expected = OPERATORS.ff_norms(*given.values())
        for queries in range(1, 8):
            axes = {"alpha": 1, "slope": 1, "position": 0, "residual_scale": 0, "norm_scale": 0}
            some = {n: t.narrow(axes[n], 0, queries) if n in axes else t for n, t in given.items()}
            assert torch.equal(OPERATORS.ff_norms(*some.values()), expected[:, :queries])


@pytest.mark.parametrize("tail", ["none", "scale", "norm", "gamma", "rms", "all"])
@pytest.mark.parametrize("operator", MAPS)
def test_optional_arguments(operator: str, tail: str) -> None:
    check(operator, case(operator, 9, 21, tail=tail, dtype=torch.float64))
    out = check(operator, case(operator, 9, 21, tail=tail))
    assert out.shape == (
        (9, 21) if operator == "gram_norms" else (3 if tail in ("norm", "gamma", "rms", "all") else 2, 9, 21)
    )


@pytest.mark.parametrize("operator", MAPS)
@pytest.mark.parametrize("positions", [[0, 0, 0, 0, 0], [-1, -7, 5, 6, 2**40], [4, 3, 2, 1, 0]])
def test_positions(operator: str, positions: list[int]) -> None:
    given = case(operator)
    given["position"] = torch.tensor(positions)
    found = check(operator, given)
    nowhere = {**given, "position": torch.full((5,), -1)}
    same = (found == getattr(OPERATORS, operator)(*nowhere.values())).reshape(-1, 5, 5).all(0)
    own = torch.tensor(positions)[:, None] == torch.arange(5)
    assert same[~own].all()
    assert not same[own].any()


@pytest.mark.parametrize("operator", MAPS)
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(operator: str, queries: int, keys: int) -> None:
    given = case(operator, max(queries, 1), max(keys, 1))
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and name not in ("down", "gamma", "maps"):
            axes = {"alpha": (1, 2), "features": (None, 1), "own": (1, None), "slope": (1, None)}
            by_key = name in ("residual", "values", "gram")
            query_axis, key_axis = axes.get(name, (None, 0) if by_key else (0, None))
            if query_axis is not None:
                tensor = tensor.narrow(query_axis, 0, queries)
            given[name] = tensor if key_axis is None else tensor.narrow(key_axis, 0, keys)
    assert check(operator, given).shape[-2:] == (queries, keys)


# ---- sizes of nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("operator", "sizes"),
    [
        ("ff_norms", {"neurons": 0}),
        ("ff_norms", {"neurons": 0, "streams": 2}),
        ("ff_norms", {"heads": 0}),
        ("ff_norms", {"width": 0}),
        ("ff_norms", {"queries": 0}),
        ("ff_norms", {"keys": 0}),
        ("operator_norms", {"neurons": 0}),
        ("operator_norms", {"head_dim": 0}),
        ("operator_norms", {"heads": 0}),
        ("operator_norms", {"keys": 0}),
        ("gram_norms", {"heads": 0}),
    ],
)
def test_products_of_no_terms_are_zero(operator: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """They are all that there is of a row, and nothing is left of what was in memory before."""
    given = case(operator, dtype=dtype, **sizes)
    for _ in range(3):
        rubbish = [torch.full((count,), 7e7, dtype=dtype) for count in (75, 200, 2000, 40_000)]
        del rubbish
        check(operator, given)


# ---- weights that are zero or not a number


@pytest.mark.parametrize("operator", MAPS)
def test_pairs_without_weight_are_exactly_zero(operator: str) -> None:
    given = case(operator, 33, 33, dtype=torch.float32)
    given["alpha"] = given["alpha"].tril()
    given["alpha"][:, 7] = 0
    given["position"] = torch.arange(33)
    found = check(operator, given).reshape(-1, 33, 33)
    zero = torch.ones(33, 33).triu(1).bool()
    zero[7, :7] = True
    assert (found == 0).equal(zero.expand_as(found))  # the diagonal keeps its residual


@pytest.mark.parametrize("operator", MAPS)
def test_nan_stays_in_its_pair(operator: str) -> None:
    given = case(operator, 6, 40)
    given["position"] = torch.arange(6)
    given["alpha"][2, 4, 9] = torch.nan
    given["alpha"][0, 1, 1] = torch.nan
    found = getattr(OPERATORS, operator)(*given.values()).reshape(-1, 6, 40)
    assert all(torch.equal(scope.isnan().nonzero(), torch.tensor([[1, 1], [4, 9]])) for scope in found)


def test_a_vanishing_square_is_no_nan() -> None:
    """Three vectors that cancel but for rounding, of either sign after squaring."""
    two = torch.randn(50, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    features = torch.cat([two, -two.sum(1, keepdim=True)], 1)
    alpha = torch.linspace(0.1, 1, 50).expand(3, 4, 50).contiguous()
    for function in (OPERATORS.gram_norms, torch_kernels.gram_norms):
        assert (function(alpha, torch.full((4,), -1), features @ features.mT, None) <= 1e-6).all()


# ---- memory and threads


@pytest.mark.parametrize("operator", MAPS)
def test_inputs_that_are_not_contiguous(operator: str) -> None:
    given = case(operator, 9, 21, streams=2)
    expected = getattr(OPERATORS, operator)(*given.values())
    for name, tensor in given.items():
        if isinstance(tensor, Tensor):
            given[name] = torch.stack([tensor, tensor], -1).transpose(0, -1).contiguous().transpose(0, -1)[..., 0]
            assert torch.equal(given[name], tensor)
    assert any(not t.is_contiguous() for t in given.values() if isinstance(t, Tensor))
    assert torch.equal(getattr(OPERATORS, operator)(*given.values()), expected)


@pytest.mark.parametrize("operator", MAPS)
def test_threads_agree(operator: str) -> None:
    given = case(operator, 33, 50, heads=12, streams=2)
    one = getattr(OPERATORS, operator)(*given.values())
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(getattr(OPERATORS, operator)(*given.values()), one, rtol=2e-6, atol=0)
        check(operator, given)
    finally:
        torch.set_num_threads(1)


ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx", "emulated_dots", "emulated_tiles")


@needs_binary
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_agree(isa: str, tmp_path: Path) -> None:
    """Each with the definition in float64: what this processor has not falls back on what it has."""
    code = (
        "import sys, torch, op_cases; from ffattr.ops import backends; torch.set_num_threads(1); "
        "print(backends.build_info()['instruction set']); torch.save(op_cases.compute_cases(), sys.argv[1])"
    )
    variables = environment(FFATTR_CPU_ISA=isa)
    command = [sys.executable, "-c", code, str(tmp_path / "results.pt")]
    done = subprocess.run(command, env=variables, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[0] in ISAS[: ISAS.index(isa) + 1]
    if isa.startswith("emulated") or isa == "baseline":
        assert done.stdout.split()[0] == isa
    found = torch.load(tmp_path / "results.pt")
    assert any("bfloat16" in name for name in found) == (done.stdout.split()[0] not in ISAS[:3])
    for name, (out, expected, size) in found.items():
        close = 1e-2 if "bfloat16" in name else 2e-5 if out.dtype == torch.float32 else 1e-14
        assert ((out - expected).abs() <= close * size).all(), name


# ---- errors


@needs_binary
@pytest.mark.parametrize("operator", MAPS)
def test_errors_name_operator_and_argument(operator: str) -> None:
    for name, tensor in wrong(operator):
        given = {**case(operator), name: tensor}
        with pytest.raises(RuntimeError, match=rf"{operator}: .*\b{name}\b"):
            getattr(OPERATORS, operator)(*given.values())


@needs_binary
@pytest.mark.parametrize("operator", MAPS)
def test_half_precision_is_refused(operator: str) -> None:
    given = converted(case(operator), torch.bfloat16)
    if operator == "gram_norms":
        given["gram"] = given["gram"].double()
    with pytest.raises(RuntimeError, match=f"{operator}.*float32 or float64"):
        getattr(OPERATORS, operator)(*given.values())


# ---- torch.library and torch.compile


@pytest.mark.parametrize("tail", ["none", "all"])
@pytest.mark.parametrize("operator", MAPS)
def test_opcheck(operator: str, tail: str) -> None:
    given = case(operator, tail=tail, streams=2)
    torch.library.opcheck(getattr(OPERATORS, operator).default, tuple(given.values()))


@pytest.mark.parametrize("operator", MAPS)
def test_compiles_without_a_break(operator: str) -> None:
    function = getattr(OPERATORS, operator)
    compiled = torch.compile(lambda *args: function(*args) * 2, fullgraph=True, backend="eager")
    for tail in ("none", "all"):
        given = case(operator, tail=tail)
        assert torch.equal(compiled(*given.values()), function(*given.values()) * 2)
