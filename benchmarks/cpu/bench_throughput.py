"""Sentences per second through real models on this CPU: all layers, the last scope, in one run.

    python benchmarks/cpu/bench_throughput.py [--sentences 64] [--threads 2] [--rounds 3] [--write]

Variants take turns, so that a change of the machine's speed meets them all; figures are medians. ``packed`` is
``ffattr.attribute`` with a list of texts; ``one by one`` calls it for every sentence; ``padded`` gives it the padded
batch with every token taken for a real one, which is what tools without offsets compute; ``materialising`` is plain
PyTorch that holds all vectors of a sentence (`ffattr.decomposition.reference` in float32) and stands for every earlier
tool. The packed maps are compared with the float64 definition before anything is timed. Tokens are real ones, padding
excluded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from kept_figures import CPU, describe_machine, write_figures
from models import Loaded, minilm, smollm2
from texts import SENTENCES

import ffattr
from ffattr.bench.timing import seconds_of
from ffattr.bench.truth import WrongResult
from ffattr.machine import name_processor

MODELS: dict[str, Callable[[], Loaded]] = {"MiniLM-L6": minilm, "SmolLM2-135M": smollm2}


def verify(loaded: Loaded, found: ffattr.Attribution, texts: list[str]) -> float:
    """Compares a short and a middle text with the definition."""
    worst = 0.0
    by_length = sorted(range(len(texts)), key=lambda row: int(found.mask[row].sum()))
    for row in (by_length[0], by_length[len(texts) // 2]):
        exact = ffattr.attribute(loaded.model, [texts[row]], tokenizer=loaded.tokenizer, backend="reference")
        tokens = exact.mask.shape[1]
        part = found["layer"][:, row, :tokens, :tokens]
        worst = max(worst, float((part - exact["layer"][:, 0]).abs().max() / exact["layer"].max()))
        if bool(found["layer"][:, row, tokens:].any()) or bool(found["layer"][:, row, :, tokens:].any()):
            raise WrongResult("padding is not zero: not timed")
    if not worst < 2e-5:
        raise WrongResult(f"packed maps are wrong by {worst:.1e}: not timed")
    return worst


def bench(name: str, loaded: Loaded, count: int, rounds: int) -> list[dict[str, Any]]:
    model, tokenizer, texts = loaded.model, loaded.tokenizer, SENTENCES[:count]
    whole = ffattr.attribute(model, texts, tokenizer=tokenizer)
    error = verify(loaded, whole, texts)
    tokens, longest = int(whole.mask.sum()), whole.mask.shape[1]
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        encoded = tokenizer(text)["input_ids"]
        ids[row, : len(encoded)] = torch.tensor(encoded)
    few = texts[: max(1, count // 8)]  # the slow ones on a part, whose share of the tokens is counted
    few_tokens = sum(len(tokenizer(text)["input_ids"]) for text in few)
    variants: list[tuple[str, Callable[[], object], int]] = [
        ("packed", lambda: ffattr.attribute(model, texts, tokenizer=tokenizer), tokens),
        ("one by one", lambda: [ffattr.attribute(model, text, tokenizer=tokenizer) for text in texts], tokens),
        ("padded", lambda: ffattr.attribute(model, ids), tokens),
        (
            "materialising PyTorch",
            lambda: [
                ffattr.attribute(model, t, tokenizer=tokenizer, backend="reference", dtype=torch.float32) for t in few
            ],
            few_tokens,
        ),
        ("the model alone", lambda: model(**tokenizer(texts, padding=True, return_tensors="pt")), tokens),
    ]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rates: dict[str, list[float]] = {variant: [] for variant, _, _ in variants}
    for _ in range(rounds):
        for variant, run, counted in variants:
            rates[variant].append(counted / seconds_of(run, CPU))
    packed = rates["packed"]
    return [
        {
            "model": name,
            "variant": variant,
            "tokens/s": round(statistics.median(found), 1),
            "packed is faster by": round(statistics.median(p / f for p, f in zip(packed, found, strict=True)), 2),
            "sentences": len(texts),
            "tokens": tokens,
            "padded tokens": ids.numel(),
            "error": error,
        }
        for variant, found in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    console = Console()
    console.print(f"{name_processor(CPU)}, {asked.threads} threads, torch {torch.__version__}")
    rows = [row for name in asked.models for row in bench(name, MODELS[name](), asked.sentences, asked.rounds)]
    table = Table("model", "variant", "tokens/s", "packed is faster by")
    for row in rows:
        table.add_row(row["model"], row["variant"], f"{row['tokens/s']:.0f}", f"{row['packed is faster by']:.2f}x")
    console.print(table)
    console.print(f"{rows[0]['tokens']} tokens in {rows[0]['sentences']} sentences, {rows[0]['padded tokens']} padded")
    if asked.write:
        write_figures("throughput", {"machine": describe_machine(asked.threads), "rows": rows})


if __name__ == "__main__":
    main()
