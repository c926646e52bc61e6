"""A checksum of all that a file holds: damage shows, whether it hit a number, a name, a shape or the description."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["compute_checksum", "view_bytes"]


def compute_checksum(tensors: Mapping[str, Tensor], description: bytes) -> str:
    """Returns the CRC-32 of the description and of the name, dtype, shape and numbers of every tensor on the CPU.

    It takes a part of a second for a gigabyte, and tells damage, not forgery.
    """
    found = zlib.crc32(description)
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode("utf-8", "surrogatepass"), found)
        found = zlib.crc32(view_bytes(tensor), found)
    return f"crc32:{found:08x}"


def view_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a tensor on the CPU, which is not copied where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
