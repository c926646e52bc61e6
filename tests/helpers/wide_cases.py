"""What the tests of all kernels of the wide maps share, whatever they are written in: cases, and what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import COLUMNS, KEY_AXIS, QUERY_AXIS, WRONG, batch, case, converted, make_triangular, table, wrong
from torch import Tensor

from ffattr.decomposition.precision import operand_dtype, quantised
from ffattr.ops import torch_kernels

FLOAT8 = torch.float8_e4m3fn
WIDE_OPERANDS = ("features", "values", "maps", "own", "slope", "down", "residual")
# Of a scope's largest entry. Narrow products are rounded a few times in a row, by 2^-9 in bfloat16, 2^-12 in float16
# and up to 2^-4, at random, in float8.
LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3, FLOAT8: 3e-2}
# Queries and keys of sequences: none, fewer queries than keys, as many, and queries without keys.
SIZES = [(1, 1), (3, 33), (0, 7), (5, 5), (2, 0)]


def narrowed(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A case of float32 with wide operands for products in ``dtype``."""
    named = {name: t.to(operand_dtype(dtype)) if name in WIDE_OPERANDS else t for name, t in given.items()}
    if dtype == FLOAT8:
        named["down"], named["down_scale"] = quantised(given["down"])
    return named


def definition(operator: str, given: dict[str, Any]) -> Tensor:
    """In float64."""
    out: Tensor = getattr(torch_kernels, operator)(*converted(given, torch.float64).values())
    return out


def error(out: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """The largest difference in any scope, in parts of the scope's largest entry, or of ``size`` ``[., 1, 1]``; NaN if
    there is one."""
    size = expected.amax((-1, -2)) if size is None else size[:, 0, 0]
    return float(((out - expected).abs().amax((-1, -2)) / torch.where(size == 0, 1, size)).max())


def assert_close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within `LIMITS`, and zero wherever ``expected`` is zero."""
    if expected.numel():
        far = error(out, expected)
        assert far <= LIMITS[dtype], f"{far:.1e} of the scope's largest entry, expected {LIMITS[dtype]:.1e}"
    assert (out[expected == 0] == 0).all(), "a pair without weight is not zero"


def last_pair(given: dict[str, Any]) -> dict[str, Any]:
    """The last query and the last key of a case without ``sequences``."""
    rest = {name: t[-1:] if name == "position" else t for name, t in given.items()}
    rest["alpha"] = given["alpha"][:, -1:, -1:]
    rest["position"] = given["position"][-1:] - (given["alpha"].shape[2] - 1)
    for name, axis in (QUERY_AXIS | KEY_AXIS).items():
        if rest.get(name) is not None and name != "position":
            rest[name] = rest[name].narrow(axis, rest[name].shape[axis] - 1, 1)
    return rest


def needs_memory(gigabytes: int, device: torch.device) -> Any:
    there = torch.cuda.get_device_properties(0).total_memory >> 30 if device.type == "cuda" else 0
    return pytest.param(True, marks=pytest.mark.skipif(there < gigabytes, reason=f"a GPU of {gigabytes} GB"), id="huge")


class Promises:
    """What every wide kernel promises. A subclass says which one it is and how it runs."""

    operator: str
    device: torch.device
    refused: type[Exception] = ValueError
    rounds: bool = True
    """Whether narrow types are rounded as GPUs do."""

    def kernel(self, *arguments: Any) -> Tensor:
        """The operator."""
        raise NotImplementedError

    def run(self, given: dict[str, Any], margin: int = 64) -> Tensor:
        """On `device`, every argument between guards."""
        raise NotImplementedError

    def needs_float8(self, dtype: torch.dtype) -> None:
        """Skips where there is no float8."""

    def assert_same(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        """By the same operations."""
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def check(self, given: dict[str, Any], dtype: torch.dtype = torch.float32, margin: int = 64) -> Tensor:
        """``given`` with wide products in ``dtype``: within `LIMITS` of the definition, and zero wherever that is."""
        given = narrowed(given, dtype)
        out = self.run(given, margin)
        assert_close(out, definition(self.operator, given), dtype)
        return out

    # ---- arguments

    @pytest.mark.parametrize("tail", ["none", "scale", "norm", "gamma", "rms", "all"])
    def test_optional_arguments(self, tail: str) -> None:
        given = case(self.operator, 5, 4, 72, heads=3, tail=tail)
        if given["residual_scale"] is not None:
            given["residual_scale"][2] *= -1  # no norm's, but nothing forbids it
        self.check(given)

    @pytest.mark.parametrize("positions", [[0, 0, 0, 0, 0], [-1, -7, 5, 6, 2**40], [4, 3, 2, 1, 0]])
    def test_positions(self, positions: list[int]) -> None:
        """Of queries that are the same token, that are not in the block, and that are each another one."""
        given = case(self.operator)
        given["position"] = torch.tensor(positions)
        found = self.check(given)
        nowhere = self.run({**given, "position": torch.full((5,), -1)})
        same = torch.isclose(found, nowhere, rtol=1e-5, atol=0).all(0)  # a GPU has a kernel of its own for these pairs
        assert torch.equal(~same, torch.tensor(positions)[:, None] == torch.arange(5))

    @pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
    def test_nothing_to_do(self, queries: int, keys: int) -> None:
        given = case(self.operator, streams=2)
        given["alpha"] = given["alpha"][:, :queries, :keys]
        for axes, size in ((QUERY_AXIS, queries), (KEY_AXIS, keys)):
            for name in axes.keys() & given.keys():
                given[name] = given[name].narrow(axes[name], 0, size)
        self.check(given)

    # ---- a matrix that is zero right of its diagonal

    @pytest.mark.parametrize(("width", "neurons"), [(136, 200), (200, 40)])
    @pytest.mark.parametrize("streams", [1, 2])
    def test_triangular(self, streams: int, width: int, neurons: int) -> None:
        """The same, and what lies far from the diagonal is not read."""
        given = make_triangular(case(self.operator, 3, 4, width, neurons, heads=3, streams=streams))
        self.check(given)
        given["position"] = torch.full((3,), -1)  # what a token brings itself may be made by a library
        found = self.run(given)
        given["down"][0, 135] = 1e6
        torch.testing.assert_close(self.run(given), found, rtol=0, atol=0)

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
        found = self.check(given)
        seen[7, 7] = True  # the diagonal keeps its residual
        assert torch.equal(found != 0, seen.expand_as(found))

    def test_nan_stays_in_its_pair(self) -> None:
        """In the attention weights: of the token itself, and of another one."""
        given = case(self.operator, 4, 6, 24, 24, heads=3)
        given["position"] = torch.arange(4)
        given["alpha"][2, 3, 5] = torch.nan
        given["alpha"][0, 1, 1] = torch.nan
        found = self.run(given)
        assert all(torch.equal(scope.isnan().nonzero(), torch.tensor([[1, 1], [3, 5]])) for scope in found)

    def test_nan_stays_with_its_key(self) -> None:
        """In its values or features, and in its residual."""
        given = case(self.operator, 3, 4, 24, 24, heads=2, head_dim=3, streams=2)
        name = "values" if self.operator == "operator_norms" else "features"
        given[name].select(KEY_AXIS[name], 2).select(-2, 0)[..., 1] = torch.nan
        given["residual"][3, 1, 5] = torch.nan
        found = self.run(given).isnan()
        assert torch.equal(found[0].any(0), torch.tensor([False, False, True, False]))
        assert torch.equal(found[1].any(0), torch.tensor([False, False, True, True]))

    def test_a_vanishing_square_is_no_nan(self) -> None:
        """The same in every column, of which centring leaves rounding errors of either sign after squaring."""
        given = case(self.operator, 5, 6, 40, 24, heads=3, tail="norm")
        given["down"] = torch.zeros(24, 40)
        given["residual"] = given["residual"][..., :1].expand(-1, -1, 40).contiguous()
        zero, size, centred = self.run(given)
        assert (zero == 0).all()
        # The root of one rounding error of the square.
        assert (centred <= 1e-3 * given["norm_scale"][:, None] * size).all()

    # ---- several sequences

    @pytest.mark.parametrize(("tail", "dtype"), [("none", torch.float32), ("all", FLOAT8)])
    def test_several_sequences_are_those_sequences(self, tail: str, dtype: torch.dtype) -> None:
        """In one call, with NaN in the padding: as many calls of one each, and zero everywhere else."""
        if dtype == FLOAT8 and self.operator == "operator_norms":
            dtype = torch.bfloat16
        self.needs_float8(dtype)
        # The interpreter's tiles are of 32 queries; `operator_norms` takes them one by one, at 0.1 s each.
        sizes = [(33, 1), *SIZES] if self.operator == "ff_norms" else SIZES
        single, joined = batch(self.operator, sizes, tail=tail, width=24, neurons=40, heads=2)
        found = self.check(joined, dtype)
        expected = torch.zeros_like(found)
        for (start, _), (queries, keys), given in zip(joined["sequences"].tolist(), sizes, single, strict=False):
            given = narrowed(given, dtype)
            expected[..., start : start + queries, :keys] = self.kernel(
                *(t.to(self.device) if isinstance(t, Tensor) else t for t in given.values())
            ).cpu()
        self.assert_same(found, expected, dtype)

    def test_sequences_of_nothing(self) -> None:
        for sizes in ([(0, 0)], [(3, 0)], [(0, 3), (2, 0)]):
            _, joined = batch(self.operator, sizes, width=24, neurons=24, heads=2, head_dim=16)
            found = self.check(joined)
            assert found.shape[-1] == COLUMNS
            assert (found == 0).all()

    def test_one_sequence_and_none(self) -> None:
        given = {
            n: t.to(self.device) if isinstance(t, Tensor) else t for n, t in case(self.operator, 3, 4, heads=2).items()
        }
        expected = self.kernel(*given.values())
        sequences = table([(3, 4)])
        for one in (sequences, sequences.T.contiguous().T):
            assert torch.equal(self.kernel(*given.values(), one), expected)

    # ---- memory

    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
    def test_inputs_that_are_not_contiguous(self, dtype: torch.dtype) -> None:
        if dtype == FLOAT8 and self.operator == "operator_norms":
            dtype = torch.bfloat16
        self.needs_float8(dtype)
        given = narrowed(case(self.operator, 3, 4, heads=2, streams=2), dtype)
        given = {name: t.to(self.device) if isinstance(t, Tensor) else t for name, t in given.items()}
        expected = self.kernel(*given.values())
        for name, tensor in given.items():
            if isinstance(tensor, Tensor):
                given[name] = torch.stack([tensor, tensor], -1)[..., 0]
                assert not given[name].is_contiguous()
        self.assert_same(self.kernel(*given.values()), expected, dtype)

    # ---- precision

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("streams", [1, 2])
    def test_no_worse_than_plain_pytorch(self, streams: int, dtype: torch.dtype) -> None:
        """In the same precision, that is; in float8 PyTorch has only `down`."""
        if dtype != torch.float16 and not self.rounds:
            return
        given = narrowed(case(self.operator, 5, 6, 72, 200, heads=3, head_dim=16, streams=streams), dtype)
        expected = definition(self.operator, given)
        found = error(self.run(given), expected)
        plain = error(getattr(torch_kernels, self.operator)(*given.values()), expected)
        assert found <= 2 * plain + (1e-6 if dtype == torch.float32 else 1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT8])
    def test_weights_of_any_size(self, dtype: torch.dtype) -> None:
        """Tiny weights keep their digits in narrow types, beside a pair with large ones in the same tile."""
        if dtype == FLOAT8 and self.operator == "operator_norms":
            return
        self.needs_float8(dtype)
        given = narrowed(case(self.operator, 4, 3, 24, 40, heads=3), dtype)
        given["position"] = torch.tensor([0, 7, 1, 7])
        given["alpha"] *= torch.tensor([1.0, 1e-12, 1e4, 1.0])[:, None]
        given["alpha"][:, 3] *= torch.tensor([1.0, 1e-9, 1e-9])[:, None]  # one head rules
        found, expected = self.run(given), definition(self.operator, given)
        far = ((found - expected).abs().amax(2) / expected.amax(2)).max()
        assert far <= 2 * LIMITS[dtype]  # the limit is one of scopes, and a row is a smaller sample of rounding errors

    # ---- errors

    def test_errors_name_operator_and_argument(self) -> None:
        for name, tensor in wrong(self.operator):
            given = {**case(self.operator), name: tensor}
            # Keys are counted in `residual`: with twice as many, the others have too few.
            named = rf"({name}|features|values)" if name == "residual" else name
            with pytest.raises(self.refused, match=rf"{self.operator}: .*\b{named}\b"):
                self.kernel(*given.values())

    def test_three_streams(self) -> None:
        name = "maps" if self.operator == "operator_norms" else "features"
        with pytest.raises(
            self.refused, match=rf"{self.operator}: {name} has shape \[3, .*\], expected \[(1 or 2|[12]), "
        ):
            self.kernel(*case(self.operator, streams=3).values())

    def test_float64_is_for_pytorch(self) -> None:
        given = case(self.operator, dtype=torch.float64)
        with pytest.raises(self.refused, match=f'{self.operator}: .*float64.*backend="torch"'):
            self.kernel(*given.values())

    def test_too_many_heads(self) -> None:
        given = case(self.operator, 1, 1, 8, 8, heads=129, head_dim=1)
        with pytest.raises(self.refused, match=f"{self.operator}: alpha has 129 heads, expected at most 128"):
            self.kernel(*given.values())

    @pytest.mark.parametrize("name", WRONG)
    def test_errors_of_sequences(self, name: str) -> None:
        given, (sequences, message) = case(self.operator), WRONG[name]
        given["alpha"] = given["alpha"][..., :3]
        with pytest.raises(self.refused, match=f"{self.operator}: sequences .*{message}"):
            self.kernel(*given.values(), sequences)

    def test_columns_that_are_not_keys(self) -> None:
        given = case(self.operator)
        given["alpha"] = given["alpha"][..., :3]
        with pytest.raises(
            self.refused,
            match=rf"{self.operator}: (alpha has 3 columns, expected 5|residual has shape \[5, .*expected \[3, )",
        ):
            self.kernel(*given.values())


class DirectPromises(Promises):
    """And what every kernel of `ff_norms` does."""

    operator = "ff_norms"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nan_stays_in_its_query(self, dtype: torch.dtype) -> None:
        """In the slopes, that is."""
        given = narrowed(case("ff_norms", 4, 3, 24, 24, heads=2, streams=2), dtype)
        given["slope"][1, 2, 5] = torch.nan
        assert torch.equal(self.run(given).isnan().any(0).any(1), torch.tensor([False, False, True, False]))

    @pytest.mark.parametrize("streams", [1, 2])
    def test_float8_of_columns_and_rows_of_any_size(self, streams: int) -> None:
        """Columns of ``down`` and rows of slopes are scaled one by one, and so are the features of every key."""
        self.needs_float8(FLOAT8)
        given = case("ff_norms", 3, 4, 24, 40, 3, streams=streams, tail="none")
        given["down"] *= 10.0 ** torch.arange(-8, 16)[:24] / 1e4
        given["down"][:, 3] = 0
        given["slope"][:, 1] *= 1e-6
        given["slope"][:, 2] = 0
        given["features"][:, 1] *= 1e5
        given["features"][:, 2] = 0
        out = self.check(given, FLOAT8)
        assert (out[0, 2] == 0).all()
        assert (out[0, :, 2] == 0).all()
        assert (out[1, :, 2] > 0).any(), "the residual of features that are zero"

    def test_float8_of_negative_features(self) -> None:
        """The largest is not the largest in size, which everything is divided by so that nothing overflows."""
        self.needs_float8(FLOAT8)
        given = case("ff_norms", 3, 4, 24, 40, 3, streams=2)
        given["features"] = -given["features"].abs()
        given["features"][..., 0] = 1e-2
        self.check(given, FLOAT8)
