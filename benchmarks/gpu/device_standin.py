"""Triton without a GPU: kernels are compiled for one, and kept where a process with a GPU looks for them.

What is compiled is what the operators launch: their own code runs, up to where a kernel would start.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

__all__ = ["compile_only"]

CAPABILITY = (9, 0)


class _Driver:
    """All that Triton asks of a GPU before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only() -> list[str]:
    """Makes this process compile kernels for a Hopper GPU and launch none; returns the list of their names, which
    grows. Tensors on the CPU stand for those on the GPU."""
    compiled: list[str] = []
    run = jit.JITFunction.run

    def compile_kernel(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append(self.__name__)
        return kernel

    driver.set_active(_Driver())
    jit.JITFunction.run = compile_kernel
    properties = SimpleNamespace(major=CAPABILITY[0], minor=CAPABILITY[1], name="NVIDIA H200")
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment,return-value]
    return compiled
