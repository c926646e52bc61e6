"""The CUDA kernel of ``gram_norms``, on the GPU or emulated, against plain PyTorch in float64."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from emulated import DEVICE
from gram_cases import Promises, several
from guards import Guards
from op_cases import case
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")


class TestPromises(Promises):
    device = DEVICE
    refused = RuntimeError

    def kernel(self, *arguments: Any, **named: Any) -> Tensor:
        out: Tensor = torch.ops.ffattr_cuda.gram_norms(*arguments, **named)
        return out

    def allocations(self, guards: Guards) -> contextlib.AbstractContextManager[None]:
        return guards.allocations()

    @pytest.mark.parametrize("tail", ["none", "all"])
    @pytest.mark.parametrize("heads", [18, 19, 35, 36, 67, 68, 128])
    def test_more_heads_are_fewer_keys_for_a_block(self, heads: int, tail: str) -> None:
        """8, 4, 2, 1; with fewer than 8, warps share a key and divide the rows of its matrix."""
        self.check(case("gram_norms", 3, 11, width=2 * heads, heads=heads, tail=tail))
        self.check(case("gram_norms", 130, 3, width=2 * heads, heads=heads, tail=tail), margin=67)

    @pytest.mark.parametrize("queries", [2040, 2050, 2300])
    def test_more_queries_than_blocks_that_go_together(self, queries: int) -> None:
        given = case("gram_norms", queries, 10, heads=2)
        given["position"] = torch.arange(queries) % 16
        self.check(given)

    def test_more_sequences_than_a_launch_takes(self) -> None:
        given, sequences = several([1 + b % 3 for b in range(150)], [slice(None)] * 150, heads=2)
        found = self.run(given, sequences)
        parts = [self.run(*several([1 + b % 3], [slice(None)], heads=2, seed=b)) for b in range(150)]
        for (first, _), part in zip(sequences.tolist(), parts, strict=False):
            columns = min(part.shape[1], found.shape[1])
            assert torch.equal(found[first : first + len(part), :columns], part[:, :columns])

    def test_pairs_without_weight_are_zero_whatever_the_matrix_holds(self) -> None:
        given = case("gram_norms", 140, 12)
        given["alpha"][:, :130, :9] = 0
        given["alpha"][:, 135] = 0
        given["position"][:] = -1
        given["position"][135] = 2
        given["row_scale"][3] = math.inf
        given["gram"][5] = math.nan
        found = self.run(given)
        zero = torch.zeros(140, 12, dtype=torch.bool)
        zero[:130, :9] = zero[135] = True
        zero[135, 2] = False  # its own
        assert torch.equal(found == 0, zero)
        assert torch.equal(found.isnan().any(0).nonzero(), torch.tensor([[5]]))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"alpha": torch.ones(5, 5)}, r"alpha has to be \[H, N, M\], gram \[M, G, G\]"),
        ({"gram": torch.ones(5, 6).double()}, r"alpha has to be \[H, N, M\], gram \[M, G, G\]"),
        ({"alpha": torch.ones(5, 5, 6)}, r"gram has shape \[5, 6, 6\], expected \[6, 6, 6\]"),
        ({"alpha": torch.ones(7, 5, 5)}, "gram is for 6 heads, expected 7 or, with the residual, 8"),
        ({"gram": torch.ones(5, 6, 5).double()}, r"gram has shape \[5, 6, 5\], expected \[5, 6, 6\]"),
    ],
)
def test_bad_shapes_are_named(changed: dict[str, Tensor], named: str) -> None:
    given = {name: t.to(DEVICE) for name, t in {**case("gram_norms"), **changed}.items()}
    with pytest.raises(RuntimeError, match=f"^gram_norms: {named}"):
        torch.ops.ffattr_cuda.gram_norms(**given)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_one_device() -> None:
    given = {**{name: t.to(DEVICE) for name, t in case("gram_norms").items()}, "gram": case("gram_norms")["gram"]}
    with pytest.raises(RuntimeError, match="gram is on another device than alpha"):
        torch.ops.ffattr_cuda.gram_norms(**given)


def test_opcheck() -> None:
    given, sequences = several([3, 5], [slice(None)] * 2)
    arguments = [t.to(DEVICE).nan_to_num() if t.is_floating_point() else t.to(DEVICE) for t in given.values()]
    torch.library.opcheck(torch.ops.ffattr_cuda.gram_norms.default, (*arguments, sequences))
