"""What a user asks for beside the model and its inputs, as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..decomposition.integrated_gradients import GaussLegendre, Riemann
from ..decomposition.sketch import Sketch
from ..engine.planning.costs import BY_QUERY
from ..ops.reduction import REDUCTIONS, Reduction
from ..selection import Indices

__all__ = ["IG", "Options", "Progress", "check_progress"]

IG = Literal["exact"] | Riemann | GaussLegendre
Progress = Callable[[int, int], None]


def check_progress(progress: object) -> None:
    """Raises TypeError where ``progress`` cannot be called, before the first layer is computed."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {progress!r}, expected a function of (layers done, layers in all), or None")


@dataclass(frozen=True)
class Options:
    """The arguments that `ffattr.attribute`, `ffattr.plan` and `ffattr.vectors` share; they say what each means."""

    scopes: str | Sequence[str] = "layer"
    layers: Indices = None
    queries: Indices = None
    keys: Indices = None
    groups: Any = None
    ig: IG = "exact"
    baseline: str | Tensor = "zero"
    value_bias: str = "token"
    dtype: torch.dtype | None = None
    backend: str = "auto"
    method: str | Sketch = "auto"
    memory_budget: int | None = None
    reduce: Reduction = "l2"
    toward: Tensor | None = None

    def check(self) -> None:
        """Raises TypeError or ValueError naming a value that no model could be asked for."""
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype is {self.dtype!r}, expected a torch.dtype such as torch.float32, or None")
        if self.memory_budget is not None and (not isinstance(self.memory_budget, int) or self.memory_budget <= 0):
            raise TypeError(f"memory_budget is {self.memory_budget!r}, expected a positive number of bytes, or None")
        if self.value_bias not in ("token", "separate"):
            raise ValueError(f"unknown value_bias {self.value_bias!r}, expected 'token' or 'separate'")
        if not isinstance(self.method, (str, Sketch)):
            raise TypeError(f"method is {self.method!r}, expected 'auto', the name of one or an ffattr.Sketch")
        if not isinstance(self.reduce, str) or self.reduce not in REDUCTIONS:
            raise ValueError(f"unknown reduce {self.reduce!r}, expected one of {', '.join(map(repr, REDUCTIONS))}")
        if self.toward is not None:
            self._check_toward(self.toward)
        if self.reduce != "l2" and isinstance(self.method, Sketch):
            raise ValueError(
                f"method={self.method!r} with reduce={self.reduce!r}: a sketch keeps Euclidean norms, and no others; "
                "leave method to 'auto', which is exact, or reduce to 'l2'"
            )
        if self.dtype == torch.float8_e4m3fn and self.method in BY_QUERY:
            raise ValueError(f"method={self.method!r} does not run in {self.dtype}; 'direct' is the only one that does")

    def _check_toward(self, direction: object) -> None:
        if self.backend == "reference":
            raise ValueError(
                "toward= projects vectors by operators, which backend='reference' has none of; use 'torch'"
            )
        if not isinstance(direction, Tensor):
            raise TypeError(
                f"toward is {direction!r}, expected a direction, a tensor [d]. What tokens give to a logit is what "
                "ffattr.contributions(target=...) says, with flow=True for each layer"
            )
        if direction.dim() != 1 or not direction.is_floating_point() or not direction.isfinite().all():
            raise ValueError(
                f"toward is a tensor {list(direction.shape)} of {direction.dtype}, expected a direction [d] of finite "
                "floats"
            )
        if self.reduce != "l2" or self.method != "auto":
            raise ValueError(
                f"toward= projects vectors on a direction, which leaves nothing for reduce={self.reduce!r} and "
                f"method={self.method!r} to do; leave both out"
            )
