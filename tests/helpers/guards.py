"""Memory in which stray reads and writes of a kernel show."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Guards:
    """Tensors inside larger buffers full of NaN (zeros for integers): reads and writes beyond them show.

    ``margin``: elements on either side; if it is odd, pointers are aligned to no more than an element.
    """

    def __init__(self, margin: int = 64, device: torch.device = DEVICE) -> None:
        self.margin = margin
        self.device = device
        self.guarded: list[tuple[Tensor, Tensor]] = []
        self.allocated: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        size = math.prod(shape)
        fill = math.nan if dtype.is_floating_point else 0
        buffer = torch.full((size + 2 * self.margin,), fill, dtype=dtype, device=device or self.device)
        self.guarded.append((buffer, buffer.clone()))
        return buffer[self.margin : self.margin + size].view(shape)

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        view = self.empty(tensor.shape, tensor.dtype).copy_(tensor)
        buffer, _ = self.guarded.pop()
        self.guarded.append((buffer, buffer.clone()))
        return view

    @contextlib.contextmanager
    def allocations(self) -> Iterator[None]:
        """What operators in C++ allocate meanwhile is guarded, too, and theirs to write."""
        library, key = torch.library.Library("aten", "IMPL"), self.device.type.upper()

        def new_empty(
            tensor: Tensor,
            size: Sequence[int],
            dtype: torch.dtype | None = None,
            layout: object = None,
            device: torch.device | None = None,
            pin_memory: object = None,
        ) -> Tensor:
            self.allocated.append(self.empty(size, dtype or tensor.dtype, device or tensor.device))
            return self.allocated[-1]

        def new_zeros(*arguments: Any, **named: Any) -> Tensor:
            return new_empty(*arguments, **named).zero_()

        library.impl("new_empty", new_empty, key)
        library.impl("new_zeros", new_zeros, key)
        try:
            yield
        finally:
            library._destroy()

    def has(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies between guards."""
        storage = tensor.untyped_storage().data_ptr()
        return any(buffer.untyped_storage().data_ptr() == storage for buffer, _ in self.guarded)

    def check(self, *written: Tensor) -> None:
        """Nothing has changed but what lies in ``written`` or was allocated."""
        for buffer, before in self.guarded:
            for tensor in (*written, *self.allocated):
                if tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                    inside = slice(self.margin, self.margin + tensor.numel())
                    before[inside] = buffer[inside]
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8))
