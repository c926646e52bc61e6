"""Triton and CUDA kernels as a test wants them, whatever this machine has: neither triton, nvcc nor a GPU is needed."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ffattr import ops
from ffattr.ops import availability, selfcheck
from ffattr.ops.library import Binary


class Triton:
    """Installed or not, the GPU's compute capability, what the self-check finds. The kernels return their arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed = True
        self.capability = (9, 0)
        self.failure: str | None = None
        self.kernels = SimpleNamespace(**dict.fromkeys(ops.OPERATORS, lambda *arguments: arguments))
        self._runtime = SimpleNamespace(INTERPRETED=False)
        self._monkeypatch = monkeypatch
        real = importlib.util.find_spec

        def find_spec(name: str) -> Any:
            return real(name) if name != "triton" else object() if self.installed else None

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setitem(sys.modules, "ffattr.ops.triton", self.kernels)
        monkeypatch.setitem(sys.modules, "ffattr.ops.triton.runtime", self._runtime)
        monkeypatch.setattr(selfcheck, "find_failure", lambda *_: self.failure)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def interpret(self) -> None:
        """As if TRITON_INTERPRET=1 had been set before triton was imported."""
        self._monkeypatch.setenv("TRITON_INTERPRET", "1")
        self._runtime.INTERPRETED = True


class Cuda:
    """The devices that there are CUDA kernels for, the build record, the GPU's compute capability, what the self-check
    finds. Of the kernels themselves there are none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds = ("cuda",)
        self.capability = (9, 0)
        self.failure: str | None = None
        self.checked: list[tuple[Any, torch.device, torch.dtype]] = []
        self.record: dict[str, Any] = {"cuda": True, "cuda_reason": "nvcc 13.0", "architectures": ["80", "90a", "100"]}
        self.binary = Binary(SimpleNamespace(ffattr_build_info=lambda: b""), "built", self.record)
        monkeypatch.setattr(availability, "binary", self.binary)
        monkeypatch.setattr(availability, "has_cuda_kernels", lambda kind: kind in self.kinds)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(selfcheck, "find_failure", self._check)

    def _check(self, operators: Any, device: torch.device, dtype: torch.dtype, reduction: str) -> str | None:
        self.checked.append((operators, device, dtype))
        return self.failure
