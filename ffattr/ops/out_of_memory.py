"""A watch that tells whether memory ran out, also where the error does not say so."""

from __future__ import annotations

import torch

__all__ = ["OutOfMemoryWatch"]


class OutOfMemoryWatch:
    """Counts from now on what a GPU's allocator refuses.

    Compiled kernels reach PyTorch through its stable ABI, which passes on that a call failed, but not the type of the
    error: running out of memory arrives as a plain RuntimeError.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._count_refusals()

    def explains(self, error: Exception) -> bool:
        """Tells whether memory that ran out explains ``error``."""
        return isinstance(error, torch.OutOfMemoryError) or self._count_refusals() > self._before

    def _count_refusals(self) -> int:
        stats = torch.cuda.memory_stats(self._device) if self._device.type == "cuda" else {}
        return int(stats.get("num_ooms", 0))
