"""Everything that is measured on a GPU, by one command, within a time limit.

    python benchmarks/device.py [--minutes 8.5] [--no-build] [--no-tests] [--tune] [--profile]
    python benchmarks/device.py --dry-run      # the same program on a CPU, with tiny layers in Triton's interpreter

Builds the extension, runs the GPU tests, measures the machine (copies, matrix product) and then one layer after the
other, the most telling first. Every result is compared with the float64 definition before it is timed; a wrong one is
reported as such. What fails is recorded and does not stop the rest; what no longer fits the time is named. Results go
to benchmarks/results/<device>.json with a table beside it, and to $OUT where that is set.

Needs torch, Triton and the standard library: no part of ffattr that needs more is imported, and by this process none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from device_process import Worker, run_limited
from device_report import Report

ROOT = Path(__file__).resolve().parent.parent
JOBS = Path(__file__).with_name("device_jobs.py")

TESTS = ("test_triton_*.py", "test_ops*.py", "test_ig_slope_op.py", "test_backend*.py")
BUILD_LIMIT, TEST_LIMIT, PROFILE_LIMIT, TUNE_LEAST = 100.0, 150.0, 90.0, 120.0  # seconds

DIRECT = "Triton direct"
VARIANTS = (DIRECT, "Triton direct, fp8", "Triton operator", "PyTorch, materialising", "PyTorch, chunked")
COMPILED = "PyTorch, chunked, compiled"
NARROW = "Triton, attention level"
FIRST = (("bert-base", 512), ("bert-base", 1024), ("llama-7b", 1024))
SHAPES = ("bert-base", "llama-7b", "gpt2", "minilm")
LENGTHS = (2048, 256, 128, 512, 1024, 4096, 8192)

# Until they are measured: operations per second, and seconds to compile.
GUESSED_RATES = {DIRECT: 2e14, "Triton direct, fp8": 2e14, "Triton operator": 5e13, COMPILED: 3e13}
SLOWEST = 1e13
COMPILING, COMPILING_GRAPHS = 12.0, 45.0

Job = dict[str, Any]


def jobs(shapes: list[str], dry_run: bool) -> Iterator[Job]:
    """All that is measured of layers, the most telling first."""
    if dry_run:
        first, rest, batch = [(shape, 2) for shape in shapes[:1]], [(shape, 2) for shape in shapes[1:]], (3, 2)
    else:
        first = [case for case in FIRST if case[0] in shapes]
        every = [(shape, tokens) for tokens in LENGTHS for shape in SHAPES if shape in shapes]
        rest, batch = [case for case in every if case not in first], (64, 128)
    for shape, tokens in first:
        for variant in (*VARIANTS, NARROW):
            yield {"kind": "layer", "shape": shape, "tokens": tokens, "variant": variant}
        yield {"kind": "slope", "shape": shape, "tokens": tokens}
    for looped in (False, True):
        yield {"kind": "batch", "shape": shapes[0], "sequences": batch[0], "tokens": batch[1], "looped": looped}
    for shape, tokens in first:
        yield {"kind": "layer", "shape": shape, "tokens": tokens, "variant": COMPILED}
    for shape, tokens in rest:
        for variant in VARIANTS:
            yield {"kind": "layer", "shape": shape, "tokens": tokens, "variant": variant}


class Estimate:
    """How long a job will take, from what the same variant has reached so far."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._compiled: set[tuple[str, str]] = set()

    def of(self, job: Job, flops: float) -> float:
        variant = str(job.get("variant", job["kind"]))
        once = flops / self._rates.get(variant, GUESSED_RATES.get(variant, SLOWEST))
        if variant == COMPILED:  # for every length anew
            setup = COMPILING_GRAPHS
        else:
            setup = 0.0 if (variant, job["shape"]) in self._compiled else COMPILING
        return 2.0 + setup + 4 * once + min(10 * once, 3.0)

    def learn(self, job: Job, answer: dict[str, Any]) -> None:
        if answer.get("seconds"):
            variant = str(job.get("variant", job["kind"]))
            self._compiled.add((variant, job["shape"]))
            if answer["flops"]:
                self._rates[variant] = answer["flops"] / answer["seconds"]


class Session:
    """One run of this program: its clock, its report, the process that works for it."""

    def __init__(self, asked: argparse.Namespace, report: Report, environment: dict[str, str]) -> None:
        self.asked, self.report, self.environment = asked, report, environment
        self.end: float = time.monotonic() + 60 * asked.minutes
        arguments = ["--dry-run"] if asked.dry_run else []
        self.worker = Worker([sys.executable, str(JOBS), *arguments], environment, ROOT)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def step(self, name: str, needed: float, run: Callable[[], str]) -> None:
        """``run`` returns what became of it; not begun where fewer than ``needed`` seconds are left."""
        if self.left < needed:
            self.report.skip(name)
            return
        start = time.monotonic()
        try:
            status = run()
        except Exception as error:
            status = f"failed: {traceback.format_exception_only(error)[-1].strip()}"
        self.report.step(name, status, time.monotonic() - start)

    def ask(self, job: Job, limit: float) -> dict[str, Any]:
        return self.worker.ask(job, min(limit, max(self.left, 1.0)))

    # ---- steps

    def build(self) -> str:
        # A dry run asks for no more than the name: another build may be in use.
        arguments = ["--name"] if self.asked.dry_run else ["build_ext", "--inplace"]
        command = [sys.executable, "setup.py", *arguments]
        return self._command("build", command, min(BUILD_LIMIT, self.left))

    def tests(self) -> str:
        patterns = ("test_dtypes.py",) if self.asked.dry_run else TESTS
        files = [str(path) for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]
        files.sort(key=lambda file: "resources" in file)  # compiles what needs no GPU: last, should time run out
        # A file that needs what this machine does not have shall not keep the others from running.
        options = ["-q", "-rfE", "--tb=short", "--durations=5", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", *files]
        return self._command("tests", command, min(TEST_LIMIT, self.left))

    def _command(self, name: str, command: list[str], limit: float) -> str:
        code, output = run_limited(command, self.environment, ROOT, limit)
        self.report.log(name, output)
        last = (output.strip().splitlines() or ["no output"])[-1]
        return f"stopped after {limit:.0f} s: {last}" if code is None else ("" if code == 0 else "failed: ") + last

    def machine(self) -> str:
        for kind in ("machine", "copy", "matrix"):
            answer = self.ask({"kind": kind}, 120)
            if answer["status"] != "ok":
                raise RuntimeError(f"{kind}: {answer.get('reason', answer['status'])}")
            self.report.machine(answer)
        return str(self.report.about["name"])

    def layers(self) -> None:
        estimate = Estimate()
        reserved = (PROFILE_LIMIT if self.asked.profile else 0.0) + (TUNE_LEAST if self.asked.tune else 0.0)
        for job in jobs([s for s in SHAPES if s in self.asked.shapes], self.asked.dry_run):
            flops = self.report.about["flops_per_pair"][job["shape"]] * float(job["tokens"]) ** 2
            needed = estimate.of(job, flops * job.get("sequences", 1))
            if needed > self.left - reserved:
                self.report.skip(self.report.title(job))
                continue
            answer = self._hopeless(job) or self.ask(job, max(60.0, 4 * needed))
            if answer["status"] == "failed" and self.left < 1:  # given up because the end had come
                self.report.skip(self.report.title(job))
                continue
            estimate.learn(job, answer)
            self.report.result(job, answer)

    def _hopeless(self, job: Job) -> dict[str, Any] | None:
        """The answer of a variant that ran out of memory with fewer tokens, or failed twice, for the same shape."""
        same = [r for r in self.report.results if (r["shape"], r.get("variant")) == (job["shape"], job.get("variant"))]
        full = [r["tokens"] for r in same if r["status"] == "out of memory" and r["tokens"] <= job["tokens"]]
        if full:
            return {"status": "out of memory", "reason": f"already at {min(full)} tokens"}
        if "variant" in job and sum(r["status"] == "failed" for r in same) >= 2:
            return {"status": "not tried", "reason": "failed twice before"}
        return None

    def tune(self) -> str:
        """The last of all: it takes what time is left, for the two layers that tell most."""
        told = []
        cases = [case for case in (FIRST[0], FIRST[2]) if case[0] in self.asked.shapes]
        for number, (shape, tokens) in enumerate(cases):
            seconds = max(5.0, (self.left - 45) / (len(cases) - number))  # and some more for what is under way then
            job = {"kind": "tune", "shape": shape, "tokens": tokens, "dtype": "bfloat16", "seconds": seconds}
            answer = self.ask(job, seconds + 60)
            self.report.tuned(job, answer)
            told.append(f"{shape} {answer['status']} {answer.get('reason', '')}".strip())
        return ", ".join(told)

    def profile(self) -> str:
        if shutil.which("ncu") is None:
            raise FileNotFoundError("ncu is not on the PATH")
        self.worker.stop()  # its memory and its time on the GPU
        command = ["ncu", "--kernel-name", "regex:direct_kernel", "--launch-skip", "2", "--launch-count", "1"]
        command += ["--set", "full", sys.executable, str(JOBS), "--once", *map(str, FIRST[0])]
        return self._command("ncu", command, min(PROFILE_LIMIT, self.left))

    def run(self) -> None:
        if not self.asked.no_build:
            self.step("build", 60, self.build)
        if not self.asked.no_tests:
            self.step("tests", 60, self.tests)
        self.step("machine", 30, self.machine)
        if "flops_per_second" not in self.report.about:
            return
        if not self.asked.no_layers:
            self.layers()
        if self.asked.profile:
            self.step("profile", 40, self.profile)
        if self.asked.tune:
            self.step("tune", 40, self.tune)


def stand_ins(folder: Path) -> list[str]:
    """What to put before PYTHONPATH: psutil, of which planning needs one number, where it is not installed."""
    try:
        import psutil  # noqa: F401
    except ImportError:
        (folder / "psutil.py").write_text(
            "import os\nfrom types import SimpleNamespace\n\n\ndef virtual_memory():\n"
            "    pages, size = os.sysconf('SC_AVPHYS_PAGES'), os.sysconf('SC_PAGE_SIZE')\n"
            "    return SimpleNamespace(available=pages * size)\n"
        )
        return [str(folder)]
    return []


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="end of everything")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-layers", action="store_true", help="with --tune or --profile: only these")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tune", action="store_true", help="search for better tiles in what time is left")
    parser.add_argument("--profile", action="store_true", help="one launch of the direct kernel under ncu")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny layers; no figures")
    return parser.parse_args()


def main() -> int:
    asked = parsed()
    with tempfile.TemporaryDirectory() as temporary:
        paths = [*stand_ins(Path(temporary)), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        folders = [Path(__file__).parent / "results"]
        if asked.dry_run:
            environment |= {"TRITON_INTERPRET": "1", "FFATTR_CACHE": temporary}
            folders = [Path(tempfile.mkdtemp(prefix="ffattr-dry-run-"))]
        if os.environ.get("OUT"):
            folders.append(Path(os.environ["OUT"]))
        report = Report(folders, asked.dry_run)
        session = Session(asked, report, environment)
        try:
            session.run()
        finally:
            session.worker.stop()
            report.save()
    print("\nresults:", *report.files)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
