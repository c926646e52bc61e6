"""Whether memory ran out, also where the error does not say so."""

from __future__ import annotations

import torch

__all__ = ["Refusals"]


class Refusals:
    """Counts from now on what a GPU's allocator refuses.

    Compiled kernels reach PyTorch through its stable ABI, which passes on that a call failed, but not the type of the
    error: running out of memory arrives as a plain RuntimeError.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._count()

    def caused(self, error: Exception) -> bool:
        """Whether ``error`` came of memory that ran out."""
        return isinstance(error, torch.OutOfMemoryError) or self._count() > self._before

    def _count(self) -> int:
        stats = torch.cuda.memory_stats(self._device) if self._device.type == "cuda" else {}
        return int(stats.get("num_ooms", 0))
