"""The Triton kernel of ``ig_slope``, on the GPU or in Triton's interpreter, against
`ffattr.decomposition.integrated_gradients` in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from guards import DEVICE, Guards
from slope_cases import Promises
from torch import Tensor

ig_slope = pytest.importorskip("ffattr.ops.triton.ig_slope").ig_slope
INTERPRETED = pytest.importorskip("ffattr.ops.triton.runtime").INTERPRETED

# A lane that is not selected may well divide by zero: the interpreter's NumPy warns.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned")]


class TestPromises(Promises):
    device = DEVICE
    refused = ValueError
    truncates = INTERPRETED

    def kernel(self, z: Tensor, base: Tensor | None, scale: Tensor | None, name: str, rule: str, steps: int) -> Tensor:
        out: Tensor = ig_slope(z, base, scale, name, rule, steps)
        return out

    @contextlib.contextmanager
    def allocations(self, guards: Guards) -> Iterator[None]:
        def empty_like(tensor: Tensor) -> Any:
            return guards.empty(tensor.shape, tensor.dtype)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty_like", empty_like)
            yield
