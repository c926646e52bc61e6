"""The implementations of the operators, and which one runs; `ffattr.ops.availability` knows why another cannot.

One check per backend answers both "may ``auto`` pick it?" and "the user asked for it: what is wrong?". Triton is
imported when its kernels are about to run, and not before.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from . import availability, contract, selfcheck, torch_kernels
from .contract import Operators
from .library import LIBRARY
from .reduction import REDUCTIONS, Reduction

__all__ = ["BACKENDS", "Backend", "build_info", "report_backends", "select_backend"]

_log = logging.getLogger("ffattr")


@dataclass(frozen=True)
class Backend:
    """The four operators of `ffattr.ops` by one implementation, or the definition itself (``load`` None).

    ``check(device, dtype, heads)`` says what is in its way there, or None; ``load`` imports what `operators` is;
    ``for_gpus``: its kernels are written for GPUs, and are compared with PyTorch before they first run on one.
    ``reductions``: what its kernels reduce vectors to. ``rounded``: whether it takes the wide operands as they are
    multiplied, in a narrow dtype; else in float32 beside a narrow ``down``, and rounds once what it multiplies by that.
    """

    name: str
    description: str
    check: Callable[[torch.device, torch.dtype, int], str | None]
    load: Callable[[], Operators] | None
    for_gpus: bool = False
    reductions: tuple[Reduction, ...] = REDUCTIONS
    rounded: bool = True

    def why_not(
        self, device: torch.device, dtype: torch.dtype, heads: int = 1, reduction: Reduction = "l2"
    ) -> str | None:
        """Says why it cannot run on ``device`` with wide products in ``dtype`` for layers of ``heads`` heads, and
        reduce vectors so, or None."""
        if reduction not in self.reductions:
            return f"{self.description} have no reduce={reduction!r}; use backend='triton' or backend='torch'"
        reason = self.check(device, dtype, heads)
        if reason is not None or not self.for_gpus or self.is_emulated(device):
            return reason
        failure = selfcheck.find_failure(self.require_operators(), device, dtype, reduction)
        if failure is None:
            return None
        return f"its self-check in {dtype} on {device} failed: {failure}; use backend='torch'"

    def is_emulated(self, device: torch.device) -> bool:
        """Tells whether its kernels, where they run on ``device`` at all, do so without the GPU they are written for.

        They run in Triton's interpreter, or compiled for the CPU, then: that is for trying them out, and shows no
        speed.
        """
        return self.for_gpus and device.type != "cuda"

    @property
    def is_reference(self) -> bool:
        return self.load is None

    @property
    def operators(self) -> Operators | None:
        return None if self.load is None else self.load()

    def require_operators(self) -> Operators:
        """Returns the operators where the caller knows that this is not the definition."""
        operators = self.operators
        assert operators is not None, f"{self.name} has no operators"
        return operators


_TRITON = "Triton kernels, one pass for all feed-forward scopes"
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu",
            "C++ kernels, all cores",
            availability.check_cpu,
            lambda: cast(Operators, torch.ops.ffattr),
            rounded=False,
        ),
        Backend("triton", _TRITON, availability.check_triton, availability.triton_ops, for_gpus=True),
        Backend(
            "cuda",
            "CUDA C++ kernels",
            availability.check_cuda,
            lambda: cast(Operators, torch.ops.ffattr_cuda),
            for_gpus=True,
            reductions=("l2",),
        ),
        Backend(
            "torch",
            "chunked plain PyTorch",
            functools.partial(availability.check_dtype, "torch"),
            lambda: torch_kernels,
        ),
        Backend(
            "reference", "the definition, materialised", functools.partial(availability.check_dtype, "reference"), None
        ),
    )
}
_AUTO = ("cpu", "triton", "torch")
"""Without the CUDA kernels, which no GPU has run yet."""


def select_backend(
    name: str, device: torch.device, dtype: torch.dtype, heads: int = 1, reduction: Reduction = "l2"
) -> Backend:
    """Returns the backend called ``name``, or with ``"auto"`` the first that can run wide products in ``dtype`` there,
    and reduce vectors so.

    Raises `BackendUnavailable` with every reason, ValueError for an unknown name.
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"unknown backend {name!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    said = []
    for candidate in _AUTO if name == "auto" else (name,):
        reason = BACKENDS[candidate].why_not(device, dtype, heads, reduction)
        if reason is None and name == "auto" and BACKENDS[candidate].is_emulated(device):
            reason = "Triton's interpreter is for trying kernels out: it runs only where backend='triton' is asked for"
        if reason is None:
            if candidate == "cuda" and device.type == "cuda":
                _warn_of_untried_kernels()
            _log.debug("backend %s: chosen for %s on %s", candidate, dtype, device)
            return BACKENDS[candidate]
        _log.debug("backend %s: %s", candidate, reason)
        said.append(f"{candidate}: {reason}")
    raise BackendUnavailable(f"backend {name!r} cannot run: {'; '.join(said)}")


@functools.lru_cache
def _warn_of_untried_kernels() -> None:
    """Warns once per process."""
    warnings.warn(
        "the CUDA kernels were verified by emulation and compilation only, never on a GPU. They have passed the "
        "self-check that compares them with PyTorch here; to be safe compare maps with those of backend='torch'",
        stacklevel=2,
    )


def report_backends(device: torch.device | None = None) -> list[tuple[str, bool, str]]:
    """Returns ``(name, can run, what and in which dtypes, or why not)`` of every backend, for ``ffattr info``.

    ``device``: None for every device of this machine, that is, its first GPU and its CPU.
    """
    devices = [torch.device("cpu")] if device is None else [device]
    if device is None and torch.cuda.is_available():
        devices.insert(0, torch.device("cuda", 0))
    rows = []
    for name, backend in BACKENDS.items():
        runs = {
            place: tuple(d for d in availability.DTYPES[name] if backend.why_not(place, d) is None) for place in devices
        }
        found = [f"{place}: {', '.join(availability.name_dtypes(dtypes))}" for place, dtypes in runs.items() if dtypes]
        reason = backend.why_not(devices[0], torch.float32)
        rows.append((name, bool(found), f"{backend.description}; {'; '.join(found)}" if found else str(reason)))
    return rows


def build_info() -> dict[str, str]:
    """Says what was built and why, and what it runs as on this machine."""
    binary = availability.binary
    info = {"operators": ", ".join(contract.OPERATORS), "build": binary.reason}
    if "cuda_reason" in binary.record:
        info["CUDA"] = "; ".join(filter(None, (str(binary.record["cuda_reason"]), binary.architectures)))
    if binary.library is not None:
        info["library"] = str(LIBRARY)
    return info | binary.info


_DECIDING = {"ig_slope": "z", "gram_norms": "alpha", "ff_norms": "down", "operator_norms": "down"}
"""Names the argument whose dtype a backend may refuse: ``down`` where there is one."""


def _on_cuda(name: str) -> Callable[..., Tensor]:
    """Makes ``torch.ops.ffattr.<name>`` for CUDA tensors: Triton's kernel where it can run, plain PyTorch elsewhere."""

    parameters = list(inspect.signature(getattr(torch_kernels, name)).parameters)
    at = parameters.index(_DECIDING[name])
    last = parameters.index("reduction") if "reduction" in parameters else len(parameters)

    def run_on_cuda(*arguments: Any) -> Tensor:
        first, deciding = arguments[0], arguments[at]
        dtype = first.dtype if first.dtype == torch.float64 else deciding.dtype
        triton = BACKENDS["triton"]
        reduction: Any = arguments[last] if len(arguments) > last else "l2"  # defaults are left out
        runs = triton.why_not(first.device, dtype, first.shape[0], reduction) is None
        out: Tensor = getattr(triton.operators if runs else torch_kernels, name)(*arguments)
        return out

    return run_on_cuda


def _register_cuda() -> torch.library.Library | None:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return None
    library = torch.library.Library("ffattr", "IMPL")
    for name in contract.OPERATORS:
        library.impl(name, _on_cuda(name), "CUDA")
    return library


_cuda_library = _register_cuda()  # kernels are registered for as long as it lives
