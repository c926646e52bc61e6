"""Whole maps by the Triton backend, on the GPU or in Triton's interpreter, and its kernels as operators of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from test_engine import assert_same
from test_ops import case
from test_ops_sequences import batch
from torch import Tensor
from triton_cases import (
    DEVICE,
    FLOAT8,
    function,
    narrowed,
    needs_float8,
    surroundings,  # noqa: F401  of every test
)

import ffattr
from ffattr import ops

# A lane that is not selected may well divide by zero: the interpreter's NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MODELS: dict[str, dict[str, int]] = {
    "bert": {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 1},
    # Gated, causal, with a norm first and fewer key heads than query heads.
    "llama": {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
    },
}
# The engine's float32 is good to 1e-5 (tests/test_engine.py), and its narrow products to what tests/test_precision.py
# says, which a map of 6 tokens is too small a sample for.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, FLOAT8: 4e-2}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("method", ["direct", "operator"])
@pytest.mark.parametrize("name", MODELS)
def test_all_scopes(name: str, method: str, dtype: torch.dtype) -> None:
    if dtype == FLOAT8 and method == "operator":
        return
    needs_float8(dtype)
    model = tiny_models.build(name, **MODELS[name]).to(DEVICE)
    given = {key: tensor.to(DEVICE) for key, tensor in tiny_models.inputs(name, batch=1, length=6).items()}
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    found = ffattr.attribute(model, given, scopes="all", backend="triton", dtype=dtype, method=method)
    assert str(found.plan).startswith(f"triton backend, {str(dtype).removeprefix('torch.')} on {DEVICE}")
    assert_same(found, expected, LIMITS[dtype])


# ---- the schemas


@pytest.fixture(scope="module")
def operators() -> Iterator[Any]:
    """The kernels under the schemas and fakes of `ffattr.ops`, in a library of their own."""
    library = torch.library.Library("ffattr_triton_test", "DEF")
    for name, schema in ops.SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function(name), DEVICE.type.upper())
        torch.library.register_fake(f"ffattr_triton_test::{name}", ops._FAKES[name], lib=library)
    yield torch.ops.ffattr_triton_test
    library._destroy()


def small(operator: str, tail: str) -> list[Any]:
    """Arguments on `DEVICE`; with a tail, of several sequences."""
    if operator == "ig_slope":
        z = torch.linspace(-3, 3, 24).view(2, 3, 4)
        given: list[Any] = [z, None, None, "silu", "exact", 0]
        if tail == "all":
            given[1:3] = [z[:, :1] / 2, z[0, :, 0]]
    else:
        sizes = {"width": 16, "neurons": 16, "heads": 2, **({} if operator == "gram_norms" else {"streams": 2})}
        if tail == "none":
            given = list(case(operator, 2, 3, tail=tail, **sizes).values())
        else:
            _, joined = batch(operator, [(1, 2), (2, 1)], tail=tail, **sizes)
            # opcheck takes no NaN for equal to itself.
            given = list({**joined, "alpha": joined["alpha"][..., :3].nan_to_num(1)}.values())
    sequences = given[-1] if operator != "ig_slope" and tail == "all" else None
    return [t.to(DEVICE) if isinstance(t, Tensor) and t is not sequences else t for t in given]


@pytest.mark.parametrize("tail", ["none", "all"])
@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_opcheck(operator: str, tail: str, operators: Any) -> None:
    torch.library.opcheck(getattr(operators, operator).default, tuple(small(operator, tail)))


def test_opcheck_of_float8(operators: Any) -> None:
    needs_float8(FLOAT8)
    given = narrowed(case("ff_norms", 2, 3, 16, 32, 2), FLOAT8)
    arguments = tuple(t.to(DEVICE) if isinstance(t, Tensor) else t for t in given.values())
    # The check of the schema, and that of dynamic shapes, do arithmetic that PyTorch does not have for float8.
    checks = ["test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(operators.ff_norms.default, arguments, test_utils=checks)


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_compiles_without_a_break(operator: str, operators: Any) -> None:
    torch.compiler.reset()  # every operator's is the same code, whose recompilations are counted together
    call = getattr(operators, operator)
    compiled = torch.compile(lambda *args: call(*args) * 2, fullgraph=True, backend="eager")
    for tail in ("none", "all"):
        given = small(operator, tail)
        assert torch.equal(compiled(*given), function(operator)(*given) * 2)
