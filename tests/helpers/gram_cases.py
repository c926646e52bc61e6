"""What every kernel of ``gram_norms`` for GPUs promises, against plain PyTorch in float64."""

from __future__ import annotations

import contextlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from guards import Guards
from op_cases import case, converted
from torch import Tensor

from ffattr.ops import torch_kernels


def several(lengths: list[int], rows: list[slice], heads: int = 5, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """Sequences with these numbers of keys, each with the queries ``rows`` of it; padding is NaN."""
    parts = [case("gram_norms", length, max(length, 1), heads=heads, seed=seed + b) for b, length in enumerate(lengths)]
    alphas = []
    for part, length, some in zip(parts, lengths, rows, strict=True):
        alpha = part["alpha"][:, some, :length].tril() if length % 2 else part["alpha"][:, some, :length]
        alphas.append(torch.nn.functional.pad(alpha, (0, max(lengths) + 3 - length), value=math.nan))
    positions = [torch.arange(length)[some] for length, some in zip(lengths, rows, strict=True)]
    grams = [part["gram"][:length] for part, length in zip(parts, lengths, strict=True)]
    scales = [part["row_scale"][some] for part, some in zip(parts, rows, strict=True)]
    given = {
        "alpha": torch.cat(alphas, 1),
        "position": torch.cat(positions),
        "gram": torch.cat(grams),
        "row_scale": torch.cat(scales),
    }
    sizes = torch.tensor([[len(p), length] for p, length in zip(positions, lengths, strict=True)])
    return given, torch.cat([torch.zeros(1, 2, dtype=torch.int64), sizes.cumsum(0)])


class Promises:
    """A subclass has a kernel."""

    device: torch.device
    refused: type[Exception]

    def kernel(self, *arguments: Any, **named: Any) -> Tensor:
        raise NotImplementedError

    def allocations(self, guards: Guards) -> contextlib.AbstractContextManager[None]:
        """In it, what the kernel allocates comes from ``guards``, if that can be."""
        return contextlib.nullcontext()

    def run(self, given: dict[str, Any], sequences: Tensor | None = None, margin: int = 64) -> Tensor:
        guards = Guards(margin, self.device)
        arguments = [guards.copy(given[name]) for name in ("alpha", "position", "gram", "row_scale")]
        with self.allocations(guards):
            out: Tensor = self.kernel(*arguments, sequences)
        guards.check()
        assert out.shape == given["alpha"].shape[1:]
        assert out.dtype == torch.float32
        return out.cpu()

    def check(self, given: dict[str, Any], margin: int = 64) -> Tensor:
        out = self.run(given, margin=margin)
        expected = torch_kernels.gram_norms(**converted(given, torch.float64))
        # Everything is float64 but the norm and its product with the scale: two roundings.
        assert ((out - expected).abs() <= 1.01 * torch.finfo(torch.float32).eps * expected).all()
        return out

    # ---- values

    @pytest.mark.parametrize("margin", [64, 67])
    @pytest.mark.parametrize("tail", ["none", "all"])
    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 70), (5, 5), (33, 5), (17, 65), (131, 9)])
    def test_odd_sizes(self, queries: int, keys: int, tail: str, margin: int) -> None:
        self.check(case("gram_norms", queries, keys, heads=4, tail=tail), margin)

    @pytest.mark.parametrize("tail", ["none", "all"])
    @pytest.mark.parametrize("heads", [1, 2, 5, 12, 17])
    def test_heads(self, heads: int, tail: str) -> None:
        self.check(case("gram_norms", heads=heads, tail=tail))

    def test_many_heads(self) -> None:
        self.check(case("gram_norms", 2, 3, width=130, heads=64))

    @pytest.mark.parametrize("positions", [[0, 0, 0, 0, 0], [-1, -7, 5, 6, 2**40], [4, 3, 2, 1, 0]])
    def test_positions(self, positions: list[int]) -> None:
        given = case("gram_norms")
        given["position"] = torch.tensor(positions)
        found = self.check(given)
        same = found == self.run({**given, "position": torch.full((5,), -1)})
        assert torch.equal(~same, torch.tensor(positions)[:, None] == torch.arange(5))

    def test_pairs_without_weight_are_exactly_zero(self) -> None:
        given = case("gram_norms", 33, 33)
        given["alpha"] = given["alpha"].tril()
        given["alpha"][:, 7] = 0
        given["position"] = torch.arange(33)
        zero = torch.ones(33, 33).triu(1).bool()
        zero[7, :7] = True
        assert torch.equal(self.check(given) == 0, zero)  # the diagonal keeps its residual

    def test_nan_stays_in_its_pair(self) -> None:
        given = case("gram_norms", 6, 40)
        given["position"] = torch.arange(6)
        given["alpha"][2, 4, 9] = math.nan
        given["alpha"][0, 1, 1] = math.nan
        assert torch.equal(self.run(given).isnan().nonzero(), torch.tensor([[1, 1], [4, 9]]))

    def test_a_vanishing_square_is_no_nan(self) -> None:
        """Three vectors that cancel but for rounding, of either sign after squaring."""
        two = torch.randn(50, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        features = torch.cat([two, -two.sum(1, keepdim=True)], 1)
        alpha = torch.linspace(0.1, 1, 50).expand(3, 4, 50).contiguous()
        given = {"alpha": alpha, "position": torch.full((4,), -1), "gram": features @ features.mT, "row_scale": None}
        assert (self.run(given) <= 1e-6).all()

    # ---- several sequences

    @pytest.mark.parametrize("every", [1, 3])
    def test_several_sequences_are_those_sequences(self, every: int) -> None:
        """All queries of each, then some of the first but none of the third."""
        lengths = [1, 33, 5, 18]
        rows = [slice(None)] * 4 if every == 1 else [slice(0, 1), slice(20, 25), slice(0, 0), slice(2, 18)]
        given, sequences = several(lengths, rows)
        found = self.run(given, sequences)
        expected = torch.zeros_like(found)
        for (first, first_key), (last, last_key) in pairwise(sequences.tolist()):
            keys = last_key - first_key
            alone = {
                "alpha": given["alpha"][:, first:last, :keys],
                "position": given["position"][first:last],
                "gram": given["gram"][first_key:last_key],
                "row_scale": given["row_scale"][first:last],
            }
            if last > first:
                expected[first:last, :keys] = self.check(alone)
        assert torch.equal(found, expected)  # in the padding, too

    def test_padding_is_zero_whatever_it_stands_for(self) -> None:
        given, sequences = several([3, 0, 2], [slice(None), slice(0, 0), slice(None)])
        sequences[1, 0], sequences[2, 0] = 2, 3  # the third query is of the sequence without keys
        given["position"][:] = 3
        given["row_scale"][:] = math.inf
        given["alpha"] = given["alpha"].where(given["alpha"] != 0, 1)
        known = torch.tensor([3, 3, 0, 2, 2])[:, None] > torch.arange(6)
        assert torch.equal(self.run(given, sequences) != 0, known)
        assert torch.equal(self.run({**given, "row_scale": None}, sequences) != 0, known)

    # ---- memory

    @pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
    def test_nothing_to_do(self, queries: int, keys: int) -> None:
        given = case("gram_norms")
        given = {
            "alpha": given["alpha"][:, :queries, :keys],
            "position": given["position"][:queries],
            "gram": given["gram"][:keys],
            "row_scale": given["row_scale"][:queries],
        }
        assert self.run(given).shape == (queries, keys)

    def test_inputs_that_are_not_contiguous(self) -> None:
        given = {name: tensor.to(self.device) for name, tensor in case("gram_norms", 9, 21).items()}
        expected = self.kernel(**given)
        for name, tensor in given.items():
            given[name] = torch.stack([tensor, tensor], -1)[..., 0]
            assert torch.equal(given[name], tensor)
        assert not any(tensor.is_contiguous() for tensor in given.values())
        assert torch.equal(self.kernel(**given), expected)

    # ---- errors

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"alpha": torch.ones(5, 5, 5).double()}, 'alpha has dtype .*float64, .*float32; use backend="torch"'),
            ({"gram": torch.ones(5, 6, 6)}, "gram has dtype .*float32, expected .*float64"),
            ({"position": torch.ones(4).long()}, r"position has shape \[4\], expected \[5\]"),
            ({"position": torch.ones(5).int()}, "position has dtype .*int32, expected .*int64"),
            ({"row_scale": torch.ones(6)}, r"row_scale has shape \[6\], expected \[5\]"),
            ({"row_scale": torch.ones(5).double()}, "row_scale has dtype .*float64, expected .*float32"),
            (
                {"sequences": torch.tensor([[0, 0], [5, 6]])},
                r"sequences goes from \[0, 0\] to \[5, 6\], expected .*\[5, 5\]",
            ),
            (
                {"alpha": torch.ones(5, 5, 4), "sequences": torch.tensor([[0, 0], [5, 5]])},
                "5 keys .*, but alpha only 4",
            ),
        ],
    )
    def test_bad_arguments_are_named(self, changed: dict[str, Tensor], named: str) -> None:
        given = {**case("gram_norms"), **changed}
        with pytest.raises(self.refused, match=named):
            self.kernel(**{name: t if name == "sequences" else t.to(self.device) for name, t in given.items()})
