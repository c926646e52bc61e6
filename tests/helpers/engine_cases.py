"""What tests of kernels in whole maps, and as operators of PyTorch, share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from compare_results import assert_same
from op_cases import batch, case
from torch import Tensor
from wide_cases import FLOAT8, narrowed

import ffattr
from ffattr import ops

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
    # A dense block for each pair of three experts.
    "mixtral": {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "num_local_experts": 3,
        "num_hidden_layers": 1,
    },
}
# The engine's float32 is good to 1e-5 (tests/test_engine.py), and its narrow products to what tests/test_precision.py
# says, which a map of 6 tokens is too small a sample for.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, FLOAT8: 4e-2}
# Every model with every dtype and with both methods; all five ways with the first one.
WHOLE = [
    *(("bert", "direct", dtype) for dtype in LIMITS),
    ("bert", "operator", torch.float32),
    ("bert", "operator", torch.bfloat16),
    ("llama", "direct", torch.float32),
    ("llama", "operator", torch.bfloat16),
    ("llama", "mixed", torch.float32),
    ("llama", "direct", FLOAT8),
    ("mixtral", "operator", torch.float32),
    ("mixtral", "direct", torch.bfloat16),
    ("mixtral", "direct", FLOAT8),
]


def small(operator: str, tail: str, device: torch.device) -> list[Any]:
    """Arguments on ``device``; with a tail, of several sequences."""
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
    return [t.to(device) if isinstance(t, Tensor) and t is not sequences else t for t in given]


class Engine:
    """Of a backend whose kernels run on `device`, also where that is a CPU."""

    backend: str
    device: torch.device

    def needs_float8(self, dtype: torch.dtype) -> None:
        """Skips where there is no float8."""

    @pytest.fixture
    def operators(self) -> Iterator[Any]:
        """Its kernels, under the schemas and fakes of `ffattr.ops`."""
        raise NotImplementedError

    @pytest.mark.parametrize(("name", "method", "dtype"), WHOLE, ids=str)
    def test_all_scopes(self, name: str, method: str, dtype: torch.dtype) -> None:
        self.needs_float8(dtype)
        model = tiny_models.build(name, **MODELS[name]).to(self.device)
        given = {key: tensor.to(self.device) for key, tensor in tiny_models.inputs(name, batch=1, length=6).items()}
        expected = ffattr.attribute(model, given, scopes="all", backend="reference")
        found = ffattr.attribute(model, given, scopes="all", backend=self.backend, dtype=dtype, method=method)
        assert str(found.plan).startswith(
            f"{self.backend} backend, {str(dtype).removeprefix('torch.')} on {self.device}"
        )
        assert_same(found, expected, LIMITS[dtype])

    @pytest.mark.parametrize("tail", ["none", "all"])
    @pytest.mark.parametrize("operator", ops.OPERATORS)
    def test_opcheck(self, operator: str, tail: str, operators: Any) -> None:
        torch.library.opcheck(getattr(operators, operator).default, tuple(small(operator, tail, self.device)))

    def test_opcheck_of_float8(self, operators: Any) -> None:
        self.needs_float8(FLOAT8)
        given = narrowed(case("ff_norms", 2, 3, 16, 32, 2), FLOAT8)
        arguments = tuple(t.to(self.device) if isinstance(t, Tensor) else t for t in given.values())
        # The check of the schema, and that of dynamic shapes, do arithmetic that PyTorch does not have for float8.
        checks = ["test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(operators.ff_norms.default, arguments, test_utils=checks)

    @pytest.mark.parametrize("operator", ops.OPERATORS)
    def test_compiles_without_a_break(self, operator: str, operators: Any) -> None:
        torch.compiler.reset()  # every operator's is the same code, whose recompilations are counted together
        call = getattr(operators, operator)
        compiled = torch.compile(lambda *args: call(*args) * 2, fullgraph=True, backend="eager")
        for tail in ("none", "all"):
            given = small(operator, tail, self.device)
            assert torch.equal(compiled(*given), call(*given) * 2)
