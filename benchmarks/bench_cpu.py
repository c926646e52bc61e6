"""Speed of one BERT-base-shaped layer on this CPU, in one run: as shares of the machine's own sgemm rate.

    python benchmarks/bench_cpu.py [--tokens 128 256 512] [--threads 2] [--rounds 5] [--write]

Every variant computes all feed-forward scopes of one layer (d 768, H 12, F 3072, float32, random weights) from input
to norms, and is first compared with the float64 definition on a sample of queries: a wrong one is not timed. Rounds
take the variants in turn, so that a change of the machine's speed meets them all; figures are medians. The share counts
2 T^2 F d operations (half of them for a causal layer) and nothing else. ``--write`` keeps the table in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ffattr import backends, engine, reference
from ffattr.activations import ACTIVATIONS
from ffattr.attention import Attention
from ffattr.layer import LayerWeights, Linear, Norm
from ffattr.plan import LayerShape, plan_layer
from ffattr.reference import Rule

WIDTH, HEADS, FF = 768, 12, 3072
WIDE = ("atb_ff", "atb_ff_res", "atb_ff_res_ln")
NARROW = ("attn", "attn_res", "atb")
TOLERANCE = 2e-5  # of the scope's largest entry
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One layer with one input: everything that a variant gets."""

    weights: LayerWeights
    x: Tensor
    attention: Attention

    def cast(self, dtype: torch.dtype) -> Case:
        def linear(part: Linear) -> Linear:
            return Linear(part.weight.to(dtype), None if part.bias is None else part.bias.to(dtype))

        def norm(part: Norm | None) -> Norm | None:
            if part is None or part.weight is None or part.bias is None:
                return part
            return replace(part, weight=part.weight.to(dtype), bias=part.bias.to(dtype))

        w, a = self.weights, self.attention
        weights = replace(
            w,
            value=linear(w.value),
            out=linear(w.out),
            up=linear(w.up),
            down=linear(w.down),
            norm_after_attn=norm(w.norm_after_attn),
            norm_after_ff=norm(w.norm_after_ff),
        )
        attention = replace(a, query=a.query.to(dtype), key=a.key.to(dtype))
        return Case(weights, self.x.to(dtype), attention)


def make_case(tokens: int, causal: bool) -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def linear(inputs: int, outputs: int) -> Linear:
        return Linear(random(inputs, outputs, scale=inputs**-0.5), random(outputs, scale=0.1))

    def norm() -> Norm:
        return Norm("layer", 1 + random(WIDTH, scale=0.1), random(WIDTH, scale=0.1), 1e-12)

    weights = LayerWeights(
        heads=HEADS,
        kv_heads=HEADS,
        value=linear(WIDTH, WIDTH),
        out=linear(WIDTH, WIDTH),
        up=linear(WIDTH, FF),
        gate=None,
        down=linear(FF, WIDTH),
        activation=ACTIVATIONS["gelu"],
        norm_after_attn=norm(),
        norm_after_ff=norm(),
    )
    query, key = random(HEADS, tokens, 64), random(HEADS, tokens, 64)
    return Case(weights, random(tokens, WIDTH), Attention(query, key, 64**-0.5, causal=causal))


def maps(
    case: Case, backend: str, method: str, scopes: tuple[str, ...], rows: Tensor | None = None
) -> dict[str, Tensor]:
    """The maps as `ffattr.attribute` computes them, one layer and sequence."""
    chosen = backends.BACKENDS[backend]
    rows = torch.arange(len(case.x)) if rows is None else rows
    shape = LayerShape.of(case.weights, len(rows), len(case.x), case.attention.pairs(rows))
    device = torch.device("cpu")
    plan = plan_layer(0, shape, scopes == WIDE, chosen, method, case.x.dtype, device, None)
    done = engine.layer_maps(case.weights, case.x, case.attention, rows, scopes, Rule(), "token", chosen, plan)
    return done.maps


def materialise(case: Case, scopes: tuple[str, ...]) -> dict[str, Tensor]:
    """What every earlier tool does: all vectors of all pairs in memory, then their norms."""
    rows = torch.arange(len(case.x))
    found = {}
    for name, stream in reference.decompose(case.weights, case.x, case.attention, rows, Rule()):
        if name in scopes:
            found[name] = stream.vectors.norm(dim=-1)
        if len(found) == len(scopes):
            break
    return found


def verify(name: str, case: Case, run: Callable[[], dict[str, Tensor]], scopes: tuple[str, ...]) -> float:
    """Largest difference from the float64 definition, on a few queries, relative to the scope's largest entry."""
    rows = torch.tensor([0, len(case.x) // 2, len(case.x) - 1])
    truth = maps(case.cast(torch.float64), "reference", "auto", scopes, rows)
    found = run()
    error = max(float((found[s][rows] - truth[s]).abs().max() / truth[s].max()) for s in scopes)
    if not error < TOLERANCE:
        raise SystemExit(f"{name} is wrong by {error:.1e}: not timed")
    return error


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sgemm() -> Callable[[], object]:
    a, b = torch.randn(4096, FF), torch.randn(FF, WIDTH)
    return lambda: a @ b


SGEMM_FLOPS = 2.0 * 4096 * FF * WIDTH


def bench(tokens: int, rounds: int) -> list[dict[str, object]]:
    """One row per variant: seconds, share of the sgemm rate of the same rounds, error."""
    full, causal = make_case(tokens, False), make_case(tokens, True)
    wide_flops = 2.0 * tokens * tokens * FF * WIDTH
    variants: list[tuple[str, Case, Callable[[], dict[str, Tensor]], tuple[str, ...], float]] = [
        ("C++ direct", full, lambda: maps(full, "cpu", "direct", WIDE), WIDE, wide_flops),
        ("C++ direct, causal", causal, lambda: maps(causal, "cpu", "direct", WIDE), WIDE, wide_flops / 2),
        ("C++ operator", full, lambda: maps(full, "cpu", "operator", WIDE), WIDE, wide_flops),
        ("PyTorch, chunked", full, lambda: maps(full, "torch", "direct", WIDE), WIDE, wide_flops),
        ("C++ attention-level scopes", full, lambda: maps(full, "cpu", "direct", NARROW), NARROW, 0.0),
    ]
    # [H, T, T, d], [T, T, d] three times and [T, T, F] twice are alive at its peak.
    needed = 4.0 * tokens * tokens * (HEADS * WIDTH + 3 * WIDTH + 2 * FF)
    if needed < 0.7 * psutil.virtual_memory().available:
        variants += [
            ("PyTorch, materialising", full, lambda: materialise(full, WIDE), WIDE, wide_flops),
            ("PyTorch, materialising attention level", full, lambda: materialise(full, NARROW), NARROW, 0.0),
        ]
    errors = {name: verify(name, case, run, scopes) for name, case, run, scopes, _ in variants}
    product = sgemm()
    product()
    times: dict[str, list[float]] = {name: [] for name, *_ in variants}
    shares: dict[str, list[float]] = {name: [] for name, *_ in variants}
    for turn in range(rounds):
        for name, _, run, _, flops in variants:
            if "materialising" in name and turn >= 2:  # minutes each: two rounds tell
                continue
            before = timed(product)
            seconds = timed(run)
            rate = SGEMM_FLOPS / statistics.mean([before, timed(product)])
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
    product = sgemm()
    seconds = statistics.median(timed(product) for _ in range(7))
    return {
        "processor": processor(),
        "threads": threads,
        "torch": str(torch.__version__),
        "instruction set": backends.build_info().get("instruction set", "no extension"),
        "sgemm GFLOP/s": round(SGEMM_FLOPS / seconds / 1e9, 1),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"{names[0]}, {len(names)} cores"
    return platform.processor() or platform.machine()


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
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
