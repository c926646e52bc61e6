"""The surroundings of every kernel's launch: whether it is interpreted, and on which device it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

__all__ = ["INTERPRETED", "on_device_of"]

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""True where kernels run in Triton's interpreter, on CPU tensors: ``TRITON_INTERPRET=1`` when triton was imported.

It keeps bfloat16 values as integers, on which ``*`` and ``tl.dot`` compute garbage: kernels widen to float32 first.
"""


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, which Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
