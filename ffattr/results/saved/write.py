"""A safetensors file, written into a file that there is: the library writes another one beside it, which nobody would
remove where the process is killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checksum import view_bytes

__all__ = ["DTYPES", "save_file"]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors on the CPU, with ``metadata`` in the header; large elements come first, so that all are aligned.

    Raises OSError where the disk is full, KeyError for a dtype that is not in `DTYPES`.
    """
    parts = sorted(tensors.items(), key=lambda part: (-part[1].element_size(), part[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in parts:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # numbers begin at a multiple of 8 bytes; the format allows spaces
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.writelines(view_bytes(tensor) for _, tensor in parts)
