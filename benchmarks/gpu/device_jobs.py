"""What `device.py` has measured on a GPU: a process that answers one job after the other, in lines of JSON.

A process of its own, because a kernel that fails can leave the GPU unusable to its process, and one that hangs ends
only with it. Needs torch, Triton and the parts of ffattr that compute, nothing else.

    python benchmarks/gpu/device_jobs.py [--dry-run]                 # jobs from stdin
    python benchmarks/gpu/device_jobs.py --once bert-base 512        # Triton direct, twice, for a profiler
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from device_compiled import Compiled
from torch import Tensor

from ffattr import ops
from ffattr.bench.cases import SHAPES, Case
from ffattr.bench.run import compute_maps, materialise_maps, record_operands
from ffattr.bench.timing import copy_bandwidth, matrix_rate, time_median
from ffattr.bench.truth import TOLERANCE, Truth, WrongResult
from ffattr.errors import BackendUnavailable, OutOfMemory
from ffattr.machine import name_processor
from ffattr.ops import backends, torch_kernels

BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn
ROUNDS, LIMIT = 10, 3.0
"""Times are medians of so many rounds, of which no more begin after so many seconds."""
LOOSE = 3e-2
"""For a layer that is in bfloat16 as a whole, norms and attention included, and not only in its wide products."""

_VARIANTS = {
    "Triton direct": ("triton", "direct", BF16),
    "Triton direct, fp8": ("triton", "direct", FLOAT8),
    "Triton operator": ("triton", "operator", BF16),
    "Triton, attention level": ("triton", "direct", torch.float32),
    "CUDA direct": ("cuda", "direct", BF16),
    "CUDA direct, fp8": ("cuda", "direct", FLOAT8),
    "CUDA, attention level": ("cuda", "direct", torch.float32),
    "PyTorch, chunked": ("torch", "direct", BF16),
}
"""Backend, method and dtype of the wide products, where a backend as it is computes a layer."""

Answer = dict[str, Any]


class Jobs:
    """Answers jobs; keeps the layer of the last one. A job is ``{"kind": a method's name, ...}``."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.sizes = {n: replace(s, width=32, heads=2, ff_width=64) for n, s in SHAPES.items()} if dry_run else SHAPES
        self._layers: dict[tuple[str, int], tuple[Case, Truth]] = {}

    def answer(self, job: dict[str, Any]) -> Answer:
        try:
            return {"status": "ok", **getattr(self, job["kind"])(job)}
        except WrongResult as error:
            return {"status": "wrong", "reason": str(error)}
        except BackendUnavailable as error:
            return {"status": "not available", "reason": str(error)}
        except (OutOfMemory, torch.OutOfMemoryError):
            return {"status": "out of memory"}
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
            return {"status": "failed", "reason": f"{reason} ({last.filename.split('/')[-1]}:{last.lineno})"[:400]}

    def unusable(self) -> bool:
        """Whether an error has left the GPU unusable to this process."""
        gc.collect()
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception:
            return True
        return False

    def _backend(self, name: str, dtype: torch.dtype, heads: int = 1) -> backends.Backend:
        """Raises `BackendUnavailable` where its kernels are not there, and PyTorch would be measured in their place.

        Without its self-check: all that is measured is compared with the definition.
        """
        backend = backends.BACKENDS[name]
        reason = backend.check(self.device, dtype, heads)
        if reason is not None:
            raise BackendUnavailable(reason)
        return backend

    # ---- the machine

    def machine(self, job: dict[str, Any]) -> Answer:
        """Names and versions, and ``2 F d`` of every shape, half of it for a causal one: operations for a pair."""
        import triton

        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device here; --dry-run needs none")
        about: Answer = {
            "name": name_processor(self.device),
            "torch": str(torch.__version__),
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "python": sys.version.split()[0],
            "triton backend": backends.BACKENDS["triton"].why_not(self.device, BF16) or "runs",
            "build": backends.build_info(),
            "operators": list(ops.OPERATORS),
            "flops_per_pair": {n: (1 if s.causal else 2) * s.ff_width * s.width for n, s in self.sizes.items()},
        }
        if self.device.type == "cuda":
            from ffattr.ops.triton import configs

            properties = torch.cuda.get_device_properties(self.device)
            about["capability"] = f"{properties.major}.{properties.minor}"
            about["memory_bytes"] = properties.total_memory
            about["multiprocessors"] = properties.multi_processor_count
            about["tuned configs"] = configs.tuned_file().is_file()
        return about

    def check(self, job: dict[str, Any]) -> Answer:
        """The self-check of a backend in a dtype; "checked" says that it came to an end."""
        dtype = getattr(torch, job["dtype"])
        reason = self._backend(job["backend"], dtype).why_not(self.device, dtype)
        return {"checked": True} | ({} if reason is None else {"status": "failed", "reason": reason})

    def copy(self, job: dict[str, Any]) -> Answer:
        return {"bytes_per_second": copy_bandwidth(self.device, size=1 << 20 if self.dry_run else None)}

    def matrix(self, job: dict[str, Any]) -> Answer:
        dtype, rate = matrix_rate(self.device, BF16, 1 if self.dry_run else 20)
        return {"dtype": str(dtype), "flops_per_second": rate}

    # ---- one layer: a variant at a shape and length

    def layer(self, job: dict[str, Any]) -> Answer:
        name = job["variant"]
        if name in _VARIANTS:
            backend, _, dtype = _VARIANTS[name]
            self._backend(backend, dtype, self.sizes[job["shape"]].heads)
        case, truth = self._layer(job["shape"], job["tokens"])
        run, scopes, tolerance = self._variant(name, case)
        wanted = truth.select_scopes(scopes)
        flops = case.flops if scopes == case.wide_scopes else 0.0
        return self._measured(run, lambda found: wanted.verify_maps(name, found, tolerance), flops)

    def _variant(self, name: str, case: Case) -> tuple[Callable[[], dict[str, Tensor]], tuple[str, ...], float]:
        """What to run, the scopes that it yields, and how wrong these may be."""
        scopes = case.narrow_scopes if name.endswith("attention level") else case.wide_scopes
        if name == "PyTorch, materialising":
            return functools.partial(materialise_maps, case.cast_to(BF16), scopes), scopes, LOOSE
        backend: Any
        if name == "PyTorch, chunked, compiled":
            compiled: Any = Compiled("aot_eager" if self.dry_run else "inductor")
            backend, method, dtype = replace(backends.BACKENDS["torch"], load=lambda: compiled), "direct", BF16
        else:
            backend, method, dtype = _VARIANTS[name]
        # The interpreter halves what float8 rounds up to a power of two: its result shows no more than that it runs.
        tolerance = 1.0 if self.dry_run and dtype == FLOAT8 else TOLERANCE[dtype]
        return functools.partial(compute_maps, case, backend, method, scopes, None, dtype), scopes, tolerance

    def _layer(self, shape: str, tokens: int) -> tuple[Case, Truth]:
        if (shape, tokens) not in self._layers:
            self._layers.clear()
            gc.collect()
            case = Case.draw_random(self.sizes[shape], tokens, device=self.device)
            self._layers[shape, tokens] = case, Truth.from_case(case, (*case.narrow_scopes, *case.wide_scopes))
        return self._layers[shape, tokens]

    def _measured(self, run: Callable[[], Any], verify: Callable[[Any], float], flops: float) -> Answer:
        start = time.monotonic()
        error = verify(run())  # its result is freed before anything is timed
        first = time.monotonic() - start
        cuda = self.device.type == "cuda"
        held = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = time_median(run, self.device, 1 if self.dry_run else ROUNDS, LIMIT)
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        figures = {"seconds": seconds, "first_seconds": first, "flops": flops, "error": error}
        return figures | {"peak_bytes": peak, "held_bytes": held}

    # ---- parts of one

    def slope(self, job: dict[str, Any]) -> Answer:
        """``ig_slope`` with 50 Riemann steps for all tokens of a layer."""
        kernel = self._backend(job["backend"], torch.float32).require_operators().ig_slope
        size = self.sizes[job["shape"]]
        z = torch.randn(2 if size.gated else 1, job["tokens"], size.ff_width, device=self.device)
        rest = (None, None, size.activation, "right", 50)
        truth = torch_kernels.ig_slope(z[:, :1].double(), *rest)

        def verify(found: Tensor) -> float:
            return _close("ig_slope", found[:, :1], truth, 1e-5)

        return self._measured(lambda: kernel(z, *rest), verify, 0.0)

    def batch(self, job: dict[str, Any]) -> Answer:
        """``ff_norms`` of many short sequences: in one launch, or ("looped") one after the other."""
        backend = self._backend(job["backend"], BF16, self.sizes[job["shape"]].heads)
        kernel: Callable[..., Tensor] = backend.require_operators().ff_norms
        count, tokens = job["sequences"], job["tokens"]
        case = Case.draw_random(self.sizes[job["shape"]], tokens, device=self.device)
        one = record_operands(case, "direct", BF16)
        # The copies lie apart in memory, as different sequences do.
        along = (1, 0, 1, 1, None, None, 0, 0, None, 0)
        joined = [_repeated(t, axis, count) for t, axis in zip(one, along, strict=False)] + [one[-1]]
        bounds = torch.arange(count + 1)[:, None] * tokens
        single = torch_kernels.ff_norms(*one)

        def verify(found: Tensor) -> float:
            return _close("a batch", found, single.repeat(1, count, 1), TOLERANCE[BF16])

        if not job["looped"]:
            return self._measured(
                lambda: kernel(*joined, bounds.expand(-1, 2).contiguous()), verify, case.flops * count
            )
        parts = [
            [_part(t, axis, b, count) for t, axis in zip(joined[:-1], along, strict=True)] + [one[-1]]
            for b in range(count)
        ]

        def looped() -> Tensor:
            return torch.cat([kernel(*part) for part in parts], 1)

        return self._measured(looped, verify, case.flops * count)

    def tune(self, job: dict[str, Any]) -> Answer:
        """The search of ``ffattr bench --tune``, stored, with its table."""
        if self.device.type != "cuda":
            raise ValueError("tuning times kernels on a CUDA device")
        from ffattr.bench import tune
        from ffattr.ops.triton import configs

        self._layers.clear()
        case = Case.draw_random(self.sizes[job["shape"]], job["tokens"], device=self.device)
        found = tune.tune_kernels(case, getattr(torch, job["dtype"]), job["seconds"])
        return {"kernels": [asdict(tuned) for tuned in found], "stored": configs.save_configs().read_text()}


def _repeated(t: Tensor | None, axis: int | None, count: int) -> Tensor | None:
    return t if t is None or axis is None else torch.cat([t] * count, axis)


def _part(t: Tensor | None, axis: int | None, index: int, count: int) -> Tensor | None:
    if t is None or axis is None:
        return t
    length = t.shape[axis] // count
    return t.narrow(axis, index * length, length).contiguous()


def _close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < tolerance:
        raise WrongResult(f"{name} is wrong by {error:.1e}, expected less than {tolerance:.0e}: not timed")
    return error


def once(shape: str, tokens: int) -> None:
    """For a profiler: the second launch is warm."""
    case = Case.draw_random(SHAPES[shape], tokens, device="cuda")
    for _ in range(2):
        compute_maps(case, "triton", "direct", case.wide_scopes, None, BF16)
    torch.cuda.synchronize()


def main() -> None:
    if "--once" in sys.argv:
        once(sys.argv[-2], int(sys.argv[-1]))
        return
    jobs = Jobs("--dry-run" in sys.argv)
    for line in sys.stdin:
        answer = jobs.answer(json.loads(line))
        answer["unusable"] = jobs.unusable()
        print("answer", json.dumps(answer), flush=True)
        if answer["unusable"]:
            break


if __name__ == "__main__":
    main()
