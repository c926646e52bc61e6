"""The CUDA kernel of ``ig_slope``, on the GPU or emulated, against `ffattr.decomposition.integrated_gradients` in
float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from emulated import DEVICE
from guards import Guards
from slope_cases import Promises, random
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")


class TestPromises(Promises):
    device = DEVICE
    refused = RuntimeError

    def kernel(self, z: Tensor, base: Tensor | None, scale: Tensor | None, name: str, rule: str, steps: int) -> Tensor:
        out: Tensor = torch.ops.ffattr_cuda.ig_slope(z, base, scale, name, rule, steps)
        return out

    def allocations(self, guards: Guards) -> contextlib.AbstractContextManager[None]:
        return guards.allocations()

    def test_vectors_and_single_neurons_agree(self) -> None:
        """The one where pointers are aligned, the other where they are not."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            z, base = random(2, 3, 1048).to(dtype), random(2, 1, 1048, seed=1).to(dtype)
            aligned = self.run(z, base, None, "gelu", margin=64)
            assert torch.equal(self.run(z, base, None, "gelu", margin=67), aligned)


@pytest.mark.parametrize("streams", [1, 2])
def test_opcheck(streams: int) -> None:
    z, base, scale = random(streams, 3, 8), random(streams, 1, 8, seed=1), random(3, seed=2)
    given = [t.to(DEVICE) for t in (z, base, scale)]
    operator = torch.ops.ffattr_cuda.ig_slope.default
    torch.library.opcheck(operator, (given[0], None, None, "gelu", "exact", 0))
    torch.library.opcheck(operator, (*given, "silu", "right", 4))
