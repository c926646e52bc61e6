"""What `device.py` has done in processes of their own: a kernel that hangs, or leaves the GPU unusable, ends with one.

    python benchmarks/gpu/device_tasks.py TASK_AS_JSON RESULTS_FILE [--dry-run] [--now]

A process imports what it needs, says so by closing its standard output, waits for a line on its standard input (neither
with ``--now``), and adds a line of JSON to the results as soon as it knows something. It needs torch, Triton and the
parts of ffattr that compute.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

Arguments = dict[str, Any]
ROUNDS, LIMIT = 10, 1.0
"""Times are medians of so many rounds, of which no more begin after so many seconds."""


class Record:
    """Adds lines to a file that several processes write."""

    def __init__(self, file: Path, task: str) -> None:
        self.file, self.task = file, task

    def add(self, **found: Any) -> None:
        line = (json.dumps({"task": self.task, **found}) + "\n").encode()
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)  # in one piece
        finally:
            os.close(descriptor)


class Tasks:
    """Every kind of task is a method."""

    def __init__(self, record: Record, dry_run: bool) -> None:
        import torch

        import ffattr.ops.backends  # noqa: F401  while this process still waits for its turn
        from ffattr.bench.cases import SHAPES

        self.record, self.dry_run = record, dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.sizes = {n: replace(s, width=32, heads=2, ff_width=64) for n, s in SHAPES.items()} if dry_run else SHAPES

    # ---- before any kernel

    def machine(self, given: Arguments) -> None:
        import torch
        import triton

        from ffattr.machine import name_processor
        from ffattr.ops import backends

        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device here; --dry-run needs none")
        about: Arguments = {
            "name": name_processor(self.device),
            "torch": str(torch.__version__),
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "python": sys.version.split()[0],
            "build": backends.build_info(),
        }
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            about["capability"] = f"{properties.major}.{properties.minor}"
            about["memory_bytes"] = properties.total_memory
            about["multiprocessors"] = properties.multi_processor_count
        self.record.add(kind="machine", **about)

    def rates(self, given: Arguments) -> None:
        """Copies, and products of 8192 x 8192 matrices: what shares are counted in."""
        import torch

        from ffattr.bench.timing import copy_bandwidth, time_median

        size = 128 if self.dry_run else 8192
        for name in ("bfloat16", "float16", "float32", "float8_e4m3fn"):
            if name == "float8_e4m3fn" and self.dry_run:
                continue
            a, b = (torch.randn(size, size, device=self.device).to(getattr(torch, name)) for _ in range(2))
            run = functools.partial(torch.mm, a, b)
            if name == "float8_e4m3fn":
                one = torch.ones((), device=self.device)
                run = functools.partial(torch._scaled_mm, a, b.T, one, one, out_dtype=torch.bfloat16)
            run()
            rate = 2.0 * size**3 / time_median(run, self.device, ROUNDS, LIMIT)
            self.record.add(kind="rate", dtype=name, flops_per_second=rate)
        copied = copy_bandwidth(self.device, size=1 << 20 if self.dry_run else None)
        self.record.add(kind="copy", bytes_per_second=copied)

    def compile(self, given: Arguments) -> None:
        """Compiles the Triton kernels of an operator at a shape, or of a part of the self-check's calls, for whoever
        launches them later."""
        import torch
        from device_standin import compile_only

        from ffattr.bench.operands import Problem
        from ffattr.ops import availability, selfcheck

        kernels, start = compile_only(), time.monotonic()
        if "part" in given:
            calls = selfcheck.make_cases(torch.device("cpu"), torch.bfloat16, "l2")
            for operator, arguments in list(calls)[given["part"] :: given["parts"]]:
                getattr(availability.triton_ops(), operator)(*arguments)
            self.record.add(kind="compiled", kernels=len(kernels), seconds=time.monotonic() - start)
            return
        for lengths in given["lengths"]:
            problem = Problem.draw_random(
                given["operator"],
                self.sizes[given["shape"]],
                lengths,
                getattr(torch, given["dtype"]),
                torch.device("cpu"),
                keys=16,
                filled=False,
            )
            getattr(availability.triton_ops(), given["operator"])(*problem.arguments.values())
        self.record.add(kind="compiled", kernels=len(kernels), seconds=time.monotonic() - start)

    # ---- kernels alone

    def _operator(self, given: Arguments, shape: str) -> Callable[..., Any]:
        """Raises `BackendUnavailable` where the kernel is not there, and PyTorch would be measured in its place.

        Without its self-check: all that is measured is compared with the definition.
        """
        import torch

        from ffattr.errors import BackendUnavailable
        from ffattr.ops import backends

        backend = backends.BACKENDS[given["backend"]]
        reason = backend.check(self.device, getattr(torch, given["dtype"]), self.sizes[shape].heads)
        if reason is not None:
            raise BackendUnavailable(reason)
        found: Callable[..., Any] = getattr(backend.require_operators(), given["operator"])
        return found

    def _problems(self, given: Arguments) -> Iterator[tuple[Arguments, Any, Callable[..., Any]]]:
        import torch

        from ffattr.bench.operands import Problem

        for shape, lengths in given["cases"]:
            lengths = [min(length, 9) for length in lengths] if self.dry_run else lengths
            kernel = self._operator(given, shape)
            problem = Problem.draw_random(
                given["operator"], self.sizes[shape], lengths, getattr(torch, given["dtype"]), self.device
            )
            yield {"shape": shape, "lengths": lengths}, problem, kernel

    def _tolerance(self, given: Arguments) -> float:
        import torch

        from ffattr.bench.truth import TOLERANCE

        # Triton's interpreter truncates to bfloat16, and halves what float8 rounds up to a power of two.
        return 1.0 if self.dry_run else TOLERANCE[getattr(torch, given["dtype"])]

    def correct(self, given: Arguments) -> None:
        """Compares an operator with its definition in float64 at several shapes."""
        tolerance = self._tolerance(given)
        for case, problem, kernel in self._problems(given):
            start = time.monotonic()
            error = problem.measure_error(kernel(*problem.arguments.values()))
            seconds = time.monotonic() - start
            self.record.add(kind="correct", **case, error=error, right=error < tolerance, seconds=seconds)

    def time(self, given: Arguments) -> None:
        """Times an operator on operands that lie ready; a wrong result is recorded and not timed."""
        import torch

        from ffattr.bench.timing import time_median

        tolerance = self._tolerance(given)
        for case, problem, kernel in self._problems(given):
            run = functools.partial(kernel, *problem.arguments.values())
            error = problem.measure_error(run())
            if not error < tolerance:
                self.record.add(kind="time", **case, error=error, right=False)
                continue
            seconds = time_median(run, self.device, 1 if self.dry_run else ROUNDS, LIMIT)
            peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
            found = {"seconds": seconds, "flops": problem.flops, "error": error, "peak_bytes": peak}
            self.record.add(kind="time", **case, right=True, **found)

    def launch(self, given: Arguments) -> None:
        """For a profiler: three launches of each kernel, the last of which is warm."""
        import torch

        for _, problem, kernel in self._problems(given):
            for _ in range(3):
                kernel(*problem.arguments.values())
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # ---- layers and models

    def layer(self, given: Arguments) -> None:
        """A whole layer by the engine, or with all vectors in memory as earlier tools have them."""
        import torch

        from ffattr.bench.cases import Case
        from ffattr.bench.run import compute_maps, materialise_maps
        from ffattr.bench.timing import time_median
        from ffattr.bench.truth import TOLERANCE, Truth

        tokens = min(given["tokens"], 9) if self.dry_run else given["tokens"]
        dtype = getattr(torch, given["dtype"])
        case = Case.draw_random(self.sizes[given["shape"]], tokens, device=self.device)
        truth = Truth.from_case(case, case.wide_scopes)
        if given["backend"] == "materialising":
            run = functools.partial(materialise_maps, case.cast_to(dtype), case.wide_scopes)
            tolerance = 3e-2  # the layer is in bfloat16 as a whole, norms and attention included
        else:
            run = functools.partial(
                compute_maps, case, given["backend"], given["method"], case.wide_scopes, None, dtype
            )
            tolerance = TOLERANCE[dtype]
        error = truth.measure_error(run())
        about = {"kind": "layer", "error": error, "right": error < tolerance}
        if about["right"]:
            seconds = time_median(run, self.device, 1 if self.dry_run else ROUNDS, LIMIT)
            about |= {"seconds": seconds, "flops": case.flops}
        self.record.add(**about)

    def attribute(self, given: Arguments) -> None:
        """A model from its configuration, end to end: BERT with MiniLM's sizes, of as many positions as asked for."""
        import torch
        import transformers

        import ffattr

        tokens = min(given["tokens"], 9) if self.dry_run else given["tokens"]
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        if self.dry_run:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        config = transformers.BertConfig(**sizes, max_position_embeddings=tokens)
        model = transformers.BertModel(config).eval().to(self.device)
        ids = torch.randint(1000, 20000, (1, tokens), device=self.device)
        options: Arguments = {"scopes": "layer", "backend": given["backend"], "keep": ffattr.TopK(given["top"])}
        if not self.dry_run:
            options["dtype"] = torch.bfloat16
        for _ in range(2):  # the first compiles, and measures the machine
            start = time.monotonic()
            found = ffattr.attribute(model, ids, **options)
            seconds = time.monotonic() - start
        self.record.add(kind="attribute", tokens=tokens, seconds=seconds, plan=str(found.plan))

    def tune(self, given: Arguments) -> None:
        """The search of ``ffattr bench --tune``, stored, with its table."""
        import torch

        if self.device.type != "cuda":
            raise ValueError("tuning times kernels on a CUDA device")
        from ffattr.bench import tune
        from ffattr.bench.cases import Case
        from ffattr.ops.triton import configs

        case = Case.draw_random(self.sizes[given["shape"]], given["tokens"], device=self.device)
        found = tune.tune_kernels(case, torch.bfloat16, given["seconds"])
        stored = json.loads(configs.save_configs().read_text())
        self.record.add(kind="tuned", kernels=[asdict(tuned) for tuned in found], stored=stored)


def describe_error(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return f"{reason} ({last.filename.split('/')[-1]}:{last.lineno})"[:400]


def main() -> int:
    task = json.loads(sys.argv[1])
    record = Record(Path(sys.argv[2]), task["name"])
    try:
        tasks = Tasks(record, "--dry-run" in sys.argv)
        if "--now" not in sys.argv:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            if sys.stdin.readline() == "":
                return 0  # whoever waited for this one has gone
        getattr(tasks, task["kind"])(task["arguments"])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        name = type(error).__name__
        if name == "BackendUnavailable":
            record.add(kind="not available", reason=str(error))
            return 0
        record.add(kind="failed", reason="out of memory" if name.startswith("OutOfMemory") else describe_error(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
