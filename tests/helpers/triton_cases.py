"""What the tests of both wide Triton kernels share: how a case runs, and what both of them promise."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guards import DEVICE, Guards
from op_cases import batch, case, largest_norms
from torch import Tensor
from wide_cases import FLOAT8, LIMITS, SIZES, Promises, assert_close, definition, error, last_pair, narrowed

pytest.importorskip("ffattr.ops.triton")
configs = sys.modules["ffattr.ops.triton.configs"]
arguments = sys.modules["ffattr.ops.triton.arguments"]
INTERPRETED: bool = sys.modules["ffattr.ops.triton.runtime"].INTERPRETED

FLOAT8_RUNS = INTERPRETED or torch.cuda.get_device_capability() >= (8, 9)


def round_as_gpus_do(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter truncates to bfloat16 where a GPU rounds, and for float8 it may halve what it rounds up to a
    power of two. PyTorch's conversions are right, and faster."""
    if not INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": FLOAT8}

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        before, after = types.get(source.name), types.get(target.name)
        if before is None or after is None or before.itemsize <= after.itemsize:
            return convert(data, source, target, rounding)
        narrow = torch.from_numpy(data.copy()).view(before).to(after)
        return narrow.view(torch.uint16 if after.itemsize == 2 else torch.uint8).numpy()

    patch.setattr(interpreter, "_convert_float", converted)


def needs_float8(dtype: torch.dtype) -> None:
    if dtype == FLOAT8 and not FLOAT8_RUNS:
        pytest.skip("this GPU has no float8")


def module(operator: str) -> Any:
    """``ffattr.ops.triton.ff_norms`` as an attribute is the function."""
    return sys.modules[f"ffattr.ops.triton.{operator}"]


def function(operator: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(module(operator), operator)
    return found


def run(operator: str, given: dict[str, Any], margin: int = 64) -> Tensor:
    """On `DEVICE`, every argument and all that kernels write between guards (see `Guards`). An odd ``margin`` rules TMA
    out."""
    guards = Guards(margin)
    guarded = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and name != "sequences":
            # Kernels read `down` column by column: a transposed one they take as it is, and do not copy.
            guarded[name] = guards.copy(value.T).T if name == "down" else guards.copy(value)
    zeros, empty, written = arguments.WideArguments.allocate_output, Tensor.new_empty, []

    def kept(tensor: Tensor) -> Tensor:
        written.append(tensor)
        return tensor

    def new_empty(self: Tensor, *shape: int, **named: Any) -> Tensor:
        """Of `operator_norms`: its operators, which one kernel writes and the next one reads. Triton says a device."""
        return empty(self, *shape, **named) if named else kept(guards.empty(torch.Size(shape), self.dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments.WideArguments, "allocate_output", lambda self: kept(guards.copy(zeros(self))))
        patch.setattr(Tensor, "new_empty", new_empty)
        out = function(operator)(*guarded.values())
    guards.check(*written)
    scopes = 2 if given["norm_scale"] is None else 3
    assert out.shape == (scopes, *given["alpha"].shape[1:])
    assert out.dtype == torch.float32
    return out.cpu()


def check(operator: str, given: dict[str, Any], dtype: torch.dtype = torch.float32, margin: int = 64) -> Tensor:
    """``given`` with wide products in ``dtype``: within `LIMITS` of the definition, and zero wherever that is zero."""
    given = narrowed(given, dtype)
    out = run(operator, given, margin)
    assert_close(out, definition(operator, given), dtype)
    return out


def assert_same(operator: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """By the same operations. `operator_norms` leaves some products to PyTorch, which may do them in another order
    where there are more of them, or lie otherwise in memory."""
    limit = LIMITS[dtype] if operator == "operator_norms" else 0 if INTERPRETED else 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=limit * expected.max().item())


def watch_tma(patch: pytest.MonkeyPatch, operator: str, allowed: bool) -> list[bool]:
    """What the operator hears of `tma_fits`: No if not ``allowed``. Not asked on a GPU whose tiles do without TMA."""
    answers: list[bool] = []
    real = module(operator).tma_fits

    def asked(*matrices: Tensor) -> bool:
        answers.append(allowed and real(*matrices))
        return answers[-1]

    patch.setattr(module(operator), "tma_fits", asked)
    return answers


def tile(patch: pytest.MonkeyPatch, *sizes: int, warps: int = 4, stages: int = 2) -> None:
    """Every kernel works in tiles of ``queries, columns, neurons``, whatever the rules say."""
    config = configs.Config(*sizes, warps, stages, INTERPRETED or torch.cuda.get_device_capability() >= (9, 0))
    patch.setattr(configs, "_choose_config", lambda *_: config)


def check_last_pair(operator: str, given: dict[str, Any]) -> None:
    """Nothing but the last query's weight for the last key is there, behind 2^31 elements or more of some argument."""
    given = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in given.items()}
    out = function(operator)(*given.values())
    expected = definition(operator, last_pair(given))
    assert error(out[..., -1:, -1:], expected) <= LIMITS[given["residual"].dtype]
    assert out.count_nonzero() == expected.numel()


class TritonPromises(Promises):
    """Of both wide Triton kernels."""

    device = DEVICE
    rounds = not INTERPRETED  # to bfloat16 it truncates, and for float8 it takes its bfloat16

    def kernel(self, *arguments: Any) -> Tensor:
        return function(self.operator)(*arguments)

    def run(self, given: dict[str, Any], margin: int = 64) -> Tensor:
        return run(self.operator, given, margin)

    def needs_float8(self, dtype: torch.dtype) -> None:
        needs_float8(dtype)

    def assert_same(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        assert_same(self.operator, found, expected, dtype)

    @pytest.mark.parametrize("size", ["small", "large"])
    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
    def test_tiles(self, dtype: torch.dtype, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Loops that turn often, and tiles that no matrix fills."""
        if dtype == FLOAT8 and self.operator == "operator_norms":
            dtype = torch.bfloat16
        needs_float8(dtype)
        if size == "small":
            tile(monkeypatch, 16, 16, 32)
        else:
            tile(monkeypatch, 128, 128, 128 if dtype == FLOAT8 else 64, warps=8, stages=1)
        queries, keys = (17, 2) if self.operator == "ff_norms" else (2, 17)
        self.check(case(self.operator, queries, keys, 24, 72, heads=2, head_dim=20, streams=2), dtype)

    def check_reduction(self, given: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """Within `LIMITS` of the definition, in parts of the scope's largest L1 norm."""
        given = narrowed(given, dtype)
        out, expected = self.run(given), definition(self.operator, given)
        far = error(out, expected, largest_norms(self.operator, given, expected))
        assert far <= LIMITS[dtype], f"{far:.1e}, expected {LIMITS[dtype]:.1e}"
        return out

    @pytest.mark.parametrize("tail", ["none", "scale", "norm", "gamma", "rms", "all"])
    @pytest.mark.parametrize("reduction", ["l1", "alti"])
    def test_reductions(self, reduction: str, tail: str) -> None:
        given = case(self.operator, 7, 5, 72, heads=3, streams=2, tail=tail, reduction=reduction)
        if given["residual_scale"] is not None:
            given["residual_scale"][2] *= -1
        given["position"][:3] = torch.tensor([1, -1, 4])
        self.check_reduction(given)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FLOAT8])
    @pytest.mark.parametrize("reduction", ["l1", "alti"])
    def test_reductions_of_narrow_products(self, reduction: str, dtype: torch.dtype) -> None:
        """Of any size: rows are divided by their largest weight, and compared as large as they are."""
        if dtype == FLOAT8 and self.operator == "operator_norms":
            return
        needs_float8(dtype)
        for tail in ("all", "scale"):
            given = case(self.operator, 5, 6, 72, 200, heads=3, head_dim=16, tail=tail, reduction=reduction)
            self.check_reduction(given, dtype)
        given["alpha"], given["position"] = given["alpha"] * 1e-9, given["position"] + 9
        if reduction == "alti":
            given["totals"] *= 1e-9
        self.check_reduction(given, dtype)

    @pytest.mark.parametrize("reduction", ["l1", "alti"])
    def test_reductions_of_masks_and_of_what_is_no_number(self, reduction: str) -> None:
        given = case(self.operator, 34, 34, 16, 16, heads=2, reduction=reduction)
        given["alpha"], given["position"] = given["alpha"].tril(), torch.arange(34)
        found = self.check_reduction(given)
        assert (found.triu(1) == 0).all()
        given["alpha"][1, 20, 3] = torch.nan
        found = self.run(given)
        assert all(torch.equal(scope.isnan().nonzero(), torch.tensor([[20, 3]])) for scope in found)

    @pytest.mark.parametrize("reduction", ["l1", "alti"])
    def test_reductions_of_sequences(self, reduction: str) -> None:
        single, joined = batch(self.operator, SIZES, width=24, neurons=24, heads=2, reduction=reduction)
        found, start = self.run(joined), 0
        for given in single:
            queries, keys = given["alpha"].shape[1:]
            expected = definition(self.operator, given)
            if expected.numel():
                size = largest_norms(self.operator, given, expected)
                assert error(found[:, start : start + queries, :keys], expected, size) <= LIMITS[torch.float32]
            start += queries

    def test_errors_of_reductions(self) -> None:
        given = case(self.operator, reduction="alti")
        for changed, words in (
            ({"reduction": "l3"}, "reduction is 'l3'"),
            ({"totals": None}, "without totals"),
            ({"totals": given["totals"][:2]}, r"totals has shape \[2, "),
        ):
            with pytest.raises(ValueError, match=f"{self.operator}: .*{words}"):
                self.kernel(*{**given, **changed}.values())
