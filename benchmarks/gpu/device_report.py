"""The table that `device.py` prints: kernel by kernel right or wrong, its time, its share of the machine, its limit."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from device_plan import name_kernel

__all__ = ["read_records", "write_table"]

Found = dict[str, Any]
SHARED = "l1tex__data_pipe_lsu_wavefronts_mem_shared.*pct"
# What a profile says of a kernel's limit: patterns of names of metrics, and what they are.
LIMITS = (
    (r"sm__(inst_executed_)?pipe_tensor.*\.avg\.pct.*", "tensor"),
    (SHARED, "shared memory"),
    (r"lts__t_sectors\.avg\.pct.*|lts__throughput.*pct.*", "L2"),
    (r"gpu__dram_throughput.*pct.*|dram__throughput.*pct.*", "memory"),
    (r"sm__inst_issued\.avg\.pct.*|sm__instruction_throughput.*pct.*", "issue"),
)
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")


def read_records(file: Path) -> list[Found]:
    """Reads what there is; a line that was cut off is left out."""
    found = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def write_table(records: Sequence[Found], folder: Path, keep: Path | None, dry_run: bool) -> list[Path]:
    """Prints the table and writes it to ``folder``; to ``keep`` as well, with the records, by the device's name."""
    text = _make_table(records, folder, dry_run)
    print(f"\n{text}")
    (folder / "table.md").write_text(text)
    files = [folder / "table.md", folder / "results.jsonl"]
    name = next((r["name"] for r in records if r["kind"] == "machine"), None)
    if keep is not None and name is not None:
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        keep.mkdir(parents=True, exist_ok=True)
        for ending, content in (("json", json.dumps(list(records), indent=1) + "\n"), ("md", text)):
            (keep / f"{stem}.{ending}").write_text(content)
            files.append(keep / f"{stem}.{ending}")
    return files


def _make_table(records: Sequence[Found], folder: Path, dry_run: bool) -> str:
    tasks = {r["name"]: r for r in records if r["kind"] == "task"}
    machine = next((r for r in records if r["kind"] == "machine"), {})
    rates = {r["dtype"]: r["flops_per_second"] for r in records if r["kind"] == "rate"}
    lines = [f"# {machine.get('name', 'unknown device')}", ""]
    versions = [f"{key} {machine[key]}" for key in ("torch", "triton", "cuda", "python") if machine.get(key)]
    lines += [f"{'Dry run, no figures. ' if dry_run else ''}{', '.join(versions)}."]
    if not dry_run:
        lines += _list_rates(records, rates) + _list_clocks(folder / "clocks.csv")
    lines += ["", *_compare(records, tasks)]
    lines += ["", *_time(records, tasks, rates, folder, dry_run)]
    others = [r for r in records if r["kind"] in ("layer", "attribute", "tuned", "compiled")]
    if others:
        lines += ["", *_format_table(["task", "ms", "error"], (_describe_other(r, dry_run) for r in others))]
    ended = [r for r in tasks.values() if r["status"] != "ok"]
    reasons = {r["task"]: r.get("reason", "") for r in records if r["kind"] in ("failed", "not available")}
    unavailable = [name for name in reasons if tasks.get(name, {}).get("status") == "ok"]
    if ended or unavailable:
        rows = [[r["name"], r["status"], reasons.get(r["name"], "")] for r in ended]
        rows += [[name, "not available", reasons[name]] for name in unavailable]
        lines += ["", *_format_table(["without a result", "outcome", "reason"], rows)]
    return "\n".join(lines) + "\n"


def _list_rates(records: Sequence[Found], rates: dict[str, float]) -> list[str]:
    copied = [f"copies {r['bytes_per_second'] / 1e12:.2f} TB/s" for r in records if r["kind"] == "copy"]
    products = [f"{dtype} products {rate / 1e12:.0f} TFLOP/s" for dtype, rate in rates.items()]
    return ["", ", ".join([*products, *copied]) + "."] if products or copied else []


def _list_clocks(file: Path) -> list[str]:
    """The clocks while the GPU worked."""
    if not file.is_file():
        return []
    rows = list(csv.reader(file.read_text(errors="replace").splitlines(), skipinitialspace=True))
    busy = []
    for row in rows[1:]:
        try:
            busy.append((float(row[1]), float(row[3]), float(row[4]), float(row[5])))
        except (ValueError, IndexError):  # a line that was cut off, or a value that the GPU does not tell
            continue
    busy = [row for row in busy if row[3] > 50]
    if not busy:
        return []
    clock, power, heat, _ = zip(*busy, strict=True)
    clocks = f"{min(clock):.0f} to {max(clock):.0f} MHz, {statistics.median(clock):.0f} in the median"
    return ["", f"While it worked: {clocks}; at most {max(power):.0f} W and {max(heat):.0f} degrees."]


def _kernel_of(task: Found) -> str:
    given = task["arguments"]
    return name_kernel(given["backend"], given["operator"], given["dtype"], given["kernel"])


def _compare(records: Sequence[Found], tasks: dict[str, Found]) -> list[str]:
    rows = []
    for name, task in tasks.items():
        if task["of"] != "correct":
            continue
        found = [r for r in records if r.get("task") == name and r["kind"] == "correct"]
        asked = len(task["arguments"]["cases"])
        if not found:
            verdict = ""  # the last table says why
        elif all(r["right"] for r in found):
            verdict = "right" if len(found) == asked else f"right in {len(found)} of {asked}"
        else:
            verdict = "WRONG: " + ", ".join(f"{r['shape']} {r['lengths']}" for r in found if not r["right"])
        worst = f"{max(r['error'] for r in found):.1e}" if found else ""
        rows.append([name.removeprefix("compare "), verdict or task["status"], worst])
    return _format_table(["kernel", "against float64", "largest relative error"], rows) if rows else []


def _time(
    records: Sequence[Found], tasks: dict[str, Found], rates: dict[str, float], folder: Path, dry_run: bool
) -> list[str]:
    timed = [r for r in records if r["kind"] == "time" and r["task"] in tasks]
    by_triton = {_call_of(tasks[r["task"]], r): r.get("seconds") for r in timed if "triton" in r["task"]}
    rows = []
    for r in timed:
        task = tasks[r["task"]]
        if not r["right"]:
            rows.append([_kernel_of(task), r["shape"], str(sum(r["lengths"])), "wrong", "", "", f"{r['error']:.1e}"])
            continue
        rate, triton = rates.get(task["arguments"]["dtype"]), by_triton.get(_call_of(task, r))
        share = f"{r['flops'] / r['seconds'] / rate:.0%}" if rate and r["flops"] and not dry_run else ""
        ratio = f"{triton / r['seconds']:.2f}" if triton and "cuda" in r["task"] and not dry_run else ""
        ms = "" if dry_run else f"{r['seconds'] * 1e3:.3f}"
        rows.append([_kernel_of(task), r["shape"], str(sum(r["lengths"])), ms, share, ratio, f"{r['error']:.1e}"])
    heads = ["kernel", "shape", "T", "ms", "share of the matrix rate", "times Triton's speed", "error"]
    lines = _format_table(heads, rows) if rows else []
    for backend in ("triton", "cuda"):
        limits = _read_limits(folder / f"ncu-{backend}.csv")
        if limits:
            lines += ["", f"Limits of {backend} ff_norms, bfloat16, by ncu: {limits}."]
    return lines


def _call_of(task: Found, found: Found) -> tuple[str, str, str, int]:
    given = task["arguments"]
    return given["operator"], given["dtype"], found["shape"], sum(found["lengths"])


def _read_limits(file: Path) -> str:
    """The busiest units and the commonest stalls of a profile, ``ncu --csv --page raw``."""
    if not file.is_file():
        return ""
    text = [line for line in file.read_text(errors="replace").splitlines() if line.startswith('"')]
    rows = list(csv.reader(text))
    if len(rows) < 3:
        return ""
    metrics = {}
    for name, value in zip(rows[0], rows[2], strict=False):
        try:
            metrics[name] = float(value.replace(",", ""))
        except ValueError:
            continue
    busy = []
    for pattern, what in LIMITS:
        values = [value for name, value in metrics.items() if re.fullmatch(pattern, name)]
        if values:
            busy.append(f"{what} {max(values):.0f} %")
    stalls = sorted(((value, m[1]) for name, value in metrics.items() if (m := STALL.fullmatch(name))), reverse=True)
    return "; ".join([", ".join(busy), "stalls: " + ", ".join(f"{name} {value:.1f}" for value, name in stalls[:3])])


def _describe_other(found: Found, dry_run: bool) -> list[str]:
    seconds = found.get("seconds")
    error = found.get("error")
    name = found["task"] + (f", {found['kernels']} kernels" if found["kind"] == "compiled" else "")
    wrong = found.get("right") is False
    ms = "wrong" if wrong else "" if seconds is None or dry_run else f"{seconds * 1e3:.3f}"
    return [name, ms, "" if error is None else f"{error:.1e}"]


def _format_table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
