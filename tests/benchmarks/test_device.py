"""benchmarks/gpu/device.py: its time plan, and a dry run from end to end."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paths import BENCHMARKS, ROOT

FOLDER = BENCHMARKS / "gpu"
MOST_SECONDS = 300
GRACE = 2 * 2.0  # of processes that do not end, in the last phase and one before it
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


# ---- the plan


def schedule(phase: Any, seconds: dict[str, float]) -> dict[str, float]:
    """When each task of a phase is over that begins within it, where tasks take so many seconds, or their limit."""
    lanes = {"gpu": [0.0] * phase.gpu, "cpu": [0.0] * phase.cpu}
    ends = {}
    for task in phase.tasks:
        lane = lanes[task.lane]
        begin = min(lane)
        if begin < phase.seconds:
            took = min(seconds.get(task.name, task.expected), task.limit, phase.seconds - begin)
            ends[task.name] = lane[lane.index(begin)] = begin + took
    return ends


@pytest.mark.parametrize("call", ["first", "second"])
def test_a_call_is_over_in_time_and_all_of_it_fits(call: str, scripts: None) -> None:
    from device_plan import plan_call

    phases = plan_call(call)
    assert sum(phase.seconds for phase in phases) + GRACE <= MOST_SECONDS
    for phase in phases:
        assert len({task.name for task in phase.tasks}) == len(phase.tasks)
        assert all(task.expected <= task.limit <= phase.seconds for task in phase.tasks)
        ends = schedule(phase, {})
        assert set(ends) == {task.name for task in phase.tasks}
        assert max(ends.values()) < phase.seconds, phase.name


@pytest.mark.parametrize("kind", ["triton ff_norms", "sm90", "gated", "float8"])
def test_kernels_that_hang_take_no_one_elses_turn(kind: str, scripts: None, tmp_path: Path) -> None:
    """All of one kind at once: those are stopped when they are compared, and not timed."""
    import device
    from device_plan import name_kernel

    call = device.Call(argparse.Namespace(dry_run=False), tmp_path, tmp_path)
    _, compare, timing, *_ = device.plan_call("first")
    hanging = {task.name: 1e9 for task in compare.tasks if kind in task.name}
    assert hanging
    ends = schedule(compare, hanging)
    assert set(ends) == {task.name for task in compare.tasks}
    for task in compare.tasks:
        call.report(task, device.Outcome(task.name, "stopped after 12 s" if task.name in hanging else "ok", 1.0))
    unproven = {task.name: call.find_unproven(task) for task in timing.tasks}
    for task in timing.tasks:
        gated = {shape == "llama-7b" for shape, _ in task.arguments["cases"]}
        name = name_kernel(*(task.arguments[key] for key in ("backend", "operator", "dtype", "kernel")))
        compared = [f"compare {name} {'gated' if one else 'dense'}" for one in gated]
        assert (unproven[task.name] is not None) == any(name in hanging for name in compared), task.name
    left = replace(timing, tasks=tuple(task for task in timing.tasks if unproven[task.name] is None))
    assert set(schedule(left, {})) == {task.name for task in left.tasks}


def test_every_kernel_is_compared_before_it_is_timed(scripts: None) -> None:
    from device_plan import plan_call

    prepare, compare, time, *_ = plan_call("first")

    def kernels(phase: Any) -> set[tuple[str, ...]]:
        keys = ("backend", "operator", "dtype", "kernel")
        return {tuple(task.arguments[key] for key in keys) for task in phase.tasks}

    assert kernels(time) <= kernels(compare)
    wide = {(*kernel[:3], *kernel[3:]) for kernel in kernels(compare) if kernel[1] == "ff_norms"}
    assert {kernel[3] for kernel in wide if kernel[0] == "cuda"} == {"sm80", "sm90"}
    compiled = {
        (task.arguments["operator"], task.arguments["dtype"], task.arguments["shape"], tuple(lengths))
        for task in prepare.tasks
        if task.kind == "compile"
        for lengths in task.arguments["lengths"]
    }
    for phase in (compare, time):
        for task in phase.tasks:
            given = task.arguments
            for shape, lengths in given["cases"] if given["backend"] == "triton" else ():
                assert (given["operator"], given["dtype"], shape, (sum(lengths),)) in compiled


def test_what_is_asked_for(scripts: None) -> None:
    import device

    asked = argparse.Namespace(call="first", phases=["time", "prepare"], tasks=["*sm80*"], no_build=True, dry_run=True)
    prepare, time = device.choose_phases(asked)
    assert (prepare.name, prepare.tasks) == ("prepare", ())
    assert [task.name for task in time.tasks] == [
        "time cuda sm80 ff_norms bfloat16: bert-base 2048, llama-7b 1024",
        "time cuda sm80 ff_norms float32: bert-base 2048",
    ]
    with pytest.raises(SystemExit, match="no phase later in the first call; it has prepare, compare, time"):
        device.choose_phases(argparse.Namespace(call="first", phases=["later"]))


def test_what_tasks_run(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import device

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    call = device.Call(argparse.Namespace(dry_run=False), tmp_path, tmp_path)
    tasks = {task.kind: task for phase in device.plan_call("second") for task in phase.tasks}
    tasks |= {task.kind: task for phase in device.plan_call("first") for task in phase.tasks}
    build = call.make_process(tasks["build"])
    assert build.command[1:] == ("setup.py", "build_ext", "--inplace")
    assert build.environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    tests = call.make_process(tasks["tests"]).command
    files = [argument for argument in tests if argument.startswith("tests/")]
    assert {"--numprocesses=12", "--timeout=20"} <= set(tests)
    assert "tests/ops/triton/test_ff_norms.py" in files
    assert all((ROOT / file).is_file() for file in files)
    memcheck = call.make_process(tasks["memcheck"])
    assert memcheck.command[:3] == ("compute-sanitizer", "--tool", "memcheck")
    assert memcheck.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    profile = call.make_process(tasks["profile"]).command
    assert profile[:3] == ("ncu", "--clock-control", "none")
    assert profile[-1] == "--now"
    old = [task for task in device.plan_call("first")[2].tasks if task.arguments["kernel"] == "sm80"]
    assert call.make_process(old[0]).environment == {"FFATTR_CUDA_SM90": "0"}
    assert 'getenv("FFATTR_CUDA_SM90")' in (ROOT / "csrc/cuda/ff_norms_sm90.cu").read_text()


# ---- from end to end

PICKED = ("machine", "build", "rates", "compile gram_norms float32 minilm", "compare triton ff_norms bfloat16 dense")
PICKED += ("compare cuda sm90 ff_norms bfloat16 dense", "time triton ig_slope*", "profile triton", "layer * triton")


@needs_triton
def test_dry_run(tmp_path: Path) -> None:
    """Without what a bare machine does not have, or may not use."""
    for name in ("rich", "typer", "safetensors", "transformers", "matplotlib", "pandas", "pytest"):
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__ + ' is not to be used')\n")
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OUT": str(out), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "device.py"), "first", "--dry-run", "--keep", "--tasks", *PICKED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    said = done.stdout + done.stderr + (out / "log.txt").read_text()
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    status = {r["name"]: r["status"] for r in records if r["kind"] == "task"}
    missing = {"not run: no ncu on the PATH", "ok", "failed: exit 1"}  # a profiler that finds no GPU
    assert status.pop("profile triton") in missing, said
    assert set(status.values()) == {"ok"}, said
    assert len(status) == 9
    kinds = [r["kind"] for r in records]
    assert [r["name"] for r in records if r["kind"] == "phase"] == ["prepare", "compare", "time", "profile", "layers"]
    assert {"machine", "rate", "copy", "compiled", "correct", "not available", "time", "layer"} <= set(kinds), said
    assert kinds.count("correct") == 3
    assert all(r["right"] for r in records if "right" in r), said
    table = (out / "table.md").read_text()
    assert table in done.stdout
    assert "Dry run, no figures." in table
    assert "| triton ff_norms bfloat16 dense | right |" in table
    assert "| compare cuda sm90 ff_norms bfloat16 dense | not available |" in table
    assert "TFLOP" not in table
    assert str(out / "table.md") in done.stdout
    assert not list((BENCHMARKS / "results").glob("*cores.json"))  # a dry run is not kept
