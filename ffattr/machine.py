"""Seconds of anything on a CPU or GPU, and what the machine itself reaches: its matrix product, its memory."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

__all__ = ["processor"]


def processor(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and how many cores it shows."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"{names[0]}, {len(names)} cores"
    return platform.processor() or platform.machine()
