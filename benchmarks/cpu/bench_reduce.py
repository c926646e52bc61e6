"""What L1 norms and ALTI cost beside Euclidean norms, and how exact they are, in one run.

    python benchmarks/cpu/bench_reduce.py [--tokens 128] [--rounds 5] [--backend cpu] [--write]

One layer of BERT-base's shape (random weights), all queries of a text: the scopes behind the feed-forward block by both
methods and dtypes, and those before it, which take quadratic forms for Euclidean norms and sums of vectors for all
else. The three run in turns on one thread of a processor, so that whoever shares the machine counts little; "times
slower" are medians of the ratios of each round. Errors are those of float64: of the largest entry of a scope in the
worst pair, and in the median pair of its own entry. ``--write`` keeps the figures in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from kept_figures import CPU, describe_machine, write_figures
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ffattr.bench.cases import SHAPES, Case
from ffattr.bench.run import Run, prepare_run
from ffattr.bench.timing import processor_seconds
from ffattr.ops import backends
from ffattr.ops.reduction import REDUCTIONS


@dataclass(frozen=True)
class Setup:
    """Scopes behind the feed-forward block (``wide``) or before it, by a method in a dtype."""

    wide: bool
    method: str
    dtype: torch.dtype

    def __str__(self) -> str:
        where = f"feed-forward scopes, {self.method}" if self.wide else "attention-level scopes"
        return f"{where}, {str(self.dtype).removeprefix('torch.')}"


SETUPS = (
    Setup(True, "direct", torch.float32),
    Setup(True, "operator", torch.float32),
    Setup(True, "direct", torch.bfloat16),
    Setup(False, "auto", torch.float32),
)


def measure_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float]:
    """Returns the largest error in any scope, of its largest entry, and the largest of the scopes' medians, of the
    entries that are not zero."""
    worst, median = [], []
    for scope, expected in exact.items():
        far = (found[scope].double() - expected).abs()
        worst.append(float(far.max() / expected.max()))
        counted = expected > 0
        median.append(float((far[counted] / expected[counted]).median()))
    return max(worst), max(median)


def bench(setup: Setup, case: Case, backend: str, rounds: int) -> list[dict[str, object]]:
    """One row for each reduction."""
    scopes = case.wide_scopes if setup.wide else case.narrow_scopes
    runs: dict[str, Run] = {}
    errors = {}
    for reduction in REDUCTIONS:
        runs[reduction], _ = prepare_run(case, backend, setup.method, scopes, None, setup.dtype, reduction)
        exact, _ = prepare_run(case.cast_to(torch.float64), backend, setup.method, scopes, reduction=reduction)
        errors[reduction] = measure_errors(runs[reduction](), exact())
    times = [[processor_seconds(run) for run in runs.values()] for _ in range(rounds)]
    rows: list[dict[str, object]] = []
    for place, reduction in enumerate(REDUCTIONS):
        worst, median = errors[reduction]
        rows.append(
            {
                "setup": str(setup),
                "reduce": reduction,
                "s": round(statistics.median(found[place] for found in times), 4),
                "times slower": round(statistics.median(found[place] / found[0] for found in times), 3),
                "worst error": worst,
                "median error": median,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="cpu", choices=("cpu", "torch"))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    about = {
        **describe_machine(1),
        "backend": asked.backend,
        "instruction set": backends.build_info().get("instruction set", "no extension"),
        "float32 by": backends.build_info().get("float32 by", "float32"),
        "tokens": asked.tokens,
    }
    case = Case.draw_random(SHAPES["bert-base"], asked.tokens)
    setups = [s for s in SETUPS if backends.BACKENDS[asked.backend].why_not(CPU, s.dtype) is None]
    rows = [row for setup in setups for row in bench(setup, case, asked.backend, asked.rounds)]
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), soft_wrap=True)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.1e}" if "error" in key else str(value) for key, value in row.items()))
    console.print(table)
    if asked.write:
        write_figures("reduce", {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
