"""."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ffattr.decomposition import integrated_gradients as ig

with contextlib.suppress(ImportError):  # the compiled kernels, where they have been built
    pass

EXTREMES = [0, 1e-12, -1e-12, 1e-3, -1e-3, 0.999, 1.001, -0.999, -1.001, 3, -3, 6.99, 7.01, -6.99, -7.01, 30, -30]
EXTREMES += [100, -100, 1e4, -1e4]


def expected(z: Tensor, base: Tensor | None, scale: Tensor | None, name: str, rule: str, steps: int) -> Tensor:
    activation = ig.ACTIVATIONS[name]
    start = None if base is None else base.double().unbind(0)
    if len(z) == 1:
        out = ig.slope(z[0].double(), activation, rule, steps, base=None if start is None else start[0])[None]
    else:
        out = torch.stack(ig.gated_slopes(z[0].double(), z[1].double(), activation, rule, steps, base=start))
    return out if scale is None else out * scale.double()[:, None]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 4) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=dtype) * size
