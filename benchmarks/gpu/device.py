"""Everything that is measured on a GPU, by one command, within a time limit.

    python benchmarks/gpu/device.py [--minutes 8.5] [--no-build] [--no-tests] [--tune] [--profile] [--sanitize]
    python benchmarks/gpu/device.py --dry-run      # the same program on a CPU, with tiny layers in Triton's interpreter

Builds the extension with its CUDA kernels, runs the GPU tests, measures the machine (copies, matrix product) and then
one layer after the other, the most telling first. Every result is compared with the float64 definition before it is
timed; a wrong one is reported as such. What fails is recorded and does not stop the rest; what no longer fits the time
is named. Results go to benchmarks/results/<device>.json with a table beside it, and to $OUT where that is set.

Needs torch, Triton and the standard library: no part of ffattr that needs more is imported, and by this process none.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device_plan import FIRST, SHAPES, Estimate, Job, dtype_of, is_cuda, jobs
from device_process import Worker, run_limited
from device_report import Report

ROOT = Path(__file__).resolve().parents[2]
JOBS = Path(__file__).with_name("device_jobs.py")

# In two runs: a CUDA kernel that hangs shall not take the time of the others' tests.
CUDA_TESTS = ("csrc/test_cuda_*.py", "ops/test_selfcheck.py")
TESTS = (
    *("ops/triton/test_*.py", "engine/test_run_triton.py", "benchmarks/test_resources.py"),
    *("ops/test_contract*.py", "ops/test_backends*.py"),
)
CHECKED = ("bfloat16", "float8_e4m3fn", "float32", "float16")
# Seconds.
BUILD_LIMIT, CUDA_TEST_LIMIT, TEST_LIMIT, CHECK_LIMIT = 180.0, 60.0, 150.0, 45.0
PROFILE_LIMIT, SANITIZE_LIMIT, TUNE_LEAST = 90.0, 90.0, 120.0
CAPABILITY = "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))"


class Session:
    """One run of this program: its clock, its report, the process that works for it."""

    def __init__(self, asked: argparse.Namespace, report: Report, environment: dict[str, str]) -> None:
        self.asked, self.report, self.environment = asked, report, environment
        self.end: float = time.monotonic() + 60 * asked.minutes
        arguments = ["--dry-run"] if asked.dry_run else []
        self.worker = Worker([sys.executable, str(JOBS), *arguments], environment, ROOT)
        self.silent: dict[str, str] = {}  # dtypes in which CUDA kernels hang, or end the process

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
        environment = self.environment
        # A dry run asks for no more than the name: another build may be in use.
        arguments = ["--name"]
        if not self.asked.dry_run:
            arguments = ["build_ext", "--inplace"]
            environment = {"FFATTR_CUDA": "1", **self._architecture(), **environment}
        return self._command("build", [sys.executable, "setup.py", *arguments], BUILD_LIMIT, environment)

    def _architecture(self) -> dict[str, str]:
        """That of this GPU alone, for the time that others take; where it does not tell, all are built."""
        code, output = run_limited([sys.executable, "-c", CAPABILITY], self.environment, ROOT, 60)
        if code != 0:
            return {}
        capability = output.split()[-1]
        return {"TORCH_CUDA_ARCH_LIST": "9.0a" if capability == "9.0" else capability}

    def tests(self, name: str, patterns: tuple[str, ...], limit: float) -> str:
        patterns = ("decomposition/test_precision.py",) if self.asked.dry_run else patterns
        files = [str(path) for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]
        files.sort(key=lambda file: "resources" in file)  # compiles what needs no GPU: last, should time run out
        # A file that needs what this machine does not have shall not keep the others from running.
        options = ["-q", "-rfE", "--tb=short", "--durations=5", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", *files]
        return self._command(name, command, limit)

    def _command(self, name: str, command: list[str], limit: float, environment: dict[str, str] | None = None) -> str:
        limit = min(limit, self.left)
        code, output = run_limited(command, environment or self.environment, ROOT, limit)
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

    def cuda(self) -> str:
        """The self-check of the CUDA kernels in every dtype. Where it hangs nothing else is tried in that dtype."""
        told = {}
        for place, dtype in enumerate(CHECKED):
            answer = self.ask({"kind": "check", "backend": "cuda", "dtype": dtype}, CHECK_LIMIT)
            told[dtype] = answer.get("reason", "runs")
            if answer["status"] == "failed" and "checked" not in answer:
                self.silent = dict.fromkeys(CHECKED[place:], f"its self-check in {dtype}: {answer['reason']}")
            if self.silent or (place == 0 and answer["status"] == "not available"):
                break
            told[dtype] = ("failed: " if answer["status"] == "failed" else "") + told[dtype]
        self.report.machine({"CUDA kernels": told})
        failed = self.silent or any(text.startswith("failed") for text in told.values())
        return ("failed: " if failed else "") + "; ".join(f"{dtype} {text}" for dtype, text in told.items())

    def layers(self) -> None:
        estimate = Estimate()
        reserved = (PROFILE_LIMIT if self.asked.profile else 0.0) + (TUNE_LEAST if self.asked.tune else 0.0)
        reserved += 2 * SANITIZE_LIMIT if self.asked.sanitize else 0.0
        for job in jobs([s for s in SHAPES if s in self.asked.shapes], self.asked.dry_run):
            if self._known_missing(job):
                continue
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
        if is_cuda(job) and dtype_of(job) in self.silent:
            return {"status": "not available", "reason": self.silent[dtype_of(job)]}
        what = ("shape", "variant", "backend")
        same = [r for r in self.report.results if all(r.get(key) == job.get(key) for key in what)]
        full = [r["tokens"] for r in same if r["status"] == "out of memory" and r["tokens"] <= job["tokens"]]
        if full:
            return {"status": "out of memory", "reason": f"already at {min(full)} tokens"}
        if "variant" in job and sum(r["status"] == "failed" for r in same) >= 2:
            return {"status": "not tried", "reason": "failed twice before"}
        return None

    def _known_missing(self, job: Job) -> bool:
        """Whether the report has said that there is no such kernel here: once is enough."""
        what = ("kind", "variant", "backend")
        missing = [r for r in self.report.results if r["status"] == "not available"]
        return any(all(r.get(key) == job.get(key) for key in what) for r in missing)

    def sanitize(self, tool: str) -> str:
        if shutil.which("compute-sanitizer") is None:
            return "not run: compute-sanitizer is not on the PATH"
        self.worker.stop()  # its memory and its time on the GPU
        # Within a block that the allocator caches, any access would pass for a right one.
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
        command += ["-q", "-p", "no:cacheprovider", "tests/csrc/test_cuda_ff_norms.py", "-k", "small"]
        return self._command(tool, command, SANITIZE_LIMIT, environment)

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
        return self._command("ncu", command, PROFILE_LIMIT)

    def run(self) -> None:
        if not self.asked.no_build:
            self.step("build", 60, self.build)
        if not self.asked.no_tests:
            self.step("cuda-tests", 30, lambda: self.tests("cuda-tests", CUDA_TESTS, CUDA_TEST_LIMIT))
            self.step("tests", 60, lambda: self.tests("tests", TESTS, TEST_LIMIT))
        self.step("machine", 30, self.machine)
        if "flops_per_second" not in self.report.about:
            return
        if not self.asked.no_layers:
            self.step("cuda", 20, self.cuda)
            self.layers()
        if self.asked.sanitize:
            for tool in ("memcheck", "racecheck"):
                self.step(tool, 30, functools.partial(self.sanitize, tool))
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
    parser.add_argument("--no-layers", action="store_true", help="with --tune, --profile, --sanitize: only these")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tune", action="store_true", help="search for better tiles in what time is left")
    parser.add_argument("--profile", action="store_true", help="one launch of the direct kernel under ncu")
    parser.add_argument("--sanitize", action="store_true", help="a small CUDA launch under compute-sanitizer, twice")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny layers; no figures")
    return parser.parse_args()


def main() -> int:
    asked = parsed()
    with tempfile.TemporaryDirectory() as temporary:
        paths = [*stand_ins(Path(temporary)), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        folders = [Path(__file__).parents[1] / "results"]
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
