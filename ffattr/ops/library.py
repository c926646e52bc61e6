"""The compiled library, ``libffattr.so``: it declares the operators and has their C++ and CUDA kernels.

It is a plain shared library, without Python: ``torch.ops.load_library`` and C++ programs load the same file. Loading it
is the first thing that `ffattr.ops` does; where it is not there, `ffattr.ops.contract` declares the operators.
"""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["LIBRARY", "Binary", "binary", "load_binary"]

_PATH = Path(__file__).resolve().parents[1] / "libffattr.so"


@dataclass(frozen=True)
class Binary:
    """The loaded library or None, why it was built or is not there, and the record that setup.py wrote of it."""

    library: ctypes.CDLL | None
    reason: str
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        return None if self.library is not None else f"the C++ library is not there: {self.reason}"

    @property
    def architectures(self) -> str:
        """The architectures of GPUs that it has kernels for."""
        return ", ".join(f"sm_{architecture}" for architecture in self.record.get("architectures", ()))

    @property
    def info(self) -> dict[str, str]:
        """What it was compiled with and what it runs as on this machine; nothing where it is not there."""
        if self.library is None:
            return {}
        lines = self.library.ffattr_build_info().decode().splitlines()
        return {name: value for name, _, value in (line.partition(": ") for line in lines)}


def load_binary(path: Path = _PATH) -> Binary:
    """Loads the library at ``path``, which declares the operators and registers its kernels with them."""
    try:
        record = dict(importlib.import_module("ffattr._build_info").BUILD)
    except ImportError:
        record = {"reason": "the package was not built (no build record): pip install --no-build-isolation ."}
    reason = str(record.get("reason", ""))
    if not path.exists():
        return Binary(None, f"{path} is gone, build it again" if record.get("cpu") else reason, record)
    try:
        library = ctypes.CDLL(str(path))  # as torch.ops.load_library does, which keeps the reason of an error to itself
    except OSError as error:
        built, running = record.get("torch"), torch.__version__
        return Binary(None, f"the library built for torch {built} does not load under torch {running}: {error}", record)
    library.ffattr_build_info.restype = ctypes.c_char_p
    return Binary(library, reason, record)


binary = load_binary()
LIBRARY = None if binary.library is None else str(_PATH)
"""The file that ``torch.ops.load_library`` and C++ programs load, or None where it was not built."""
