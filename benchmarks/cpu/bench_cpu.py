"""Speed of one BERT-base-shaped layer on this CPU, in one run: as shares of the machine's own sgemm rate.

    python benchmarks/cpu/bench_cpu.py [--tokens 128 256 512] [--threads 2] [--rounds 5] [--write]

Every variant computes all feed-forward scopes of one layer (d 768, H 12, F 3072, float32, random weights) from input
to norms, and is first compared with the float64 definition on a sample of queries: a wrong one is not timed. Rounds
take the variants in turn, so that a change of the machine's speed meets them all; figures are medians. The share counts
2 T^2 F d operations (half of them for a causal layer) and nothing else. ``--write`` keeps the table in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from kept_figures import CPU, describe_machine, write_figures
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ffattr.bench.cases import SHAPES, Case
from ffattr.bench.run import compute_maps, materialise_maps
from ffattr.bench.timing import make_product, matrix_rate, seconds_of
from ffattr.bench.truth import TOLERANCE, Truth, WrongResult
from ffattr.ops import backends

SIZE = SHAPES["bert-base"]


def verify(name: str, case: Case, run: Callable[[], dict[str, Tensor]], scopes: tuple[str, ...]) -> float:
    try:
        return Truth.from_case(case, scopes).verify_maps(name, run(), TOLERANCE[torch.float32])
    except WrongResult as error:
        raise SystemExit(str(error)) from None


def bench(tokens: int, rounds: int) -> list[dict[str, object]]:
    """One row per variant: seconds, share of the sgemm rate of the same rounds, error."""
    full, causal = Case.draw_random(SIZE, tokens), Case.draw_random(replace(SIZE, causal=True), tokens)
    wide, narrow = full.wide_scopes, full.narrow_scopes
    variants: list[tuple[str, Case, Callable[[], dict[str, Tensor]], tuple[str, ...], float]] = [
        ("C++ direct", full, lambda: compute_maps(full, "cpu", "direct", wide), wide, full.flops),
        ("C++ direct, causal", causal, lambda: compute_maps(causal, "cpu", "direct", wide), wide, causal.flops),
        ("C++ operator", full, lambda: compute_maps(full, "cpu", "operator", wide), wide, full.flops),
        ("PyTorch, chunked", full, lambda: compute_maps(full, "torch", "direct", wide), wide, full.flops),
        ("C++ attention-level scopes", full, lambda: compute_maps(full, "cpu", "direct", narrow), narrow, 0.0),
    ]
    # [H, T, T, d], [T, T, d] three times and [T, T, F] twice are alive at its peak.
    needed = 4.0 * tokens * tokens * (SIZE.heads * SIZE.width + 3 * SIZE.width + 2 * SIZE.ff_width)
    if needed < 0.7 * psutil.virtual_memory().available:
        variants += [
            ("PyTorch, materialising", full, lambda: materialise_maps(full, wide), wide, full.flops),
            ("PyTorch, materialising attention level", full, lambda: materialise_maps(full, narrow), narrow, 0.0),
        ]
    errors = {name: verify(name, case, run, scopes) for name, case, run, scopes, _ in variants}
    sgemm, sgemm_flops = make_product(CPU, torch.float32)
    sgemm()
    times: dict[str, list[float]] = {name: [] for name, *_ in variants}
    shares: dict[str, list[float]] = {name: [] for name, *_ in variants}
    for turn in range(rounds):
        for name, _, run, _, flops in variants:
            if "materialising" in name and turn >= 2:  # minutes each: two rounds tell
                continue
            before = seconds_of(sgemm, CPU)
            seconds = seconds_of(run, CPU)
            rate = sgemm_flops / statistics.mean([before, seconds_of(sgemm, CPU)])
            times[name].append(seconds)
            shares[name].append(flops / seconds / rate)
    return [
        {
            "tokens": tokens,
            "variant": name,
            "seconds": statistics.median(times[name]),
            "share_of_sgemm": statistics.median(shares[name]),
            "error": errors[name],
        }
        for name, *_ in variants
    ]


def machine(threads: int) -> dict[str, object]:
    return {
        **describe_machine(threads),
        "instruction set": backends.build_info().get("instruction set", "no extension"),
        "sgemm GFLOP/s": round(matrix_rate(CPU, torch.float32)[1] / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    about = machine(asked.threads)
    rows = [row for tokens in asked.tokens for row in bench(tokens, asked.rounds)]

    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    table = Table("T", "variant", "seconds", "share of sgemm", "error")
    for row in rows:
        share = row["share_of_sgemm"]
        table.add_row(
            str(row["tokens"]),
            str(row["variant"]),
            f"{row['seconds']:.3f}",
            f"{share:.0%}" if share else "",
            f"{row['error']:.0e}",
        )
    console.print(table)
    if asked.write:
        write_figures("cpu", {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
