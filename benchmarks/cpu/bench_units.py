"""What the bfloat16 units of a processor make of the feed-forward maps: speed beside its own products, and errors.

    python benchmarks/cpu/bench_units.py [--shapes bert-base minilm] [--tokens 256] [--rounds 5] [--threads 2] [--write]

One process for each instruction set (``FFATTR_CPU_ISA``), all in one run, in rounds: instruction sets take turns, so
that a shared machine is as busy for one as for the other, and the best round of each counts. A rate is that of the
operations of exact pairs, ``2 T^2 F d`` in a second; float32 by three bfloat16 products does three times as many. The
error is the largest difference from the float64 definition, in parts of a map's largest entry.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ffattr.bench.cases import SHAPES
from ffattr.bench.operands import Problem
from ffattr.bench.timing import seconds_of
from ffattr.machine import name_processor
from ffattr.ops import availability, backends

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "units.json"
ISAS = ("avx2", "avx512", "avx512_bf16", "amx")
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")
PRODUCT = (2048, 3072, 768)  # rows, depth and columns of the machine's own product


def measure_here(asked: argparse.Namespace) -> dict[str, Any]:
    """Returns one round of this process's instruction set."""
    torch.set_num_threads(asked.threads)
    rows, depth, columns = PRODUCT
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    found: dict[str, Any] = {"isa": backends.build_info()["instruction set"].split()[0], "gemm": {}, "maps": {}}
    for dtype in DTYPES:
        left, right = a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype))
        product = functools.partial(torch.mm, left, right)
        seconds = min(seconds_of(product, CPU) for _ in range(3))
        found["gemm"][dtype] = 2.0 * rows * depth * columns / seconds
        if backends.BACKENDS["cpu"].check(CPU, getattr(torch, dtype), 1) is not None:
            continue
        for shape in asked.shapes:
            kind, rounded = getattr(torch, dtype), backends.BACKENDS["cpu"].rounded
            problem = Problem.draw_random("ff_norms", SHAPES[shape], (asked.tokens,), kind, CPU, rounded=rounded)
            run = functools.partial(torch.ops.ffattr.ff_norms, *problem.arguments.values())
            error = problem.measure_error(run())
            seconds = min(seconds_of(run, CPU) for _ in range(2))
            by = availability.describe_product("cpu", getattr(torch, dtype))
            found["maps"][f"{shape} {dtype}"] = {"rate": problem.flops / seconds, "error": error, "by": by}
    return found


def run_rounds(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the best of every instruction set that this processor has."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(asked.rounds):
        for isa in ISAS:
            environment = {**os.environ, "FFATTR_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, __file__, "--here", *sys.argv[1:]],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout)
            if found["isa"] == isa:
                _keep_best(best.setdefault(isa, found), found)
    return list(best.values())


def _keep_best(best: dict[str, Any], found: dict[str, Any]) -> None:
    for dtype, rate in found["gemm"].items():
        best["gemm"][dtype] = max(best["gemm"][dtype], rate)
    for name, one in found["maps"].items():
        if one["rate"] > best["maps"][name]["rate"]:
            best["maps"][name] = one


def make_table(rows: list[dict[str, Any]]) -> Table:
    gemm = {dtype: max(row["gemm"][dtype] for row in rows) for dtype in DTYPES}
    shown = Table("instruction set", "map", "by", "GFLOP/s", "of sgemm", "of the bfloat16 product", "error")
    for row in rows:
        for name, one in row["maps"].items():
            rate = one["rate"]
            shares = [f"{rate / gemm[dtype]:.2f}" for dtype in DTYPES]
            shown.add_row(row["isa"], name, one["by"], f"{rate / 1e9:.0f}", *shares, f"{one['error']:.1e}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["bert-base", "minilm"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure_here(asked)))
        return
    rows = run_rounds(asked)
    about = {"machine": name_processor(CPU), "threads": asked.threads, "tokens": asked.tokens}
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"{about['machine']}, {asked.threads} threads, {asked.tokens} tokens, best of {asked.rounds} rounds")
    console.print(make_table(rows))
    if asked.write:
        RESULTS.write_text(json.dumps({**about, "torch": str(torch.__version__), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
