"""The figures that the scripts beside it keep: on which machine they were measured, and where they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ffattr.machine import name_processor

__all__ = ["CPU", "add_figures", "describe_machine", "write_figures"]

CPU = torch.device("cpu")
_RESULTS = Path(__file__).resolve().parents[1] / "results"


def describe_machine(threads: int, **more: Any) -> dict[str, Any]:
    """Returns what figures are measured on, and ``more`` that they depend on."""
    return {"processor": name_processor(CPU), "threads": threads, "torch": str(torch.__version__), **more}


def write_figures(name: str, content: Any) -> None:
    """Writes ``benchmarks/results/<name>.json``."""
    _RESULTS.mkdir(exist_ok=True)
    (_RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def add_figures(name: str, part: str, content: Any) -> None:
    """Writes one part of ``benchmarks/results/<name>.json``, which several scripts or calls keep; others stay."""
    file = _RESULTS / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    write_figures(name, found | {part: content})
