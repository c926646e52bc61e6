"""A Triton as a test wants it, whatever this machine has: neither triton nor a GPU is needed."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ffattr import ops


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
        monkeypatch.setitem(sys.modules, "ffattr.triton_ops", self.kernels)
        monkeypatch.setitem(sys.modules, "ffattr.triton_ops.runtime", self._runtime)
        selfcheck = SimpleNamespace(failure=lambda device, dtype: self.failure)
        monkeypatch.setitem(sys.modules, "ffattr.triton_ops.selfcheck", selfcheck)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def interpret(self) -> None:
        """As if TRITON_INTERPRET=1 had been set before triton was imported."""
        self._monkeypatch.setenv("TRITON_INTERPRET", "1")
        self._runtime.INTERPRETED = True
