"""Which implementation of the operators runs: what was built, what can run here, and why not.

One check per backend answers both "may ``auto`` pick it?" and "the user asked for it: what is wrong?".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import ops, torch_ops
from .errors import BackendUnavailable

__all__ = ["BACKENDS", "Backend", "build_info", "report", "select"]


@dataclass(frozen=True)
class Backend:
    """The four operators of `ffattr.ops` by one implementation, or the definition itself (``operators`` None)."""

    name: str
    description: str
    why_not: Callable[[torch.device, torch.dtype], str | None]
    operators: Any

    @property
    def is_reference(self) -> bool:
        return self.operators is None


def _load_binary() -> tuple[Any | None, str]:
    """The compiled module, or None and the reason; importing it registers its kernels with the operators."""
    try:
        record = dict(importlib.import_module("ffattr._build_info").BUILD)
    except ImportError:
        record = {"reason": "the package was not built (no build record): pip install --no-build-isolation ."}
    try:
        return importlib.import_module("ffattr._C"), str(record.get("reason", ""))
    except ImportError as error:
        if record.get("cpu"):
            built, running = record.get("torch"), torch.__version__
            return None, f"the binary built for torch {built} does not load under torch {running}: {error}"
        return None, str(record.get("reason", error))


_binary, _binary_reason = _load_binary()
_FLOATING = (torch.float32, torch.float64)


def _dtype_reason(name: str, dtype: torch.dtype) -> str | None:
    if dtype in _FLOATING:
        return None
    return f"the {name} backend computes in float32 or float64, not {dtype}; leave dtype=None or pass torch.float32"


def _cpu_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if _binary is None:
        return f"the C++ extension is not there: {_binary_reason}"
    if device.type != "cpu":
        return f'it runs on the CPU, the model is on {device}; use backend="torch" or move the model'
    return _dtype_reason("cpu", dtype)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "C++ kernels, all cores", _cpu_reason, torch.ops.ffattr),
        Backend("torch", "chunked plain PyTorch", lambda _, dtype: _dtype_reason("torch", dtype), torch_ops),
        Backend("reference", "the definition, materialised", lambda _, dtype: _dtype_reason("reference", dtype), None),
    )
}
_AUTO = ("cpu", "torch")


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name``, or with ``"auto"`` the first that can run. Raises `BackendUnavailable`."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    reasons = []
    for candidate in _AUTO if name == "auto" else (name,):
        backend = BACKENDS[candidate]
        reason = backend.why_not(device, dtype)
        if reason is None:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise BackendUnavailable(f"backend {name!r} cannot run: {'; '.join(reasons)}")


def report(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> list[tuple[str, bool, str]]:
    """``(name, can run, description or the reason why not)`` of every backend, for ``ffattr info``."""
    device = device or torch.device("cpu")
    rows = []
    for backend in BACKENDS.values():
        reason = backend.why_not(device, dtype)
        rows.append((backend.name, reason is None, reason or backend.description))
    return rows


def build_info() -> dict[str, str]:
    """What was built and why, and what it runs as on this machine."""
    info = {"operators": ", ".join(ops.OPERATORS), "build": _binary_reason}
    if _binary is not None:
        info |= {key: str(value) for key, value in _binary.build_info().items()}
    return info
