"""How much faster a layer's exact maps are by fewer operations, in one run: with the heads of a pair mixed first, and
with the width rotated.

    python benchmarks/cpu/bench_exact.py [--rounds 3] [--only TEXT] [--write]

One layer of a model's shape (float32, random weights), the last queries of a sequence, the last scope: "mixed" is the
*mixed* method after the *operator* one; "rotated" is the *direct* method on a down matrix that is zero right of its
diagonal (`ffattr.engine.planning.rotation`) after the same on the matrix as it is. Both run in turns, each first
compared with the float64 definition; what depends on the weights alone is made before. Times are those of one thread on
a processor: whoever shares the machine counts little. The counts are those of the plan, and "planned" is the method
that it chooses among all. ``--write`` keeps the figures in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from kept_figures import describe_machine, write_figures
from rich.console import Console
from rich.table import Table

from ffattr.bench.cases import SHAPES, Case, Size
from ffattr.bench.run import prepare_run
from ffattr.bench.timing import processor_seconds
from ffattr.bench.truth import TOLERANCE, Truth
from ffattr.ops import backends

QWEN3 = Size(1024, 16, 3072, "silu", pre=True, rms=True, gated=True, causal=True, head_dim=128)
GEMMA3 = Size(640, 4, 2048, "gelu_tanh", pre=True, rms=True, gated=True, causal=True, head_dim=256)


@dataclass(frozen=True)
class Setup:
    """The last ``queries`` of ``tokens`` at a layer of a size, and what saves operations: "mixed" or "rotated"."""

    name: str
    size: Size
    tokens: int
    queries: int
    saving: str = "mixed"

    def __str__(self) -> str:
        return f"{self.saving}: {self.name}, T = {self.tokens}, {self.queries} queries"


SETUPS = (
    Setup("Qwen3-0.6B", QWEN3, 512, 32),
    Setup("Qwen3-0.6B", QWEN3, 2048, 32),
    Setup("Gemma 3 270M", GEMMA3, 512, 64),
    Setup("Gemma 3 270M", GEMMA3, 2048, 64),
    Setup("BERT-base", SHAPES["bert-base"], 512, 64),
    Setup("BERT-base", SHAPES["bert-base"], 512, 1),
    Setup("Qwen3-0.6B", QWEN3, 512, 1),
    Setup("BERT-base", SHAPES["bert-base"], 256, 256, "rotated"),
    Setup("MiniLM-L6", SHAPES["minilm"], 256, 256, "rotated"),
    Setup("GPT-2", SHAPES["gpt2"], 512, 512, "rotated"),
    Setup("Qwen3-0.6B", QWEN3, 512, 512, "rotated"),
)


def bench(setup: Setup, backend: str, rounds: int) -> dict[str, object]:
    """One row: medians of the seconds, and of the ratios of each round."""
    case = Case.draw_random(setup.size, setup.tokens)
    scopes, rows = case.wide_scopes[-1:], torch.arange(setup.tokens - setup.queries, setup.tokens)
    truth = Truth.from_case(case, scopes)
    asked = [place for place, row in enumerate(truth.rows.tolist()) if row >= int(rows[0])]
    truth = Truth(truth.rows[asked] - int(rows[0]), {name: found[asked] for name, found in truth.maps.items()})
    runs, counts, errors = {}, {}, []
    rotated = setup.saving == "rotated"
    for after in (False, True):
        method = "direct" if rotated else "mixed" if after else "operator"
        runs[after], plan = prepare_run(case, backend, method, scopes, rows, rotate=rotated and after)
        errors.append(truth.verify_maps(f"{setup}, {method}", runs[after](), TOLERANCE[torch.float32]))
        counts[after] = plan.flops
    times = [[processor_seconds(run) for run in runs.values()] for _ in range(rounds)]
    slow, fast = (statistics.median(found) for found in zip(*times, strict=True))
    chosen = prepare_run(case, backend, "auto", scopes, rows)[1].method
    return {
        "setup": str(setup),
        "before s": round(slow, 3),
        "after s": round(fast, 3),
        "times as fast": round(statistics.median(before / after for before, after in times), 2),
        "times fewer operations": round(counts[False] / counts[True], 2),
        "planned": chosen,
        "error": max(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="setups whose name has this text")
    parser.add_argument("--backend", default="cpu", choices=("cpu", "torch"))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    about = {
        **describe_machine(1),
        "backend": asked.backend,
        "instruction set": backends.build_info().get("instruction set", "no extension"),
    }
    rows = [bench(setup, asked.backend, asked.rounds) for setup in SETUPS if asked.only in str(setup)]
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), soft_wrap=True)
    table = Table(*(rows[0] if rows else ()))
    for row in rows:
        table.add_row(*(f"{value:.0e}" if key == "error" else str(value) for key, value in row.items()))
    console.print(table)
    if asked.write:
        write_figures("exact", {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
