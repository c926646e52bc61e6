"""Everything that is measured on a GPU, in two calls of at most five minutes each.

    python benchmarks/gpu/device.py first     # compile, compare with float64, time, profile
    python benchmarks/gpu/device.py second    # the GPU's tests, sanitizer, whole models, tuning
    python benchmarks/gpu/device.py first --dry-run     # the same plan on a CPU, with tiny shapes; no figures

Every kernel runs in a process of its own under a limit; every result is in the file of results before the next one is
computed, and the table is made last, of what is there. Nothing is timed that differs from the definition. Results lie
in ``--out`` (a new folder unless given, or ``$OUT``), and with ``--keep`` in benchmarks/results/<device>.json as well.

Needs torch, Triton and the standard library; transformers for the second call.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from device_plan import CALLS, CASES_PER_TEST, GATED, GPU_TESTS, Phase, Task, plan_call
from device_process import Outcome, Process, run_phase
from device_report import read_records, write_table

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path(__file__).with_name("device_tasks.py")
RESULTS = Path(__file__).parents[1] / "results"
CLOCKS = ("timestamp", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu")
SMALL = "tests/csrc/test_cuda_ff_norms.py"


class Call:
    """One run of this program: its folder of results, and how a task becomes a process."""

    def __init__(self, asked: argparse.Namespace, folder: Path, temporary: Path) -> None:
        self.asked, self.folder = asked, folder
        self.results, self.start = folder / "results.jsonl", time.monotonic()
        self.compared: dict[str, tuple[dict[str, Any], str]] = {}
        paths = [str(ROOT), str(TASKS.parent), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        if asked.dry_run:
            self.environment |= {"TRITON_INTERPRET": "1", "FFATTR_CACHE": str(temporary)}

    # ---- what a task runs

    def make_process(self, task: Task) -> Process:
        commands: dict[str, Callable[[], list[str]]] = {
            "build": self._build,
            "tests": self._test,
            "memcheck": functools.partial(self._sanitize, "memcheck"),
            "racecheck": functools.partial(self._sanitize, "racecheck"),
            "profile": functools.partial(self._profile, task),
        }
        environment: dict[str, str] = {}
        if task.arguments.get("kernel") == "sm80":
            environment["FFATTR_CUDA_SM90"] = "0"
        if task.kind == "compile":  # not what a dry run interprets
            environment["TRITON_INTERPRET"] = "0"
        if task.kind in ("memcheck", "racecheck"):
            # Within a block that the allocator caches, any access would pass for a right one.
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        if task.kind == "build":
            environment |= {"FFATTR_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a")}
            environment["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
        command = commands[task.kind]() if task.kind in commands else self._task(task)
        waits = task.kind not in commands
        return Process(task.name, tuple(command), task.limit, task.lane, waits, environment)

    def _task(self, task: Task, *more: str) -> list[str]:
        about = json.dumps({"name": task.name, "kind": task.kind, "arguments": task.arguments})
        dry = ["--dry-run"] if self.asked.dry_run else []
        return [sys.executable, str(TASKS), about, str(self.results), *dry, *more]

    def _build(self) -> list[str]:
        # A dry run asks for no more than the name: another build may be in use.
        return [sys.executable, "setup.py", *(["--name"] if self.asked.dry_run else ["build_ext", "--inplace"])]

    def _test(self) -> list[str]:
        patterns: Sequence[str] = ("tests/decomposition/test_precision.py",) if self.asked.dry_run else GPU_TESTS
        files = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        # Verbose: what passed until the limit is known even where the end was not reached.
        options = ["-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", f"--cases-per-test={CASES_PER_TEST}"]
        options += [] if self.asked.dry_run else ["--numprocesses=12", "--timeout=20"]
        return [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", *files]

    def _sanitize(self, tool: str) -> list[str]:
        test = ["-m", "pytest", "-q", "-p", "no:cacheprovider", SMALL, "-k", "small", "--cases-per-test=1"]
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, *test]

    def _profile(self, task: Task) -> list[str]:
        """Of three launches the last one of the kernel that computes pairs of different tokens."""
        launch = Task(task.name, "launch", task.arguments)
        backend = task.arguments["backend"]
        kernels = {"triton": "direct_kernel", "cuda": "direct"}[backend]
        command = ["ncu", "--clock-control", "none", "--set", "full", "--kernel-name", f"regex:{kernels}"]
        command += ["--launch-skip", "4", "--launch-count", "1", "--csv", "--page", "raw"]
        command += ["--log-file", str(self.folder / f"ncu-{backend}.csv")]
        return [*command, *self._task(launch, "--now")]

    # ---- running

    def run(self, phases: Sequence[Phase]) -> None:
        with (self.folder / "log.txt").open("w") as log:
            for phase in phases:
                begin = time.monotonic() - self.start
                self.say(f"{phase.name}: {len(phase.tasks)} tasks within {phase.seconds:.0f} s")
                self.record(kind="phase", name=phase.name, begin=begin)
                processes = []
                for task in phase.tasks:
                    process = self.make_process(task)
                    unproven = self.find_unproven(task)
                    if unproven:
                        self.report(task, Outcome(task.name, f"not run: {unproven}", 0.0))
                    elif shutil.which(process.command[0]) is None:
                        self.report(task, Outcome(task.name, f"not run: no {process.command[0]} on the PATH", 0.0))
                    else:
                        processes.append(process)
                tasks = {task.name: task for task in phase.tasks}
                lanes = {"gpu": phase.gpu, "cpu": min(phase.cpu, 2 * (os.cpu_count() or 1))}
                run_phase(
                    processes,
                    lanes,
                    phase.seconds,
                    self.environment,
                    ROOT,
                    log,
                    functools.partial(self._report_one, tasks),
                )

    def find_unproven(self, task: Task) -> str | None:
        """Says why a kernel is not tried again: it hung, or died, when it was compared with its definition."""
        if task.kind not in ("time", "profile"):
            return None
        mine = {key: task.arguments[key] for key in ("backend", "operator", "dtype", "kernel")}
        for name, (given, status) in self.compared.items():
            if (
                mine.items() <= given.items()
                and status != "ok"
                and self._find_gated(given) & self._find_gated(task.arguments)
            ):
                return f"{name} {status}"
        return None

    @staticmethod
    def _find_gated(given: dict[str, Any]) -> set[bool]:
        """Returns whether layers of a task are gated, or not, or both: other kernels."""
        return {shape == GATED for shape, _ in given["cases"]}

    def record(self, **found: object) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps(found) + "\n")

    def report(self, task: Task, outcome: Outcome) -> None:
        if task.kind == "correct":
            self.compared[task.name] = task.arguments, outcome.status
        self.record(kind="task", of=task.kind, arguments=task.arguments, **asdict(outcome))
        self.say(f"{outcome.name}: {outcome.status}, {outcome.seconds:.1f} s")

    def _report_one(self, tasks: dict[str, Task], outcome: Outcome) -> None:
        self.report(tasks[outcome.name], outcome)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.1f} s] {text}", flush=True)


class Sampler:
    """Writes clocks and power of the GPU ten times a second to a file, where there is nvidia-smi."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._child: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> None:
        if shutil.which("nvidia-smi") is not None:
            command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,nounits", "--loop-ms=100"]
            self._output = self.file.open("wb")
            self._child = subprocess.Popen(command, stdout=self._output, stderr=subprocess.DEVNULL)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._child is not None and self._output is not None:
            self._child.send_signal(signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(2)
            self._output.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny layers; no figures")
    parser.add_argument("--phases", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--tasks", nargs="+", metavar="PATTERN", help="only those of these names, * for anything")
    parser.add_argument("--no-build", action="store_true", help="the extension is built already")
    parser.add_argument("--out", type=Path, help="folder of results (default: $OUT, else a new one)")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/<device>.json and .md too")
    return parser.parse_args()


def choose_phases(asked: argparse.Namespace) -> list[Phase]:
    phases = plan_call(asked.call)
    names = [phase.name for phase in phases]
    unknown = set(asked.phases or ()).difference(names)
    if unknown:
        raise SystemExit(f"no phase {', '.join(sorted(unknown))} in the {asked.call} call; it has {', '.join(names)}")
    chosen = [phase for phase in phases if asked.phases is None or phase.name in asked.phases]
    return [_pick_tasks(phase, asked) for phase in chosen]


def _pick_tasks(phase: Phase, asked: argparse.Namespace) -> Phase:
    """Limits of a dry run are four times as long: what takes a GPU milliseconds takes an interpreter seconds."""
    wanted = asked.tasks or ["*"]
    tasks = tuple(
        replace(task, limit=task.limit * (4 if asked.dry_run else 1))
        for task in phase.tasks
        if any(fnmatch.fnmatch(task.name, pattern) for pattern in wanted)
        and not (asked.no_build and task.kind == "build")
    )
    return replace(phase, tasks=tasks, seconds=phase.seconds * (4 if asked.dry_run else 1))


def main() -> int:
    asked = parse_arguments()
    phases = choose_phases(asked)
    out = asked.out or (
        Path(os.environ["OUT"]) if os.environ.get("OUT") else Path(tempfile.mkdtemp(prefix="ffattr-gpu-"))
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        call = Call(asked, out, Path(temporary))
        try:
            with Sampler(out / "clocks.csv"):
                call.run(phases)
        finally:  # also after Ctrl-C
            records = read_records(call.results)
            files = write_table(records, out, RESULTS if asked.keep and not asked.dry_run else None, asked.dry_run)
            print("\nresults:", *files)
    wrong = [r for r in records if r.get("right") is False or r["kind"] == "failed"]
    ended = [r for r in records if r["kind"] == "task" and r["status"].startswith(("failed", "stopped"))]
    return 1 if wrong or ended else 0


if __name__ == "__main__":
    sys.exit(main())
