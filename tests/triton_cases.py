"""What the tests of both wide Triton kernels share: how a case runs, and what both of them promise."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_ops import case, converted, wrong
from test_ops_sequences import COLUMNS, KEY_AXIS, QUERY_AXIS, WRONG, batch, table
from test_triton_ig_slope import DEVICE, Guards
from torch import Tensor

from ffattr import torch_ops
from ffattr.dtypes import operand_dtype, quantised

pytest.importorskip("ffattr.triton_ops")
configs = sys.modules["ffattr.triton_ops.configs"]
arguments = sys.modules["ffattr.triton_ops.arguments"]
INTERPRETED: bool = sys.modules["ffattr.triton_ops.runtime"].INTERPRETED

FLOAT8 = torch.float8_e4m3fn
WIDE_OPERANDS = ("features", "values", "maps", "own", "slope", "down", "residual")
# Of a scope's largest entry. Narrow products are rounded a few times in a row, by 2^-9 in bfloat16, 2^-12 in float16
# and up to 2^-4, at random, in float8.
LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3, FLOAT8: 3e-2}
FLOAT8_RUNS = INTERPRETED or torch.cuda.get_device_capability() >= (8, 9)
# Queries and keys of sequences: none, fewer queries than keys, as many, and queries without keys.
SIZES = [(1, 1), (3, 33), (0, 7), (5, 5), (2, 0)]


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
    """``ffattr.triton_ops.ff_norms`` as an attribute is the function."""
    return sys.modules[f"ffattr.triton_ops.{operator}"]


def function(operator: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(module(operator), operator)
    return found


def narrowed(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A case of float32 with wide operands for products in ``dtype``."""
    named = {name: t.to(operand_dtype(dtype)) if name in WIDE_OPERANDS else t for name, t in given.items()}
    if dtype == FLOAT8:
        named["down"], named["down_scale"] = quantised(given["down"])
    return named


def definition(operator: str, given: dict[str, Any]) -> Tensor:
    """In float64."""
    out: Tensor = getattr(torch_ops, operator)(*converted(given, torch.float64).values())
    return out


def run(operator: str, given: dict[str, Any], margin: int = 64) -> Tensor:
    """On `DEVICE`, every argument and all that kernels write between guards (see `Guards`). An odd ``margin`` rules TMA
    out."""
    guards = Guards(margin)
    guarded = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and name != "sequences":
            # Kernels read `down` column by column: a transposed one they take as it is, and do not copy.
            guarded[name] = guards.copy(value.T).T if name == "down" else guards.copy(value)
    zeros, empty, written = arguments.WideArguments.output, Tensor.new_empty, []

    def kept(tensor: Tensor) -> Tensor:
        written.append(tensor)
        return tensor

    def new_empty(self: Tensor, *shape: int, **named: Any) -> Tensor:
        """Of `operator_norms`: its operators, which one kernel writes and the next one reads. Triton says a device."""
        return empty(self, *shape, **named) if named else kept(guards.empty(torch.Size(shape), self.dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments.WideArguments, "output", lambda self: kept(guards.copy(zeros(self))))
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
    out, expected = run(operator, given, margin), definition(operator, given)
    if expected.numel():
        far = error(out, expected)
        assert far <= LIMITS[dtype], f"{far:.1e} of the scope's largest entry, expected {LIMITS[dtype]:.1e}"
    assert (out[expected == 0] == 0).all(), "a pair without weight is not zero"
    return out


def error(out: Tensor, expected: Tensor) -> float:
    """The largest difference in any scope, in parts of the scope's largest entry; NaN if there is one."""
    size = expected.amax((-1, -2))
    return float(((out - expected).abs().amax((-1, -2)) / torch.where(size == 0, 1, size)).max())


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
    patch.setattr(configs, "_chosen", lambda *_: config)


def last_pair(given: dict[str, Any]) -> dict[str, Any]:
    """The last query and the last key of a case without ``sequences``."""
    rest = {name: t[-1:] if name == "position" else t for name, t in given.items()}
    rest["alpha"] = given["alpha"][:, -1:, -1:]
    rest["position"] = given["position"][-1:] - (given["alpha"].shape[2] - 1)
    for name, axis in (QUERY_AXIS | KEY_AXIS).items():
        if rest.get(name) is not None and name != "position":
            rest[name] = rest[name].narrow(axis, rest[name].shape[axis] - 1, 1)
    return rest


def needs_memory(gigabytes: int) -> Any:
    there = torch.cuda.get_device_properties(0).total_memory >> 30 if DEVICE.type == "cuda" else 0
    return pytest.param(True, marks=pytest.mark.skipif(there < gigabytes, reason=f"a GPU of {gigabytes} GB"), id="huge")


def check_last_pair(operator: str, given: dict[str, Any]) -> None:
    """Nothing but the last query's weight for the last key is there, behind 2^31 elements or more of some argument."""
    given = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in given.items()}
    out = function(operator)(*given.values())
    expected = definition(operator, last_pair(given))
    assert error(out[..., -1:, -1:], expected) <= LIMITS[given["residual"].dtype]
    assert out.count_nonzero() == expected.numel()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To be imported. Memory from ``torch.empty`` is full of NaN, so that what a kernel leaves out shows; one thread:
    tensors are small; and the interpreter rounds as GPUs do."""
    round_as_gpus_do(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would want an environment variable
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


class Promises:
    """What both wide kernels promise; a subclass names one of them."""

    operator: str

    @functools.cached_property
    def kernel(self) -> Callable[..., Tensor]:
        return function(self.operator)

    # ---- arguments

    @pytest.mark.parametrize("tail", ["none", "scale", "norm", "gamma", "rms", "all"])
    def test_optional_arguments(self, tail: str) -> None:
        given = case(self.operator, 5, 4, 72, heads=3, tail=tail)
        if given["residual_scale"] is not None:
            given["residual_scale"][2] *= -1  # no norm's, but nothing forbids it
        check(self.operator, given)

    @pytest.mark.parametrize("positions", [[0, 0, 0, 0, 0], [-1, -7, 5, 6, 2**40], [4, 3, 2, 1, 0]])
    def test_positions(self, positions: list[int]) -> None:
        """Of queries that are the same token, that are not in the block, and that are each another one."""
        given = case(self.operator)
        given["position"] = torch.tensor(positions)
        found = check(self.operator, given)
        nowhere = run(self.operator, {**given, "position": torch.full((5,), -1)})
        same = torch.isclose(found, nowhere, rtol=1e-5, atol=0).all(0)  # a GPU has a kernel of its own for these pairs
        assert torch.equal(~same, torch.tensor(positions)[:, None] == torch.arange(5))

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
        check(self.operator, case(self.operator, queries, keys, 24, 72, heads=2, head_dim=20, streams=2), dtype)

    @pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
    def test_nothing_to_do(self, queries: int, keys: int) -> None:
        given = case(self.operator, streams=2)
        given["alpha"] = given["alpha"][:, :queries, :keys]
        for axes, size in ((QUERY_AXIS, queries), (KEY_AXIS, keys)):
            for name in axes.keys() & given.keys():
                given[name] = given[name].narrow(axes[name], 0, size)
        check(self.operator, given)

    # ---- weights that are zero or not a number

    @pytest.mark.parametrize("window", [None, 3])
    def test_masks(self, window: int | None) -> None:
        """Pairs without weight are exactly zero; of the first block of queries with the last keys all are."""
        given = case(self.operator, 34, 34, 16, 16, heads=2)
        seen = torch.ones(34, 34).tril().bool()
        if window is not None:
            seen &= ~torch.ones(34, 34).tril(-window).bool()
        seen[7] = False
        given["alpha"] = given["alpha"] * seen
        given["position"] = torch.arange(34)
        found = check(self.operator, given)
        seen[7, 7] = True  # the diagonal keeps its residual
        assert torch.equal(found != 0, seen.expand_as(found))

    def test_nan_stays_in_its_pair(self) -> None:
        """In the attention weights: of the token itself, and of another one."""
        given = case(self.operator, 4, 6, 24, 24, heads=3)
        given["position"] = torch.arange(4)
        given["alpha"][2, 3, 5] = torch.nan
        given["alpha"][0, 1, 1] = torch.nan
        found = run(self.operator, given)
        assert all(torch.equal(scope.isnan().nonzero(), torch.tensor([[1, 1], [3, 5]])) for scope in found)

    def test_nan_stays_with_its_key(self) -> None:
        """In its values or features, and in its residual."""
        given = case(self.operator, 3, 4, 24, 24, heads=2, head_dim=3, streams=2)
        name = "values" if self.operator == "operator_norms" else "features"
        given[name].select(KEY_AXIS[name], 2).select(-2, 0)[..., 1] = torch.nan
        given["residual"][3, 1, 5] = torch.nan
        found = run(self.operator, given).isnan()
        assert torch.equal(found[0].any(0), torch.tensor([False, False, True, False]))
        assert torch.equal(found[1].any(0), torch.tensor([False, False, True, True]))

    def test_a_vanishing_square_is_no_nan(self) -> None:
        """The same in every column, of which centring leaves rounding errors of either sign after squaring."""
        given = case(self.operator, 5, 6, 40, 24, heads=3, tail="norm")
        given["down"] = torch.zeros(24, 40)
        given["residual"] = given["residual"][..., :1].expand(-1, -1, 40).contiguous()
        zero, size, centred = run(self.operator, given)
        assert (zero == 0).all()
        # The root of one rounding error of the square.
        assert (centred <= 1e-3 * given["norm_scale"][:, None] * size).all()

    # ---- several sequences

    @pytest.mark.parametrize(("tail", "dtype"), [("none", torch.float32), ("all", FLOAT8)])
    def test_several_sequences_are_those_sequences(self, tail: str, dtype: torch.dtype) -> None:
        """In one call, with NaN in the padding: as many calls of one each, and zero everywhere else."""
        if dtype == FLOAT8 and self.operator == "operator_norms":
            dtype = torch.bfloat16
        needs_float8(dtype)
        # The interpreter's tiles are of 32 queries; `operator_norms` takes them one by one, at 0.1 s each.
        sizes = [(33, 1), *SIZES] if self.operator == "ff_norms" else SIZES
        single, joined = batch(self.operator, sizes, tail=tail, width=24, neurons=40, heads=2)
        found = check(self.operator, joined, dtype)
        expected = torch.zeros_like(found)
        for (start, _), (queries, keys), given in zip(joined["sequences"].tolist(), sizes, single, strict=False):
            given = narrowed(given, dtype)
            expected[..., start : start + queries, :keys] = self.kernel(
                *(t.to(DEVICE) if isinstance(t, Tensor) else t for t in given.values())
            ).cpu()
        assert_same(self.operator, found, expected, dtype)

    def test_sequences_of_nothing(self) -> None:
        for sizes in ([(0, 0)], [(3, 0)], [(0, 3), (2, 0)]):
            _, joined = batch(self.operator, sizes, width=24, neurons=24, heads=2, head_dim=16)
            found = check(self.operator, joined)
            assert found.shape[-1] == COLUMNS
            assert (found == 0).all()

    def test_one_sequence_and_none(self) -> None:
        given = {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in case(self.operator, 3, 4, heads=2).items()}
        expected = self.kernel(*given.values())
        sequences = table([(3, 4)])
        for one in (sequences, sequences.T.contiguous().T):
            assert torch.equal(self.kernel(*given.values(), one), expected)

    # ---- memory

    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
    def test_inputs_that_are_not_contiguous(self, dtype: torch.dtype) -> None:
        if dtype == FLOAT8 and self.operator == "operator_norms":
            dtype = torch.bfloat16
        needs_float8(dtype)
        given = narrowed(case(self.operator, 3, 4, heads=2, streams=2), dtype)
        given = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in given.items()}
        expected = self.kernel(*given.values())
        for name, tensor in given.items():
            if isinstance(tensor, Tensor):
                given[name] = torch.stack([tensor, tensor], -1)[..., 0]
                assert not given[name].is_contiguous()
        assert_same(self.operator, self.kernel(*given.values()), expected, dtype)

    # ---- precision

    @pytest.mark.parametrize(
        "dtype", [torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16, FLOAT8]
    )
    @pytest.mark.parametrize("streams", [1, 2])
    def test_no_worse_than_plain_pytorch(self, streams: int, dtype: torch.dtype) -> None:
        """In the same precision, that is. The interpreter truncates to bfloat16, and for float8 takes its bfloat16."""
        if dtype == FLOAT8 and self.operator == "operator_norms":
            return
        needs_float8(dtype)
        given = narrowed(case(self.operator, 5, 6, 72, 200, heads=3, head_dim=16, streams=streams), dtype)
        expected = definition(self.operator, given)
        found = error(run(self.operator, given), expected)
        plain = error(getattr(torch_ops, self.operator)(*given.values()), expected)
        assert found <= 2 * plain + (1e-6 if dtype == torch.float32 else 1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT8])
    def test_weights_of_any_size(self, dtype: torch.dtype) -> None:
        """Tiny weights keep their digits in narrow types, beside a pair with large ones in the same tile."""
        if dtype == FLOAT8 and self.operator == "operator_norms":
            return
        needs_float8(dtype)
        given = narrowed(case(self.operator, 4, 3, 24, 40, heads=3), dtype)
        given["position"] = torch.tensor([0, 7, 1, 7])
        given["alpha"] *= torch.tensor([1.0, 1e-12, 1e4, 1.0])[:, None]
        given["alpha"][:, 3] *= torch.tensor([1.0, 1e-9, 1e-9])[:, None]  # one head rules
        found, expected = run(self.operator, given), definition(self.operator, given)
        far = ((found - expected).abs().amax(2) / expected.amax(2)).max()
        assert far <= 2 * LIMITS[dtype]  # the limit is one of scopes, and a row is a smaller sample of rounding errors

    # ---- errors

    def test_errors_name_operator_and_argument(self) -> None:
        for name, tensor in wrong(self.operator):
            given = {**case(self.operator), name: tensor}
            # Keys are counted in `residual`: with twice as many, the others have too few.
            named = rf"({name}|features|values)" if name == "residual" else name
            with pytest.raises(ValueError, match=rf"{self.operator}: .*\b{named}\b"):
                self.kernel(*given.values())

    def test_three_streams(self) -> None:
        name = "maps" if self.operator == "operator_norms" else "features"
        with pytest.raises(ValueError, match=rf"{self.operator}: {name} has shape \[3, .*\], expected \[[12], "):
            self.kernel(*case(self.operator, streams=3).values())

    def test_float64_is_for_pytorch(self) -> None:
        given = case(self.operator, dtype=torch.float64)
        with pytest.raises(ValueError, match=f'{self.operator}: .*torch.float64.*backend="torch"'):
            self.kernel(*given.values())

    def test_too_many_heads(self) -> None:
        given = case(self.operator, 1, 1, 8, 8, heads=129, head_dim=1)
        with pytest.raises(ValueError, match=f"{self.operator}: alpha has 129 heads, expected at most 128"):
            self.kernel(*given.values())

    @pytest.mark.parametrize("name", WRONG)
    def test_errors_of_sequences(self, name: str) -> None:
        given, (sequences, message) = case(self.operator), WRONG[name]
        given["alpha"] = given["alpha"][..., :3]
        with pytest.raises(ValueError, match=f"{self.operator}: sequences .*{message}"):
            self.kernel(*given.values(), sequences)

    def test_columns_that_are_not_keys(self) -> None:
        given = case(self.operator)
        given["alpha"] = given["alpha"][..., :3]
        with pytest.raises(ValueError, match=f"{self.operator}: alpha has 3 columns, expected 5"):
            self.kernel(*given.values())
