"""The float64 definition of a case's maps for some of its rows, and how far found maps may be from it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FfattrError
from .cases import Case
from .run import compute_maps

__all__ = ["TOLERANCE", "Truth", "WrongResult"]


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOLERANCE[torch.float8_e4m3fn] = 3e-2  # kernels round both operands of the last product to it, by up to 2^-4 each
"""How far maps with wide products in a dtype may be from the definition, in parts of the scope's largest entry."""


class WrongResult(FfattrError):
    """Says that what was to be timed computes something else than the definition."""


@dataclass(frozen=True)
class Truth:
    """Holds the float64 definition ``{scope: [n, T]}`` for a few query tokens ``rows`` ``[n]``."""

    rows: Tensor
    maps: dict[str, Tensor]

    @classmethod
    def from_case(cls, case: Case, scopes: Collection[str]) -> Truth:
        last = len(case.x) - 1
        rows = sorted({0, last // 3, last // 2, last})  # rarely at the same place of a kernel's block
        exact = case.cast_to(torch.float64)
        # One at a time: the vectors of all heads are the most that a query needs.
        found = [compute_maps(exact, "reference", "auto", scopes, torch.tensor([row])) for row in rows]
        return cls(torch.tensor(rows, device=case.device), {s: torch.cat([one[s] for one in found]) for s in scopes})

    def select_scopes(self, scopes: Collection[str]) -> Truth:
        return Truth(self.rows, {scope: self.maps[scope] for scope in scopes})

    def measure_error(self, found: dict[str, Tensor]) -> float:
        """Returns the largest difference in parts of its scope's largest entry; NaN where anything in ``found`` is not
        finite."""
        if not all(bool(found[scope].isfinite().all()) for scope in self.maps):
            return math.nan
        return max(float((found[s][self.rows] - truth).abs().max() / truth.max()) for s, truth in self.maps.items())

    def verify_maps(self, name: str, found: dict[str, Tensor], tolerance: float) -> float:
        """Returns the error of ``found`` where it is below ``tolerance``; raises `WrongResult` otherwise."""
        error = self.measure_error(found)
        if not error < tolerance:
            raise WrongResult(f"{name} is wrong by {error:.1e}, expected less than {tolerance:.0e}: not timed")
        return error
