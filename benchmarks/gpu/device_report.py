"""What `device.py` found, as JSON and as a table: written anew after every result, so that nothing is lost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Report"]

BASELINE, RATIO = "PyTorch, materialising", "CUDA / Triton"
_DRY = "dry run, no figures"
# What a dry run does not keep: Triton's interpreter has no speed to report.
_FIGURES = {"seconds", "first_seconds", "share", "speedup", "bytes_per_second", "flops_per_second"}
_FIGURES |= {"peak_bytes", "held_bytes", "share_of_layer", "times_triton"}


class Report:
    """``about`` the machine, steps, results of jobs, and what was left out."""

    def __init__(self, folders: list[Path], dry_run: bool) -> None:
        self.folders, self.dry_run = folders, dry_run
        self.about: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.tunings: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.logs: dict[str, str] = {}
        self.files: list[Path] = []
        self._start = time.monotonic()

    @property
    def failures(self) -> list[str]:
        steps = [step["name"] for step in self.steps if step["status"].startswith(("failed", "stopped"))]
        jobs = [self.title(r) for r in self.results + self.tunings if r["status"] in ("failed", "wrong")]
        return steps + jobs

    # ---- what happened

    def step(self, name: str, status: str, seconds: float) -> None:
        self.steps.append({"name": name, "status": status, "seconds": seconds})
        self._say(f"{name}: {status}")
        if "name" in self.about:  # files are called by it
            self.save()

    def log(self, name: str, output: str) -> None:
        """Kept in a file of its own."""
        self.logs[name] = output

    def machine(self, answer: dict[str, Any]) -> None:
        self.about |= {key: value for key, value in answer.items() if key != "status"}

    def skip(self, name: str) -> None:
        self.skipped.append(name)
        self._say(f"{name}: no time left")

    def result(self, job: dict[str, Any], answer: dict[str, Any]) -> None:
        found = {**job, **answer}
        if found.get("flops") and found.get("seconds") and self.about.get("flops_per_second"):
            found["share"] = found["flops"] / found["seconds"] / self.about["flops_per_second"]
        self.results.append(found)
        self._compare()
        text = found["status"] if found["status"] != "ok" or self.dry_run else f"{found['seconds'] * 1e3:.3f} ms"
        for key, form in (("share", "{:.1%}"), ("error", "error {:.0e}"), ("reason", "{}")):
            if found.get(key) is not None and not (self.dry_run and key in _FIGURES):
                text += f", {form.format(found[key])}"
        self._say(f"{self.title(job)}: {text}")
        self.save()

    def tuned(self, job: dict[str, Any], answer: dict[str, Any]) -> None:
        self.tunings.append({**job, **answer})
        self.save()

    @staticmethod
    def title(job: dict[str, Any]) -> str:
        what = job.get("variant", job["kind"])
        if job["kind"] == "batch":
            what = f"{job['sequences']} sequences, {'one by one' if job['looped'] else 'in one launch'}"
        if "backend" in job:
            what += f", {job['backend']}"
        return f"{job['shape']}, T = {job['tokens']}, {what}"

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.0f} s] {text}", flush=True)

    def _compare(self) -> None:
        """Ratios between results: to materialising, to a whole layer, to one launch for all, of CUDA to Triton."""
        for found in self.results:
            if not found.get("seconds"):
                continue
            if found["kind"] == "layer" and (base := self._seconds(found, variant=BASELINE)):
                found["speedup"] = base / found["seconds"]
            if found["kind"] == "slope" and (layer := self._seconds(found, variant=_layer_of(found))):
                found["share_of_layer"] = found["seconds"] / layer
            if found["kind"] == "batch" and (loop := self._seconds(found, looped=True, backend=found.get("backend"))):
                found["speedup"] = loop / found["seconds"]
            if (like := _by_triton(found)) and (triton := self._seconds(found, **like)):
                found["times_triton"] = found["seconds"] / triton

    def _seconds(self, like: dict[str, Any], **wanted: Any) -> float | None:
        wanted |= {"shape": like["shape"], "tokens": like["tokens"]}
        same = (r for r in self.results if all(r.get(key) == value for key, value in wanted.items()))
        return next((r["seconds"] for r in same if r.get("seconds")), None)

    # ---- files

    def save(self) -> None:
        whole = {
            "note": _DRY if self.dry_run else "medians; every result was compared with the float64 definition first",
            "machine": self.about,
            "steps": self.steps,
            "results": self.results,
            "tuning": self.tunings,
            "no time left for": self.skipped,
        }
        if self.dry_run:
            whole = _without_figures(whole)
        name = re.sub(r"[^a-z0-9]+", "-", str(self.about.get("name", "unknown device")).lower()).strip("-")
        texts = {f"{name}.json": json.dumps(whole, indent=1) + "\n", f"{name}.md": self._markdown(whole)}
        texts |= {f"{name}.{log}.txt": output for log, output in self.logs.items()}
        self.files = []
        # Nothing is kept of a machine that did not even tell its name, but for who collects the output.
        for folder in self.folders if "name" in self.about else self.folders[1:]:
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in texts.items():
                (folder / file).write_text(text)
                self.files.append(folder / file)

    def _markdown(self, whole: dict[str, Any]) -> str:
        about = whole["machine"]
        lines = [f"# {about.get('name', 'unknown device')}", "", f"{whole['note'].capitalize()}.", ""]
        versions = [f"{key} {about[key]}" for key in ("torch", "triton", "cuda", "python") if about.get(key)]
        if about.get("flops_per_second"):
            versions.append(f"{about['dtype']} matrix product {about['flops_per_second'] / 1e12:.0f} TFLOP/s")
        if about.get("bytes_per_second"):
            versions.append(f"copies {about['bytes_per_second'] / 1e9:.0f} GB/s, read and written")
        lines += [", ".join(versions) + ".", "", *_table(["step", "outcome", "s"], _steps(whole["steps"]))]
        layers = [r for r in whole["results"] if r["kind"] == "layer"]
        for shape in dict.fromkeys(r["shape"] for r in layers):
            heads = ["T", "variant", "ms", "share of matrix rate", "peak GiB", "error", "times materialising", RATIO]
            rows = sorted((r for r in layers if r["shape"] == shape), key=lambda r: int(r["tokens"]))
            lines += ["", f"## {shape}, one layer", "", *_table(heads, (_layer(r) for r in rows))]
        parts = [r for r in whole["results"] if r["kind"] != "layer"]
        if parts:
            heads = ["part", "ms", "of the layer's time", "times one by one", "error", RATIO]
            lines += ["", "## Parts", "", *_table(heads, (_part(r, self.title(r)) for r in parts))]
        for tuning in whole["tuning"]:
            lines += ["", f"## Tuning: {self.title(tuning)}", "", *_tuning(tuning)]
        if self.skipped:
            lines += ["", "## No time left for", "", *(f"- {name}" for name in self.skipped)]
        return "\n".join(lines) + "\n"


def _layer_of(found: dict[str, Any]) -> str:
    """The variant that computes a whole layer with the same backend."""
    return "CUDA direct" if found.get("backend") == "cuda" else "Triton direct"


def _by_triton(found: dict[str, Any]) -> dict[str, Any]:
    """What the same job has by Triton; nothing for one that runs no CUDA kernel."""
    if str(found.get("variant")).startswith("CUDA"):
        return {"variant": found["variant"].replace("CUDA", "Triton")}
    if found.get("backend") == "cuda":
        return {key: found.get(key) for key in ("kind", "looped", "sequences")} | {"backend": "triton"}
    return {}


def _without_figures(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: None if k in _FIGURES else _without_figures(v) for k, v in value.items()}
    return [_without_figures(item) for item in value] if isinstance(value, list) else value


def _table(heads: list[str], rows: Iterator[list[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value * unit)


def _steps(steps: list[dict[str, Any]]) -> Iterator[list[str]]:
    for step in steps:
        yield [step["name"], step["status"], _number(step["seconds"], "{:.0f}")]


def _ms(found: dict[str, Any]) -> str:
    """Or what came instead of a time."""
    if found["status"] == "ok":
        return _number(found["seconds"], "{:.3f}", 1e3)
    return ": ".join(filter(None, (found["status"], found.get("reason"))))


def _layer(found: dict[str, Any]) -> list[str]:
    return [
        str(found["tokens"]),
        found["variant"],
        _ms(found),
        _number(found.get("share"), "{:.1%}"),
        _number(found.get("peak_bytes"), "{:.2f}", 2.0**-30),
        _number(found.get("error"), "{:.0e}"),
        _number(found.get("speedup"), "{:.1f}"),
        _number(found.get("times_triton"), "{:.2f}"),
    ]


def _part(found: dict[str, Any], title: str) -> list[str]:
    share, times = _number(found.get("share_of_layer"), "{:.1%}"), _number(found.get("speedup"), "{:.1f}")
    error, ratio = _number(found.get("error"), "{:.0e}"), _number(found.get("times_triton"), "{:.2f}")
    return [title, _ms(found), share, times, error, ratio]


def _tuning(tuning: dict[str, Any]) -> Iterator[str]:
    """The best configs of every kernel and the rule's own."""
    if tuning["status"] != "ok":
        yield _ms(tuning)
        return
    for kernel in tuning["kernels"]:
        trials = kernel["trials"]
        ran = sum(trial["seconds"] is not None for trial in trials)
        yield f"{kernel['key']}: {ran} timed, {len(trials) - ran} do not run or are wrong, {kernel['left']} not tried."
        yield ""
        shown = [t for place, t in enumerate(trials) if t["rule"] or (place < 5 and t["seconds"] is not None)]
        rows = (
            [
                _number(t["seconds"], "{:.3f}", 1e3) or t["reason"],
                ", ".join(f"{k} {v}" for k, v in t["config"].items()),
                "yes" if t["rule"] else "",
            ]
            for t in shown
        )
        yield from _table(["ms", "config", "the rule's"], rows)
        yield ""
