"""Which implementation of the operators runs: what was built, what can run here, and why not.

One check per backend answers both "may ``auto`` pick it?" and "the user asked for it: what is wrong?". Triton is
imported when its kernels are about to run, and not before.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops, torch_ops
from .errors import BackendUnavailable

__all__ = ["BACKENDS", "Backend", "build_info", "report", "select"]

_log = logging.getLogger("ffattr")


@dataclass(frozen=True)
class Backend:
    """The four operators of `ffattr.ops` by one implementation, or the definition itself (``load`` None).

    ``check(device, dtype, heads)`` says why it cannot run there, or None; ``load`` imports what `operators` is.
    """

    name: str
    description: str
    check: Callable[[torch.device, torch.dtype, int], str | None]
    load: Callable[[], Any] | None

    def why_not(self, device: torch.device, dtype: torch.dtype, heads: int = 1) -> str | None:
        """Why it cannot run on ``device`` with wide products in ``dtype`` for layers of ``heads`` attention heads."""
        return self.check(device, dtype, heads)

    @property
    def is_reference(self) -> bool:
        return self.load is None

    @property
    def operators(self) -> Any:
        return None if self.load is None else self.load()


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

_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    "torch": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "reference": (torch.float32, torch.float64),
}
"""What each backend takes for the wide products."""

_MOST_HEADS = 128
"""The Triton kernels are written for up to this many: a tile holds the weights of all heads."""


def _names(dtypes: tuple[torch.dtype, ...]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def _dtype_reason(name: str, dtype: torch.dtype) -> str | None:
    if dtype in _DTYPES[name]:
        return None
    *others, last = _names(_DTYPES[name])
    remedy = next((f" or use backend={other!r}" for other in ("torch", "triton") if dtype in _DTYPES[other]), "")
    return (
        f"the {name} backend computes in {', '.join(others)} or {last}, not {dtype}; pass dtype=torch.float32{remedy}"
    )


def _cpu_reason(device: torch.device, dtype: torch.dtype, heads: int) -> str | None:
    if _binary is None:
        return f"the C++ extension is not there: {_binary_reason}"
    if device.type != "cpu":
        return f"it runs on the CPU, the model is on {device}; use backend='torch' or move the model"
    return _dtype_reason("cpu", dtype)


def _triton_reason(device: torch.device, dtype: torch.dtype, heads: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    reason = _dtype_reason("triton", dtype)
    if reason is not None:
        return reason
    if heads > _MOST_HEADS:
        return f"its kernels take up to {_MOST_HEADS} attention heads, the model has {heads}; use backend='torch'"
    try:
        return _gpu_reason(device, dtype) if device.type == "cuda" else _interpreter_reason(device)
    except ImportError as error:
        return f"its kernels do not load under the triton installed ({error}): pip install --upgrade triton"


def _gpu_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    least = (8, 9) if dtype == torch.float8_e4m3fn else (8, 0)
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        found, needed = (".".join(map(str, version)) for version in (capability, least))
        remedy = "pass dtype=torch.bfloat16" if capability >= (8, 0) else "use backend='torch'"
        return f"{device} has compute capability {found}, {dtype} needs {needed}; {remedy}"
    failure: str | None = importlib.import_module("ffattr.triton_ops.selfcheck").failure(device, dtype)
    return None if failure is None else f"its self-check in {dtype} on {device} failed: {failure}; use backend='torch'"


def _interpreter_reason(device: torch.device) -> str | None:
    # The environment is asked first: triton need not be imported to hear that it is not to be interpreted.
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "cpu" and asked and importlib.import_module("ffattr.triton_ops.runtime").INTERPRETED:
        return None
    return f"its kernels run on CUDA devices, not on {device}; move the model or use backend='torch'"


def _torch_reason(device: torch.device, dtype: torch.dtype, heads: int) -> str | None:
    return _dtype_reason("torch", dtype)


def _reference_reason(device: torch.device, dtype: torch.dtype, heads: int) -> str | None:
    return _dtype_reason("reference", dtype)


def _triton_ops() -> Any:
    return importlib.import_module("ffattr.triton_ops")


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "C++ kernels, all cores", _cpu_reason, lambda: torch.ops.ffattr),
        Backend("triton", "Triton kernels, one pass for all feed-forward scopes", _triton_reason, _triton_ops),
        Backend("torch", "chunked plain PyTorch", _torch_reason, lambda: torch_ops),
        Backend("reference", "the definition, materialised", _reference_reason, None),
    )
}
_AUTO = ("cpu", "triton", "torch")


def select(name: str, device: torch.device, dtype: torch.dtype, heads: int = 1) -> Backend:
    """The backend called ``name``, or with ``"auto"`` the first that can run wide products in ``dtype`` there.

    Raises `BackendUnavailable` with every reason, ValueError for an unknown name.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    reasons = []
    for candidate in _AUTO if name == "auto" else (name,):
        reason = BACKENDS[candidate].why_not(device, dtype, heads)
        if reason is None and name == "auto" and candidate == "triton" and device.type != "cuda":
            reason = "Triton's interpreter is for trying kernels out: it runs only where backend='triton' is asked for"
        if reason is None:
            _log.debug("backend %s: chosen for %s on %s", candidate, dtype, device)
            return BACKENDS[candidate]
        _log.debug("backend %s: %s", candidate, reason)
        reasons.append(f"{candidate}: {reason}")
    raise BackendUnavailable(f"backend {name!r} cannot run: {'; '.join(reasons)}")


def report(device: torch.device | None = None) -> list[tuple[str, bool, str]]:
    """``(name, can run, what and in which dtypes, or why not)`` of every backend, for ``ffattr info``.

    ``device``: None for every device of this machine, that is, its first GPU and its CPU.
    """
    devices = [torch.device("cpu")] if device is None else [device]
    if device is None and torch.cuda.is_available():
        devices.insert(0, torch.device("cuda", 0))
    rows = []
    for name, backend in BACKENDS.items():
        runs = {place: tuple(d for d in _DTYPES[name] if backend.why_not(place, d) is None) for place in devices}
        found = [f"{place}: {', '.join(_names(dtypes))}" for place, dtypes in runs.items() if dtypes]
        reason = backend.why_not(devices[0], torch.float32)
        rows.append((name, bool(found), f"{backend.description}; {'; '.join(found)}" if found else str(reason)))
    return rows


def build_info() -> dict[str, str]:
    """What was built and why, and what it runs as on this machine."""
    info = {"operators": ", ".join(ops.OPERATORS), "build": _binary_reason}
    if _binary is not None:
        info |= {key: str(value) for key, value in _binary.build_info().items()}
    return info


_DECIDING = {"ig_slope": 0, "gram_norms": 0, "ff_norms": 4, "operator_norms": 6}
"""The place of the argument whose dtype a backend may refuse: ``down`` where there is one."""


def _on_cuda(name: str) -> Callable[..., Tensor]:
    """``torch.ops.ffattr.<name>`` for CUDA tensors: Triton's kernel where it can run, plain PyTorch elsewhere."""

    def run(*arguments: Any) -> Tensor:
        first, deciding = arguments[0], arguments[_DECIDING[name]]
        dtype = first.dtype if first.dtype == torch.float64 else deciding.dtype
        runs = _triton_reason(first.device, dtype, first.shape[0]) is None
        out: Tensor = getattr(_triton_ops() if runs else torch_ops, name)(*arguments)
        return out

    return run


def _register_cuda() -> torch.library.Library | None:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return None
    library = torch.library.Library("ffattr", "IMPL")
    for name in ops.OPERATORS:
        library.impl(name, _on_cuda(name), "CUDA")
    return library


_cuda_library = _register_cuda()  # kernels are registered for as long as it lives
