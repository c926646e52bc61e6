"""benchmarks/gpu/device_report.py: what the table says of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from paths import BENCHMARKS


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    import device_report

    return device_report


def task(name: str, kind: str, backend: str, status: str = "ok", cases: int = 1) -> dict[str, Any]:
    given = {
        "backend": backend,
        "operator": "ff_norms",
        "dtype": "bfloat16",
        "kernel": "",
        "cases": [["a", [4]]] * cases,
    }
    return {"kind": "task", "name": name, "of": kind, "arguments": given, "status": status, "seconds": 1.0}


def records() -> list[dict[str, Any]]:
    case = {"shape": "bert-base", "lengths": [512]}
    return [
        {"kind": "machine", "name": "NVIDIA A-1 80GB", "torch": "2"},
        {"kind": "rate", "dtype": "bfloat16", "flops_per_second": 1e12},
        {"kind": "copy", "bytes_per_second": 3e12},
        {"kind": "correct", "task": "compare triton", **case, "right": True, "error": 1e-3},
        {"kind": "correct", "task": "compare triton", **case, "right": True, "error": 2e-3},
        {"kind": "correct", "task": "compare cuda", **case, "right": False, "error": 0.5},
        task("compare triton", "correct", "triton", "stopped after 12 s", cases=3),
        task("compare cuda", "correct", "cuda"),
        {"kind": "time", "task": "time triton", **case, "right": True, "seconds": 4e-3, "flops": 2e9, "error": 1e-3},
        {"kind": "time", "task": "time cuda", **case, "right": True, "seconds": 2e-3, "flops": 2e9, "error": 1e-3},
        {"kind": "time", "task": "time cuda", **case, "right": False, "error": 0.3},
        task("time triton", "time", "triton"),
        task("time cuda", "time", "cuda"),
        {"kind": "not available", "task": "time other", "reason": "needs a GPU | of another kind"},
        task("time other", "time", "cuda"),
        {"kind": "layer", "task": "layer bert", "right": True, "seconds": 1e-2, "error": 1e-3},
    ]


def test_kernel_by_kernel(report: Any, tmp_path: Path) -> None:
    files = report.write_table(records(), tmp_path, tmp_path / "kept", dry_run=False)
    table = (tmp_path / "table.md").read_text().splitlines()
    for line in (
        "# NVIDIA A-1 80GB",
        "bfloat16 products 1 TFLOP/s, copies 3.00 TB/s.",
        "| triton | right in 2 of 3 | 2.0e-03 |",
        "| cuda | WRONG: bert-base [512] | 5.0e-01 |",
        "| triton ff_norms bfloat16 | bert-base | 512 | 4.000 | 50% |  | 1.0e-03 |",
        "| cuda ff_norms bfloat16 | bert-base | 512 | 2.000 | 100% | 2.00 | 1.0e-03 |",
        "| cuda ff_norms bfloat16 | bert-base | 512 | wrong |  |  | 3.0e-01 |",
        "| layer bert | 10.000 | 1.0e-03 |",
        "| compare triton | stopped after 12 s |  |",
        "| time other | not available | needs a GPU / of another kind |",
    ):
        assert line in table, line
    assert [file.name for file in files] == ["table.md", "results.jsonl", "nvidia-a-1-80gb.json", "nvidia-a-1-80gb.md"]
    assert json.loads(files[2].read_text()) == records()


def test_a_dry_run_shows_no_figures(report: Any, tmp_path: Path) -> None:
    report.write_table(records(), tmp_path, None, dry_run=True)
    table = (tmp_path / "table.md").read_text()
    for text in ("TFLOP", "4.000", "50%", "2.00 ", "10.000"):
        assert text not in table
    assert "| triton ff_norms bfloat16 | bert-base | 512 |  |  |  | 1.0e-03 |" in table


def test_what_there_is_of_a_call_that_was_cut_off(report: Any, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert report.read_records(file) == []
    file.write_text('{"kind": "phase", "name": "prepare"}\n{"kind": "mach')
    assert report.read_records(file) == [{"kind": "phase", "name": "prepare"}]
    assert report.write_table(report.read_records(file), tmp_path, tmp_path / "kept", False)[0].is_file()
    assert not (tmp_path / "kept").exists()  # of an unknown device


def test_clocks_and_limits(report: Any, tmp_path: Path) -> None:
    clocks = ["timestamp, clocks.sm, clocks.mem, power, temperature, utilization", "t, 345, 1, 90.5, 30, 0"]
    clocks += ["t, 1980, 1, 640.0, 50, 99", "t, 1755, 1, 700.0, 61, 100", "t, 1900, 1, [N/A], 61, 100", "t, 19"]
    (tmp_path / "clocks.csv").write_text("\n".join(clocks))
    metrics = {
        "Kernel Name": "direct_kernel",
        "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": "61.5",
        "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "40.2",
        "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "0.8",
        "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": "1,002.1",
    }
    rows = [metrics.keys(), [""] * len(metrics), metrics.values()]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    (tmp_path / "ncu-triton.csv").write_text(f"==PROF== Connected\n{text}\n")
    report.write_table(records(), tmp_path, None, dry_run=False)
    table = (tmp_path / "table.md").read_text()
    assert "1755 to 1980 MHz, 1868 in the median; at most 700 W and 61 degrees." in table
    assert "tensor 62 %, L2 40 %; stalls: wait 1002.1, barrier 0.8." in table
