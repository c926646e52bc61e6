"""Why a backend cannot run: what was built, what is installed, what the device has; the table is `ffattr.ops.backends`.

Each answer is for a device, a dtype of the wide products and a number of attention heads: a sentence that ends with
what to do about it, or None. No kernel runs for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import torch

from . import contract
from .library import binary

__all__ = [
    "DTYPES",
    "binary",
    "check_cpu",
    "check_cuda",
    "check_dtype",
    "check_triton",
    "describe_product",
    "name_dtypes",
    "triton_ops",
]

DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),  # float32: as three tf32 products
    "torch": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "reference": (torch.float32, torch.float64),
}
"""The dtypes that each backend takes for the wide products."""


def check_cpu(device: torch.device, dtype: torch.dtype, heads: int) -> str | None:
    if binary.missing:
        return binary.missing
    if device.type != "cpu":
        return f"it runs on the CPU, the model is on {device}; use backend='torch' or move the model"
    reason = _refuse_dtype("cpu", dtype)
    if reason is None and dtype == torch.bfloat16 and not describe_product("cpu", dtype):
        running = binary.info.get("instruction set", "none")
        reason = (
            f"nothing here multiplies bfloat16 numbers faster than float32 (instruction set {running}); "
            "pass dtype=torch.float32 or use backend='torch'"
        )
    return reason


def describe_product(name: str, dtype: torch.dtype) -> str:
    """Says by what the backend ``name`` multiplies feed-forward operands in ``dtype``, where that is not plain."""
    if name != "cpu" or binary.missing:
        return ""
    info = binary.info
    if dtype == torch.bfloat16:
        return str(info.get("bfloat16 by", ""))
    found = str(info.get("float32 by", "float32"))
    return found if dtype == torch.float32 and found != "float32" else ""


def check_triton(device: torch.device, dtype: torch.dtype, heads: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    reason = _refuse_dtype("triton", dtype) or _refuse_heads(heads)
    if reason is not None:
        return reason
    try:
        if device.type == "cuda":
            reason = _refuse_capability(device, dtype, (8, 9) if dtype == torch.float8_e4m3fn else (8, 0))
            if reason is None:
                triton_ops()  # whether it loads
            return reason
        # The environment is asked first: triton need not be imported to hear that it is not to be interpreted.
        asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
        if device.type == "cpu" and asked and importlib.import_module("ffattr.ops.triton.runtime").INTERPRETED:
            return None
    except ImportError as error:
        return f"its kernels do not load under the triton installed ({error}): pip install --upgrade triton"
    return f"its kernels run on CUDA devices, not on {device}; move the model or use backend='torch'"


def triton_ops() -> Any:
    """Imports triton."""
    return importlib.import_module("ffattr.ops.triton")


def check_cuda(device: torch.device, dtype: torch.dtype, heads: int) -> str | None:
    if not has_cuda_kernels("cuda") and not has_cuda_kernels(device.type):
        why = binary.record.get("cuda_reason", "its build record says nothing of CUDA")
        return binary.missing or f"the library was built without CUDA kernels ({why}): build it where nvcc is"
    reason = _refuse_dtype("cuda", dtype) or _refuse_heads(heads)
    if reason is not None:
        return reason
    if not has_cuda_kernels(device.type):
        built = f" ({binary.architectures})" if binary.architectures else ""
        return f"its kernels{built} run on CUDA devices, not on {device}; move the model or use backend='torch'"
    if device.type != "cuda":
        return None  # compiled for the CPU, to try them out
    if dtype == torch.float8_e4m3fn:  # by an instruction that only this generation has
        return _refuse_capability(device, dtype, (9, 0), exactly=True)
    return _refuse_capability(device, dtype, (8, 0))


def has_cuda_kernels(kind: str) -> bool:
    """Tells whether ``torch.ops.ffattr_cuda`` has kernels of its own for tensors on this kind of device."""
    if kind not in ("cpu", "cuda"):
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("ffattr_cuda::ff_norms", kind.upper()))


def check_dtype(name: str, device: torch.device, dtype: torch.dtype, heads: int) -> str | None:
    """Answers for the backend ``name``, which runs everywhere."""
    return _refuse_dtype(name, dtype)


def name_dtypes(dtypes: Iterable[torch.dtype]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def _refuse_dtype(name: str, dtype: torch.dtype) -> str | None:
    if dtype in DTYPES[name]:
        return None
    *others, last = name_dtypes(DTYPES[name])
    remedy = next((f" or use backend={other!r}" for other in ("torch", "triton") if dtype in DTYPES[other]), "")
    return (
        f"the {name} backend computes in {', '.join(others)} or {last}, not {dtype}; pass dtype=torch.float32{remedy}"
    )


def _refuse_heads(heads: int) -> str | None:
    if heads <= contract.MOST_HEADS:
        return None
    return f"its kernels take up to {contract.MOST_HEADS} attention heads, the model has {heads}; use backend='torch'"


def _refuse_capability(
    device: torch.device, dtype: torch.dtype, needed: tuple[int, int], exactly: bool = False
) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability == needed or (capability > needed and not exactly):
        return None
    remedy = "pass dtype=torch.bfloat16" if capability >= (8, 0) else "use backend='torch'"
    if exactly and capability >= (8, 9):
        remedy += " or use backend='triton'"
    found, least = (".".join(map(str, version)) for version in (capability, needed))
    return f"{device} has compute capability {found}, {dtype} needs {least}{' exactly' * exactly}; {remedy}"
