"""What every benchmark shares: a random layer of a known shape, its maps by any backend, and how to time them honestly.

Nothing is timed that was not compared with the float64 definition first. Speeds are given as shares of what this
machine's own matrix product reaches, counting ``2 T^2 F d`` operations for a layer of ``T`` tokens (half of them for a
causal one) and nothing else: what any exact method that goes pair by pair has to multiply.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FfattrError
from .cases import Case
from .run import maps

__all__ = ["TOLERANCE", "Truth", "WrongResult"]


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


TOLERANCE[torch.float8_e4m3fn] = 3e-2  # kernels round both operands of the last product to it, by up to 2^-4 each


"""How far maps with wide products in a dtype may be from the definition, in parts of the scope's largest entry."""


class WrongResult(FfattrError):
    """What was to be timed computes something else than the definition."""


@dataclass(frozen=True)
class Truth:
    """The float64 definition for a few query tokens ``rows`` ``[n]``: ``{scope: [n, T]}``."""

    rows: Tensor
    maps: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, scopes: Collection[str]) -> Truth:
        last = len(case.x) - 1
        rows = sorted({0, last // 3, last // 2, last})  # rarely at the same place of a kernel's block
        exact = case.cast(torch.float64)
        # One at a time: the vectors of all heads are the most that a query needs.
        found = [maps(exact, "reference", "auto", scopes, torch.tensor([row])) for row in rows]
        return cls(torch.tensor(rows, device=case.device), {s: torch.cat([one[s] for one in found]) for s in scopes})

    def only(self, scopes: Collection[str]) -> Truth:
        return Truth(self.rows, {scope: self.maps[scope] for scope in scopes})

    def error(self, found: dict[str, Tensor]) -> float:
        """Largest difference in parts of its scope's largest entry; NaN where anything in ``found`` is not finite."""
        if not all(bool(found[scope].isfinite().all()) for scope in self.maps):
            return math.nan
        return max(float((found[s][self.rows] - truth).abs().max() / truth.max()) for s, truth in self.maps.items())

    def verify(self, name: str, found: dict[str, Tensor], tolerance: float) -> float:
        """`error`, where it is below ``tolerance``; raises `WrongResult` otherwise."""
        error = self.error(found)
        if not error < tolerance:
            raise WrongResult(f"{name} is wrong by {error:.1e}, expected less than {tolerance:.0e}: not timed")
        return error
