"""How well `ffattr.plan` predicts time and memory: layers of many shapes, predicted and measured (memory on Linux).

    python benchmarks/cpu/bench_plan.py [--rounds 3] [--only TEXT] [--write]

Nothing is measured whose rows differ from the float64 definition. Times are those of one thread on a processor: whoever
shares the machine counts little. Rates are measured anew for every round, and the figures are medians of rounds.
Memory is the largest resident size of a process of its own while a layer runs, less what there was before (weights,
input, room for the maps). Its allocator returns what is freed (``MALLOC_MMAP_THRESHOLD_``); "kept" is the same with the
allocator as it is, which holds on to some. ``--write`` keeps the figures in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ffattr.bench.calibrate import measure_rates
from ffattr.bench.cases import SHAPES, Case
from ffattr.bench.run import run_dense
from ffattr.bench.timing import processor_seconds
from ffattr.bench.truth import TOLERANCE, WrongResult
from ffattr.decomposition.affine import Linear, Norm
from ffattr.decomposition.reference import Rule
from ffattr.decomposition.scopes import Scope
from ffattr.engine.layer_maps import LayerTask
from ffattr.engine.pack import OneSequence, Pack
from ffattr.engine.planning.choose import plan_layer
from ffattr.engine.planning.costs import LayerShape
from ffattr.engine.planning.plan import EngineOptions, LayerPlan
from ffattr.engine.run import run_layer
from ffattr.machine import name_processor
from ffattr.ops import backends

CPU = torch.device("cpu")
MiB = 1 << 20
RESULTS = Path(__file__).parents[1] / "results"
MINILM, BASE = SHAPES["minilm"], SHAPES["bert-base"]
SIZES = {
    "384": MINILM,
    "384 gated": replace(MINILM, activation="silu", pre=True, rms=True, gated=True, causal=True),
    "768": BASE,
    "768 gated": replace(BASE, activation="silu", pre=True, rms=True, gated=True, causal=True),
}
SENTENCES = (12, 31, 18, 25, 9, 40, 22, 16, 28, 35, 14, 20, 27, 19, 33, 24)


@dataclass(frozen=True)
class Setup:
    """One layer with sequences of ``lengths``, the last ``queries`` tokens of each (0: all), tokens in ``groups`` of so
    many (0: each for itself)."""

    size: str
    lengths: tuple[int, ...]
    queries: int = 0
    method: str = "direct"
    scopes: str = "last"
    groups: int = 0

    def __str__(self) -> str:
        tokens = f"T = {self.lengths[0]}" if len(self.lengths) == 1 else f"{len(self.lengths)} sentences"
        queries = f", {self.queries} queries" if self.queries else ""
        groups = f", groups of {self.groups}" if self.groups else ""
        return f"{self.size}, {tokens}{queries}{groups}, {self.method}, {self.scopes}"

    @cached_property
    def case(self) -> Case:
        case = Case.draw_random(SIZES[self.size], sum(self.lengths))

        def turn(part: Linear | Norm) -> Linear | Norm:
            """Projections as `torch.nn.Linear` has them."""
            return Linear(part.weight.T.contiguous().T, part.bias) if isinstance(part, Linear) else part

        return replace(case, weights=case.weights.map_parameters(turn))

    def names(self, case: Case) -> tuple[str, ...]:
        weights = case.weights
        narrow = tuple(name for name in weights.scopes if name not in case.wide_scopes)
        return {"last": weights.scopes[-1:], "all": weights.scopes, "attention": narrow}[self.scopes]

    def sequences(self, case: Case) -> list[OneSequence]:
        found, start = [], 0
        for length in self.lengths:
            here = slice(start, start + length)
            attention = replace(case.attention, query=case.attention.query[:, here], key=case.attention.key[:, here])
            rows = torch.arange(length - (self.queries or length), length)
            groups = torch.arange(length) // self.groups if self.groups else None
            found.append(OneSequence(case.x[here], attention, rows, groups=groups))
            start += length
        return found

    def task(self, case: Case, backend: str) -> LayerTask:
        scopes = case.weights.pick_scopes(self.names(case))
        return LayerTask(case.weights, scopes, Rule(), "token", backends.BACKENDS[backend], case.x.dtype)

    def plan(self, case: Case) -> LayerPlan:
        shapes = []
        for one in self.sequences(case):
            scopes = case.weights.pick_scopes(self.names(case))
            shape = LayerShape.from_weights(case.weights, len(one.query_tokens), len(one.x), one.pairs, scopes=scopes)
            if self.groups:
                shape = replace(shape, group_pairs=shape.pairs // self.groups)
            shapes.append(shape)
        ff_scopes = len({*self.names(case)} & {*case.wide_scopes})
        method = "auto" if self.scopes == "attention" else self.method
        options = EngineOptions(backends.BACKENDS["cpu"], method, case.x.dtype, CPU)
        return plan_layer(0, LayerShape.join(shapes), ff_scopes, options)

    def run(self, case: Case) -> tuple[Callable[[], list[dict[str, Tensor]]], list[dict[str, Tensor]]]:
        """What runs the engine, and the maps of every sequence, whose memory is there beforehand."""
        sequences, plan = self.sequences(case), self.plan(case)
        heads = case.weights.heads
        maps = [
            {
                name: torch.full(
                    ((heads,) if name == "attn_heads" else ())
                    + (len(one.query_tokens), len(one.x) if one.groups is None else int(one.groups.max()) + 1),
                    -1.0,
                )
                for name in self.names(case)
            }
            for one in sequences
        ]

        def take(number: int, queries: Tensor, tiles: dict[Scope, Tensor]) -> None:
            for scope, tile in tiles.items():
                maps[number][str(scope)][..., queries, :] = tile

        def run() -> list[dict[str, Tensor]]:
            run_layer(self.task(case, "cpu"), Pack(tuple(sequences)), plan, take)
            return maps

        return run, maps

    def verify(self, found: list[dict[str, Tensor]]) -> float:
        """The largest difference from the float64 definition, in parts of a scope's largest entry."""
        exact = self.case.cast_to(torch.float64)
        worst = 0.0
        for number, one in enumerate(self.sequences(exact)):
            if number % 5 and number + 1 < len(self.lengths):
                continue
            places = sorted({0, len(one.query_tokens) // 2, len(one.query_tokens) - 1})
            one = replace(one, query_tokens=one.query_tokens[places])
            plan = replace(self.plan(exact), method="reference", blocks=replace(self.plan(exact).blocks, queries=1))
            truth, _ = run_dense(self.task(exact, "reference"), one, plan)
            for name, rows in truth.items():
                worst = max(worst, float((found[number][name][..., places, :] - rows).abs().max() / rows.max()))
        if not worst < TOLERANCE[torch.float32]:
            raise WrongResult(f"{self} is wrong by {worst:.1e}: not measured")
        return worst


TIMES = (
    Setup("384", (64,)),
    Setup("384", (256,), scopes="all"),
    Setup("384 gated", (256,)),
    Setup("384 gated", (256,), 64, "operator", "all"),
    Setup("384", (1024,), 32, "operator"),
    Setup("384", (2048,), 32, scopes="all"),
    Setup("768", (64,), scopes="all"),
    Setup("768", (128,)),
    Setup("768 gated", (128,), scopes="all"),
    Setup("768", (256,), 32, "operator"),
    Setup("768", (2048,), 16, "operator"),
    Setup("768 gated", (256,), 16, "mixed"),
    Setup("768 gated", (1024,), 16),
    Setup("384", (512,), scopes="attention"),
    Setup("768", (2048,), 64, scopes="attention"),
    Setup("384", (256,), scopes="all", groups=4),
    Setup("384", SENTENCES, scopes="all"),
    Setup("768", SENTENCES),
    Setup("384 gated", SENTENCES, 4, "operator"),
)
MEMORY = (
    Setup("768", (512,), 192),
    Setup("768", (512,), 100, "operator"),
    Setup("768", (512,), 192, scopes="all"),
    Setup("768 gated", (512,), 128, scopes="all"),
    Setup("768", (2048,), 64),
    Setup("768", (2048,), 64, "operator"),
    Setup("768", (2048,), 256, scopes="attention"),
    Setup("768", (8192,), 1, "operator"),
    Setup("768", (8192,), 1, "mixed"),
    Setup("768 gated", (512,), 32, "mixed", "all"),
    Setup("384", (4096,), 1, "operator", "all"),
    Setup("384", (2048,), 64, scopes="all"),
    Setup("384", SENTENCES, scopes="all"),
    Setup("768", SENTENCES),
    Setup("768", (512,), 192, groups=4),
    Setup("768 gated", (1024,), 32, "operator"),
)


def cpu_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """Median seconds of one thread on a processor: while others have it, this clock stands."""
    run()
    return statistics.median(processor_seconds(run) for _ in range(rounds))


def times(setups: Sequence[Setup], rounds: int) -> dict[str, dict[str, float]]:
    """Predicted and measured seconds."""
    torch.set_num_threads(1)
    cases = {setup: setup.case for setup in setups}
    for setup, case in cases.items():
        setup.verify(setup.run(case)[0]())
    found: dict[Setup, list[tuple[float, float]]] = {setup: [] for setup in setups}
    for _ in range(rounds):
        rates = measure_rates("cpu", torch.float32, CPU, cpu_seconds)
        for setup, case in cases.items():
            predicted = replace(setup.plan(case), rates=rates).seconds
            assert predicted is not None
            found[setup].append((predicted, cpu_seconds(setup.run(case)[0], 1)))
    return {
        str(setup): {
            "predicted s": round(statistics.median(one for one, _ in pairs), 4),
            "measured s": round(statistics.median(other for _, other in pairs), 4),
            "ratio": round(statistics.median(one / other for one, other in pairs), 3),
        }
        for setup, pairs in found.items()
    }


def memory(setup: Setup) -> dict[str, float]:
    """Runs in the child process."""
    torch.set_num_threads(2)
    torch.randn(512, 768) @ torch.randn(768, 3072)
    for scopes in ("last", "all", "attention"):  # what a process loads once
        small = replace(setup, lengths=(40,), queries=4, scopes=scopes)
        small.run(small.case)[0]()
    case = setup.case
    run, _ = setup.run(case)
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    run()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    measured, planned = int(status["VmHWM"].split()[0]) * 1024 - before, setup.plan(case).bytes
    return {
        "predicted MiB": round(planned / MiB, 1),
        "measured MiB": round(measured / MiB, 1),
        "ratio": round(planned / measured, 3),
    }


def in_child(setup: Setup) -> dict[str, float]:
    child = [sys.executable, __file__, "--case", str(MEMORY.index(setup))]
    found: dict[str, float] = {}
    for returning in (True, False):
        settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if returning else {}
        run = subprocess.run(child, capture_output=True, text=True, check=True, env={**os.environ, **settings})
        one = json.loads(run.stdout)
        found = one if returning else {**found, "kept MiB": one["measured MiB"]}
    return found


def show(rows: Mapping[str, Mapping[str, float]], goal: float) -> None:
    for name, row in rows.items():
        print(f"{name:56}" + ", ".join(f"{value} {key}" for key, value in row.items()))
    off = {name: max(row["ratio"], 1 / row["ratio"]) - 1 for name, row in rows.items()}
    worst = max(off, key=off.__getitem__)
    within = sum(one <= goal for one in off.values())
    print(f"worst: off by {off[worst]:.0%} ({worst}); {within} of {len(off)} within {goal:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="setups whose names contain this")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        print(json.dumps(memory(MEMORY[asked.case])))
        return
    timed = times([setup for setup in TIMES if asked.only in str(setup)], asked.rounds)
    if timed:
        show(timed, 0.25)
    held = {str(setup): in_child(setup) for setup in MEMORY if asked.only in str(setup)}
    if held:
        show(held, 0.1)
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        about = {"processor": name_processor(CPU), "torch": str(torch.__version__)}
        rows = {"machine": about, "time, one thread": timed, "memory": held}
        (RESULTS / "plan.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
