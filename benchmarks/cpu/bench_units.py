"""What the bfloat16 units of a processor make of the feed-forward maps: speed beside its own products, and errors.

    python benchmarks/cpu/bench_units.py [--shapes bert-base gpt2] [--tokens 256 512] [--threads 1 2] [--write]

One process for each instruction set (``FFATTR_CPU_ISA``), all in one run, in rounds: instruction sets take turns, so
that a shared machine is as busy for one as for the other, and the best round of each counts. A rate is that of the
operations of exact pairs, ``2 T^2 F d`` in a second (half of it in a causal layer); float32 by three bfloat16 products
does three times as many. Shares are of the machine's own products with as many threads. The error is the largest
difference from the float64 definition, in parts of a map's largest entry. Whoever shares the machine shows in the load,
the mean number of processes that wanted a core in the minute before, which is kept with the figures.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
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
    rows, depth, columns = PRODUCT
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    found: dict[str, Any] = {"isa": backends.build_info()["instruction set"].split()[0], "gemm": {}, "maps": {}}
    for dtype in DTYPES:
        left, right = a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype))
        for threads in asked.threads:
            torch.set_num_threads(threads)
            seconds = min(seconds_of(functools.partial(torch.mm, left, right), CPU) for _ in range(3))
            found["gemm"][name_run(dtype, threads)] = 2.0 * rows * depth * columns / seconds
        if backends.BACKENDS["cpu"].check(CPU, getattr(torch, dtype), 1) is not None:
            continue
        for shape, tokens in itertools.product(asked.shapes, asked.tokens):
            for threads, one in measure_map(shape, tokens, dtype, asked.threads).items():
                found["maps"][f"{shape}, T = {tokens}, {name_run(dtype, threads)}"] = one
    return found


def measure_map(shape: str, tokens: int, dtype: str, threads: list[int]) -> dict[int, dict[str, Any]]:
    """Returns rate, error and product of a layer's feed-forward maps by each number of threads, in turns."""
    kind, rounded = getattr(torch, dtype), backends.BACKENDS["cpu"].rounded
    problem = Problem.draw_random("ff_norms", SHAPES[shape], (tokens,), kind, CPU, rounded=rounded)
    run = functools.partial(torch.ops.ffattr.ff_norms, *problem.arguments.values())
    error, by = problem.measure_error(run()), availability.describe_product("cpu", kind)
    seconds = dict.fromkeys(threads, math.inf)
    for count in threads * 2:
        torch.set_num_threads(count)
        seconds[count] = min(seconds[count], seconds_of(run, CPU))
    return {
        count: {"operands": dtype, "threads": count, "rate": problem.flops / one, "error": error, "by": by}
        for count, one in seconds.items()
    }


def name_run(dtype: str, threads: int) -> str:
    return f"{dtype}, {threads} thread{'s' * (threads > 1)}"


def run_rounds(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the best of every instruction set that this processor has."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(asked.rounds):
        for isa in asked.isas:
            environment = {**os.environ, "FFATTR_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, __file__, "--here", *sys.argv[1:]],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout)
            if found["isa"] == isa:
                _keep_best(best.setdefault(isa, found), found)
    return list(best.values())


def _keep_best(best: dict[str, Any], found: dict[str, Any]) -> None:
    for run, rate in found["gemm"].items():
        best["gemm"][run] = max(best["gemm"][run], rate)
    for name, one in found["maps"].items():
        if one["rate"] > best["maps"][name]["rate"]:
            best["maps"][name] = one


def make_table(rows: list[dict[str, Any]]) -> Table:
    gemm = {run: max(row["gemm"][run] for row in rows) for run in rows[0]["gemm"]} if rows else {}
    shown = Table("instruction set", "map", "by", "GFLOP/s", "of sgemm", "of the bfloat16 product", "scaling", "error")
    for row in rows:
        for name, one in row["maps"].items():
            rate, threads = one["rate"], one["threads"]
            shares = [f"{rate / gemm[name_run(dtype, threads)]:.2f}" for dtype in DTYPES]
            single = row["maps"].get(name.replace(name_run(one["operands"], threads), name_run(one["operands"], 1)))
            scaling = "" if single is None or threads == 1 else f"{rate / single['rate']:.2f}"
            shown.add_row(row["isa"], name, one["by"], f"{rate / 1e9:.0f}", *shares, scaling, f"{one['error']:.1e}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["bert-base", "minilm"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--isas", nargs="+", choices=ISAS, default=ISAS)
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure_here(asked)))
        return
    before = os.getloadavg()[0]
    rows = run_rounds(asked)
    about = {"machine": name_processor(CPU), "torch": str(torch.__version__), "load before": round(before, 1)}
    console = Console(width=None if Console().is_terminal else 160)
    console.print(
        ", ".join(f"{key} {value}" for key, value in about.items()), f"best of {asked.rounds} rounds", sep=", "
    )
    console.print(make_table(rows))
    if asked.write:
        RESULTS.write_text(json.dumps({**about, "rounds": asked.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
