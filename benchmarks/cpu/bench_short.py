"""Short texts through a real model on this CPU: what a call costs besides the model's own run and the kernels.

    python benchmarks/cpu/bench_short.py [--threads 2] [--rounds 15] [--write]

MiniLM-L6, all layers, the last scope: single texts of 8 to 128 tokens, and a batch of 64 sentences of 20 each.
``forward`` is the model alone, ``first`` the first call with a model, ``later`` any other one: medians of rounds in
which they take turns; of the ratio as well, which others on the machine change less than the seconds. ``outside`` is
the share of a later call under the profiler that is neither the model's own run nor a kernel, which is an operator of
ffattr or a matrix product; the profiler's own work counts as outside. Maps of first and later calls are compared bit by
bit, and with the float64 definition, before anything is timed. ``--write`` keeps the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from kept_figures import CPU, describe_machine, write_figures
from models import minilm

import ffattr
from ffattr.bench.timing import seconds_of
from ffattr.bench.truth import WrongResult
from ffattr.machine import name_processor

SIZES = ((1, 8), (1, 16), (1, 32), (1, 128), (64, 20))
PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "mv"))


def verify(model: Any, ids: Tensor) -> float:
    """Compares the maps of a first and a later call, and one sequence of them with the definition."""
    first, later = (ffattr.attribute(model, ids)["layer"] for _ in range(2))
    if not torch.equal(first, later):
        raise WrongResult("a later call gives other maps than the first: not timed")
    exact = ffattr.attribute(model, ids[:1], backend="reference", dtype=torch.float64)["layer"]
    error = float((later[:, :1] - exact).abs().max() / exact.max())
    if not error < 2e-5:
        raise WrongResult(f"maps are wrong by {error:.1e}: not timed")
    return error


class Profiled(NamedTuple):
    """Seconds of one run under the profiler, and those of them in operators of ffattr and matrix products."""

    total: float
    kernels: float


def profile_run(run: Callable[[], object], repeats: int) -> Profiled:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        total = seconds_of(run, CPU, repeats)
    kernels = [e.self_cpu_time_total for e in found.key_averages() if e.key.startswith("ffattr::") or e.key in PRODUCTS]
    return Profiled(total, float(sum(kernels)) / 1e6 / repeats)


def bench(model: Any, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(tokens))

    def forward() -> object:
        return model(ids)

    def later() -> object:
        return ffattr.attribute(model, ids)

    error = verify(model, ids)
    times: dict[str, list[float]] = {"forward": [], "first": [], "later": []}
    for turn in range(rounds):
        if turn < 3:  # a new model each time
            times["first"].append(seconds_of(functools.partial(ffattr.attribute, copy.deepcopy(model), ids), CPU))
        times["forward"].append(seconds_of(forward, CPU))
        times["later"].append(seconds_of(later, CPU))
    ratios = [one / other for one, other in zip(times["later"], times["forward"], strict=True)]
    median = {name: statistics.median(found) for name, found in times.items()}
    repeats = max(1, rounds // 3)
    whole, own = profile_run(later, repeats), profile_run(forward, repeats)
    outside = 1 - (whole.kernels + own.total - own.kernels) / whole.total
    return {
        "sequences": batch,
        "tokens": tokens,
        **{f"{name} ms": round(1e3 * seconds, 1) for name, seconds in median.items()},
        "later / forward": round(statistics.median(ratios), 2),
        "outside": round(outside, 3),
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    console = Console()
    console.print(f"{name_processor(CPU)}, {asked.threads} threads, torch {torch.__version__}")
    model = minilm().model
    rows = [bench(model, batch, tokens, asked.rounds if batch == 1 else 3) for batch, tokens in SIZES]
    shown = ("forward ms", "first ms", "later ms", "later / forward", "outside")
    table = Table("sequences x tokens", *shown)
    for row in rows:
        table.add_row(f"{row['sequences']} x {row['tokens']}", *(str(row[name]) for name in shown))
    console.print(table)
    if asked.write:
        write_figures("short", {"machine": describe_machine(asked.threads), "rows": rows})


if __name__ == "__main__":
    main()
