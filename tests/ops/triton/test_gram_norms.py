"""The Triton kernel of ``gram_norms``, on the GPU or in Triton's interpreter, against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gram_cases import Promises, several
from guards import DEVICE
from op_cases import case
from torch import Tensor

module = pytest.importorskip("ffattr.ops.triton.gram_norms")
query_blocks = pytest.importorskip("ffattr.ops.triton.blocks").query_blocks

# A zero times infinity in padding, which is not selected: the interpreter's NumPy warns.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned")]

CPU = torch.device("cpu")


class TestPromises(Promises):
    device = DEVICE
    refused = ValueError

    def kernel(self, *arguments: Any, **named: Any) -> Tensor:
        out: Tensor = module.gram_norms(*arguments, **named)
        return out

    def test_no_block_writes_into_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks in either order: what one of them spoilt, the next could otherwise repair."""
        given, sequences = several([1, 18, 5], [slice(None)] * 3)
        found = self.run(given, sequences)

        def reverse_blocks(*arguments: Any) -> tuple[int, Tensor]:
            count, table = query_blocks(*arguments)
            return count, table.flip(0)

        monkeypatch.setattr(module, "query_blocks", reverse_blocks)
        assert torch.equal(self.run(given, sequences), found)


# ---- errors


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"alpha": torch.ones(5, 5)}, r"alpha has shape \[5, 5\], expected \[H, N, M\]"),
        ({"alpha": torch.ones(5, 5, 6)}, "alpha has 6 columns, expected 5"),
        ({"alpha": torch.ones(7, 5, 5)}, r"gram has shape \[5, 6, 6\], expected \[5, 7, 7\]"),
        ({"gram": torch.ones(5, 6)}, r"gram has shape \[5, 6\], expected \[keys, G, G\]"),
    ],
)
def test_bad_shapes_are_named(changed: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        module.gram_norms(**{**case("gram_norms"), **changed})
