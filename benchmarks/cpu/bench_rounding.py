"""How far the maps of trained models are from float64 by each product that this processor multiplies by.

    python benchmarks/cpu/bench_rounding.py [--tokens 128] [--isas avx512 amx] [--write]

MiniLM-L6, all layers, and SmolLM2-135M, its first, middle and last layer, on prose, pair by pair (the direct method),
the last scope: by float32 and by bfloat16 operands with every instruction set, one process for each
(``FFATTR_CPU_ISA``). Errors are relative to the same maps in float64, of every pair in which one token sees the other;
the rank correlation is Spearman's, of the whole map of a layer, and the lowest among layers counts. ``--write`` keeps
the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from kept_figures import CPU, write_figures
from models import minilm, smollm2
from texts import prose

import ffattr
from ffattr.analysis import spearman
from ffattr.machine import name_processor
from ffattr.ops import availability, backends

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("avx2", "avx512", "avx512_bf16", "amx")
MODELS = {"MiniLM-L6": (minilm, None), "SmolLM2-135M": (smollm2, [0, 15, 29])}
LIMITS = {"float32": {"largest": 1e-5}, "bfloat16": {"largest": 5e-3, "median": 5e-4}}
"""What errors may be."""
LEAST_CORRELATION = 1 - 1e-6


def measure_here(tokens: int) -> list[dict[str, Any]]:
    """Returns a row for each model and dtype of operands that this process's instruction set multiplies."""
    torch.set_grad_enabled(False)
    rows = []
    for name, (load, layers) in MODELS.items():
        loaded = load()
        given = prose(loaded, tokens)
        options: dict[str, Any] = {"layers": layers, "method": "direct"}
        exact = ffattr.attribute(loaded.model, given, backend="torch", dtype=torch.float64, **options)["layer"]
        for dtype in LIMITS:
            kind = getattr(torch, dtype)
            if backends.BACKENDS["cpu"].check(CPU, kind, 1) is not None:
                continue
            found = ffattr.attribute(loaded.model, given, backend="cpu", dtype=kind, **options)["layer"].double()
            seen = exact > 0
            error = (found[seen] / exact[seen] - 1).abs()
            alike = [spearman(one, other) for one, other in zip(found, exact, strict=True)]
            rows.append(
                {
                    "isa": backends.build_info()["instruction set"].split()[0],
                    "model": name,
                    "operands": dtype,
                    "by": availability.describe_product("cpu", kind) or dtype,
                    "median": float(error.median()),
                    "largest": float(error.max()),
                    "1 - correlation": 1 - min(alike),
                }
            )
    return rows


def run_each(isas: list[str], tokens: int) -> list[dict[str, Any]]:
    """Returns the rows of those instruction sets that this processor has."""
    rows: list[dict[str, Any]] = []
    for isa in isas:
        environment = {**os.environ, "FFATTR_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--here", "--tokens", str(tokens)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows += [row for row in json.loads(done.stdout) if row["isa"] == isa]
    return rows


def find_excess(row: dict[str, Any]) -> list[str]:
    """Says which of a row's figures are beyond what they may be."""
    said = [
        f"{name} error {row[name]:.1e} > {most:.0e}"
        for name, most in LIMITS[row["operands"]].items()
        if not row[name] <= most
    ]
    if not 1 - row["1 - correlation"] >= LEAST_CORRELATION:
        said.append(f"rank correlation 1 - {row['1 - correlation']:.1e}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--isas", nargs="+", choices=ISAS, default=ISAS)
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/rounding.json")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure_here(asked.tokens)))
        return
    rows = run_each(asked.isas, asked.tokens)
    about = {"machine": name_processor(CPU), "torch": str(torch.__version__), "tokens": asked.tokens}
    console = Console(width=None if Console().is_terminal else 140)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    table = Table("instruction set", "model", "operands", "by", "median", "largest", "1 - rank correlation", "beyond")
    for row in rows:
        figures = [f"{row[name]:.1e}" for name in ("median", "largest", "1 - correlation")]
        table.add_row(row["isa"], row["model"], row["operands"], row["by"], *figures, "; ".join(find_excess(row)))
    console.print(table)
    if asked.write:
        write_figures("rounding", {**about, "rows": rows})


if __name__ == "__main__":
    main()
