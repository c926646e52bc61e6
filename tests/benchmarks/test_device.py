"""benchmarks/gpu/device.py: processes that hang or die, what it reports, and a dry run from end to end."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import BENCHMARKS, ROOT

FOLDER = BENCHMARKS / "gpu"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


# ---- processes

ANSWERS = """
import json, os, sys, time
print("something else")
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "die":
        print("went wrong", file=sys.stderr)
        os._exit(3)
    if job["do"] == "hang":
        time.sleep(60)
    print("answer", json.dumps({"status": "ok", "pid": os.getpid(), "unusable": job["do"] == "spoil"}), flush=True)
"""


@pytest.fixture
def worker(scripts: None) -> Iterator[Any]:
    from device_process import Worker

    started = Worker([sys.executable, "-c", ANSWERS], dict(os.environ), ROOT)
    yield started
    started.stop()


def test_a_worker_answers_until_it_dies_hangs_or_is_spoilt(worker: Any) -> None:
    first = worker.ask({"do": "answer"}, 30)
    assert worker.ask({"do": "answer"}, 30) == first == {"status": "ok", "pid": first["pid"]}
    assert worker.ask({"do": "die"}, 30) == {"status": "failed", "reason": "the process died: went wrong"}
    second = worker.ask({"do": "spoil"}, 30)
    assert second["status"] == "ok"
    third = worker.ask({"do": "answer"}, 30)
    assert len({first["pid"], second["pid"], third["pid"]}) == 3
    start = time.monotonic()
    assert worker.ask({"do": "hang"}, 0.5)["reason"] == "no answer within 0 s: given up"
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessLookupError):
        os.kill(third["pid"], 0)
    assert worker.ask({"do": "answer"}, 30)["status"] == "ok"


def test_a_worker_that_cannot_start(scripts: None) -> None:
    from device_process import Worker

    started = Worker([sys.executable, "-c", "raise ImportError('no torch')"], dict(os.environ), ROOT)
    assert started.ask({}, 30) == {"status": "failed", "reason": "the process died: ImportError: no torch"}
    started.stop()


def test_a_command_with_a_limit(scripts: None) -> None:
    from device_process import run_limited

    code = "print('begun', flush=True); import time; time.sleep({})"
    assert run_limited([sys.executable, "-c", code.format(0)], dict(os.environ), ROOT, 30) == (0, "begun\n")
    assert run_limited([sys.executable, "-c", code.format(60)], dict(os.environ), ROOT, 1) == (None, "begun\n")


# ---- what is measured and reported


def test_jobs_are_in_order_of_what_they_tell(scripts: None) -> None:
    from device_plan import COMPILED, CUDA_DIRECT, DIRECT, SHAPES, Estimate, jobs

    every = list(jobs(list(SHAPES), dry_run=False))
    layers = [(job["shape"], job["tokens"]) for job in every if job["kind"] == "layer"]
    assert list(dict.fromkeys(layers))[:3] == [("bert-base", 512), ("bert-base", 1024), ("llama-7b", 1024)]
    assert set(layers) == {(s, t) for s in SHAPES for t in (128, 256, 512, 1024, 2048, 4096, 8192)}
    assert [job["variant"] for job in every[:2]] == [DIRECT, CUDA_DIRECT]
    assert {job["shape"] for job in jobs(["gpt2"], dry_run=False)} == {"gpt2"}

    estimate, flops = Estimate(), 4e12
    before = estimate.of(every[0], flops)
    estimate.learn(every[0], {"status": "ok", "seconds": 0.1, "flops": flops})
    assert estimate.of(every[0], flops) == pytest.approx(2 + 0.4 + 1.0)
    assert before > 10  # with compiling
    assert estimate.of(every[0], 100 * flops) == pytest.approx(2 + 40 + 3)
    assert estimate.of({**every[0], "variant": COMPILED}, 0.0) > 40
    assert estimate.of({**every[0], "variant": CUDA_DIRECT}, 0.0) == 2  # nothing to compile


def test_what_is_not_tried_again(scripts: None, tmp_path: Path) -> None:
    from device import Session
    from device_report import Report

    report = Report([tmp_path], True)
    session = Session(argparse.Namespace(minutes=1.0, dry_run=True), report, {})
    job = {"kind": "layer", "shape": "gpt2", "tokens": 8, "variant": "a"}
    report.result(job, {"status": "out of memory"})
    assert session._hopeless({**job, "tokens": 4}) is None
    assert session._hopeless({**job, "variant": "b"}) is None
    assert session._hopeless({**job, "tokens": 16}) == {"status": "out of memory", "reason": "already at 8 tokens"}
    report.result({**job, "variant": "b"}, {"status": "failed", "reason": "?"})
    assert session._hopeless({**job, "variant": "b"}) is None
    report.result({**job, "variant": "b", "tokens": 9}, {"status": "failed", "reason": "?"})
    assert session._hopeless({**job, "variant": "b"}) == {"status": "not tried", "reason": "failed twice before"}


class Answers:
    """A worker that has an answer for each dtype."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.answers = answers

    def ask(self, job: dict[str, Any], limit: float) -> dict[str, Any]:
        return self.answers.get(job["dtype"], {"status": "ok", "checked": True})


WRONG = {"status": "failed", "checked": True, "reason": "ff_norms is off"}
HANGS = {"status": "failed", "reason": "no answer within 45 s: given up"}
MISSING = {"status": "not available", "reason": "needs 9.0"}


@pytest.mark.parametrize(
    ("answers", "status", "silent"),
    [
        ({}, "bfloat16 runs; float8_e4m3fn runs; float32 runs; float16 runs", ()),
        (
            {"float8_e4m3fn": MISSING, "float32": WRONG},
            "failed: bfloat16 runs; float8_e4m3fn needs 9.0; float32 failed: ff_norms is off; float16 runs",
            (),
        ),
        ({"bfloat16": MISSING}, "bfloat16 needs 9.0", ()),
        (
            {"float8_e4m3fn": HANGS},
            "failed: bfloat16 runs; float8_e4m3fn no answer within 45 s: given up",
            ("float8_e4m3fn", "float32", "float16"),
        ),
    ],
)
def test_cuda_kernels_that_hang_are_left_alone(
    answers: dict[str, Any], status: str, silent: tuple[str, ...], scripts: None, tmp_path: Path
) -> None:
    from device import Session
    from device_report import Report

    session = Session(argparse.Namespace(minutes=1.0, dry_run=True), Report([tmp_path], True), {})
    session.worker = Answers(**answers)
    assert session.cuda() == status
    assert tuple(session.silent) == silent
    job = {"kind": "layer", "shape": "gpt2", "tokens": 8}
    assert session._hopeless({**job, "variant": "Triton direct, fp8"}) is None
    assert session._hopeless({**job, "variant": "CUDA direct"}) is None
    found = session._hopeless({**job, "variant": "CUDA direct, fp8"})
    assert (found is not None) == ("float8_e4m3fn" in silent)
    assert not session._known_missing({**job, "variant": "CUDA direct, fp8"})
    if found is not None:
        session.report.result({**job, "variant": "CUDA direct, fp8"}, found)
        assert session._known_missing({**job, "shape": "minilm", "variant": "CUDA direct, fp8"})


@pytest.mark.parametrize(
    ("said", "environment"),
    [
        ((0, "a warning\n9.0\n"), {"TORCH_CUDA_ARCH_LIST": "9.0a"}),
        ((0, "8.6\n"), {"TORCH_CUDA_ARCH_LIST": "8.6"}),
        ((1, "no GPU"), {}),
    ],
)
def test_the_build(
    said: tuple[int, str],
    environment: dict[str, str],
    scripts: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For this GPU alone; who names others gets them. A build that fails is a step that failed."""
    import device
    from device_report import Report

    runs: list[dict[str, str]] = []

    def run_limited(command: list[str], environment: dict[str, str], *_: object) -> tuple[int, str]:
        if "-c" in command:
            return said
        runs.append(environment)
        return 1, "compiling\nnvcc: error"

    monkeypatch.setattr(device, "run_limited", run_limited)
    report = Report([tmp_path], False)
    for given in ({}, {"TORCH_CUDA_ARCH_LIST": "8.0"}):
        asked = device.Session(argparse.Namespace(minutes=1.0, dry_run=False), report, given)
        asked.step("build", 1, asked.build)
        assert runs.pop() == {"FFATTR_CUDA": "1", **environment, **given}
        assert report.steps[-1]["status"] == "failed: nvcc: error"
    assert "build" in report.failures


def test_sanitizing(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import device
    from device_report import Report

    session = device.Session(argparse.Namespace(minutes=1.0, dry_run=True), Report([tmp_path], True), {"A": "B"})
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert session.sanitize("memcheck") == "not run: compute-sanitizer is not on the PATH"
    monkeypatch.setattr(device.shutil, "which", lambda name: name)
    runs: list[Any] = []
    monkeypatch.setattr(device, "run_limited", lambda *asked: (0, f"{runs.append(asked)} errors"))
    assert session.sanitize("racecheck") == "None errors"
    ((command, environment, _, limit),) = runs
    assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert command[-3:] == ["tests/csrc/test_cuda_ff_norms.py", "-k", "small"]
    assert environment == {"A": "B", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert limit <= 60


def answer(seconds: float, flops: float = 2e9) -> dict[str, Any]:
    return {"status": "ok", "seconds": seconds, "flops": flops, "error": 1e-3, "peak_bytes": 1 << 30}


def filled(folder: Path, dry_run: bool) -> Any:
    from device_report import Report

    report = Report([folder], dry_run)
    report.step("tests", "5 passed", 3.0)
    report.machine({"status": "ok", "name": "NVIDIA A-1 80GB", "torch": "2", "dtype": "torch.bfloat16"})
    report.machine({"status": "ok", "flops_per_second": 1e12, "bytes_per_second": 3e12})
    job = {"kind": "layer", "shape": "gpt2", "tokens": 8}
    report.result({**job, "variant": "Triton direct"}, answer(0.004))
    report.result({**job, "variant": "CUDA direct"}, answer(0.002))
    report.result({**job, "variant": "PyTorch, chunked"}, {"status": "wrong", "reason": "off by 1"})
    report.result({**job, "variant": "PyTorch, materialising"}, answer(0.4))
    report.result({**job, "kind": "slope", "backend": "triton"}, answer(0.001, 0.0))
    report.result({**job, "kind": "slope", "backend": "cuda"}, answer(0.0005, 0.0))
    batch = {"kind": "batch", "shape": "gpt2", "tokens": 8, "sequences": 64}
    report.result({**batch, "looped": False, "backend": "triton"}, answer(0.01))
    report.result({**batch, "looped": False, "backend": "cuda"}, answer(0.005))
    report.result({**batch, "looped": True, "backend": "triton"}, answer(0.05))
    report.result({**batch, "looped": True, "backend": "cuda"}, answer(0.06))
    report.skip("gpt2, T = 99, Triton direct")
    trials = [{"config": {"warps": 8}, "seconds": 0.001, "reason": "", "rule": False}]
    trials += [{"config": {"warps": 4}, "seconds": None, "reason": "out of resources", "rule": True}]
    tuned = {"status": "ok", "kernels": [{"kernel": "direct", "key": "direct: bfloat16", "trials": trials, "left": 7}]}
    report.tuned({"kind": "tune", "shape": "gpt2", "tokens": 8}, tuned)
    report.log("tests", "5 passed\n")
    report.save()
    return report


def test_the_report(scripts: None, tmp_path: Path) -> None:
    report = filled(tmp_path, dry_run=False)
    assert [path.name for path in report.files] == [f"nvidia-a-1-80gb.{end}" for end in ("json", "md", "tests.txt")]
    assert report.failures == ["gpt2, T = 8, PyTorch, chunked"]
    table = (tmp_path / "nvidia-a-1-80gb.md").read_text().splitlines()
    for line in (
        "torch 2, torch.bfloat16 matrix product 1 TFLOP/s, copies 3000 GB/s, read and written.",
        "| tests | 5 passed | 3 |",
        "| 8 | Triton direct | 4.000 | 50.0% | 1.00 | 1e-03 | 100.0 |  |",
        "| 8 | CUDA direct | 2.000 | 100.0% | 1.00 | 1e-03 | 200.0 | 0.50 |",
        "| 8 | PyTorch, chunked | wrong: off by 1 |  |  |  |  |  |",
        "| 8 | PyTorch, materialising | 400.000 | 0.5% | 1.00 | 1e-03 | 1.0 |  |",
        "| gpt2, T = 8, slope, triton | 1.000 | 25.0% |  | 1e-03 |  |",
        "| gpt2, T = 8, slope, cuda | 0.500 | 25.0% |  | 1e-03 | 0.50 |",
        "| gpt2, T = 8, 64 sequences, in one launch, triton | 10.000 |  | 5.0 | 1e-03 |  |",
        "| gpt2, T = 8, 64 sequences, in one launch, cuda | 5.000 |  | 12.0 | 1e-03 | 0.50 |",
        "| gpt2, T = 8, 64 sequences, one by one, cuda | 60.000 |  | 1.0 | 1e-03 | 1.20 |",
        "direct: bfloat16: 1 timed, 1 do not run or are wrong, 7 not tried.",
        "| 1.000 | warps 8 |  |",
        "| out of resources | warps 4 | yes |",
        "- gpt2, T = 99, Triton direct",
    ):
        assert line in table, line


def test_a_dry_run_keeps_no_figures(scripts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, dry_run=True)
    whole = json.loads((tmp_path / "nvidia-a-1-80gb.json").read_text())
    assert whole["note"] == "dry run, no figures"
    assert {result.get("seconds") for result in whole["results"]} == {None}
    table = (tmp_path / "nvidia-a-1-80gb.md").read_text()
    assert "Dry run, no figures." in table
    for text in ("TFLOP", "4.000", "50.0%", "100.0", "25.0%", "0.50"):
        assert text not in table
    assert " ms" not in capsys.readouterr().out


def test_nothing_is_kept_of_an_unknown_machine(scripts: None, tmp_path: Path) -> None:
    from device_report import Report

    report = Report([tmp_path / "results", tmp_path / "out"], dry_run=False)
    report.step("machine", "failed: no GPU", 1.0)
    report.save()
    assert not (tmp_path / "results").exists()
    assert {path.name for path in report.files} == {"unknown-device.json", "unknown-device.md"}


# ---- from end to end


def device(tmp_path: Path, *arguments: str) -> tuple[int, str, Path]:
    """Without what a bare machine does not have, or may not use."""
    for name in ("rich", "typer", "psutil", "safetensors", "transformers", "matplotlib", "pandas"):
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__ + ' is not to be used')\n")
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OUT": str(out), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "device.py"), "--dry-run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    return done.returncode, done.stdout + done.stderr, out


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_dry_run(tmp_path: Path) -> None:
    code, said, out = device(tmp_path, "--no-tests", "--shapes", "minilm", "--profile", "--tune", "--sanitize")
    whole = json.loads(next(out.glob("*.json")).read_text())
    assert [step["name"] for step in whole["steps"]] == [
        *("build", "machine", "cuda", "memcheck", "racecheck", "profile", "tune")
    ], said
    assert whole["steps"][0]["status"] == "ffattr"
    cuda, others = [], []
    for result in whole["results"]:
        variant = result.get("variant", f"{result['kind']} {result.get('backend')}")
        (cuda if "cuda" in variant.lower() else others).append((variant, result["status"]))
    assert others == [
        ("Triton direct", "ok"),
        ("Triton direct, fp8", "ok"),
        ("Triton operator", "ok"),
        ("PyTorch, materialising", "ok"),
        ("PyTorch, chunked", "ok"),
        ("Triton, attention level", "ok"),
        ("slope triton", "ok"),
        ("batch triton", "ok"),
        ("batch triton", "ok"),
        ("PyTorch, chunked, compiled", "ok"),
    ], said
    names = ["CUDA direct", "CUDA direct, fp8", "CUDA, attention level", "slope cuda", "batch cuda"]
    assert cuda == [(name, "not available") for name in names], said  # no GPU is looked for
    assert all(r["reason"] for r in whole["results"] if r["status"] == "not available")
    assert {result.get("seconds") for result in whole["results"]} == {None}
    assert code in (0, 1)  # a GPU's profiler is missing here, on most machines
    assert str(out) in said
    assert not any(name in said for name in (" ms", "Traceback"))


def test_no_time(tmp_path: Path) -> None:
    code, said, out = device(tmp_path, "--minutes", "0.01")
    assert code == 0, said
    whole = json.loads(next(out.glob("*.json")).read_text())
    assert whole["no time left for"] == ["build", "cuda-tests", "tests", "machine"]
