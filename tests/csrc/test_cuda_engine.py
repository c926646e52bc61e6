"""Whole maps by the CUDA backend, on the GPU or emulated, and its kernels as operators of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import DEVICE, EMULATED
from engine_cases import Engine
from wide_cases import FLOAT8

# On a GPU, where it is asked for: that no GPU has run the kernels.
pytestmark = pytest.mark.filterwarnings("ignore:the CUDA kernels were verified by emulation")


class TestCuda(Engine):
    backend = "cuda"
    device = DEVICE

    def needs_float8(self, dtype: torch.dtype) -> None:
        if dtype == FLOAT8 and not EMULATED and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("a GPU of compute capability 9.0")

    @pytest.fixture
    def operators(self) -> Any:
        return torch.ops.ffattr_cuda
