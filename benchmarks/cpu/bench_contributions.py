"""What `ffattr.contributions` costs on this CPU, in forward passes of the model, and its peak memory.

    python benchmarks/cpu/bench_contributions.py [--threads 2] [--rounds 5] [--write]

SmolLM2-135M at T = 512: the model's own forward pass with all logits, scores, and scores with flow in turns; medians of
the ratios of processor time. Nothing is timed that does not add up to the model's own logit. Memory, each in a process
of its own (Linux): random weights of MiniLM's shape, T = 8192, less what the process had before; the same at half the
length says how it grows.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from kept_figures import describe_machine, write_figures
from models import smollm2
from texts import prose

import ffattr
from ffattr.bench.timing import processor_seconds
from ffattr.bench.truth import WrongResult

_LENGTHS = (4096, 8192)
_CHILD = """
import resource, sys
import psutil, torch, transformers
import ffattr
config = transformers.BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=6,
                                 vocab_size=1000, max_position_embeddings=8192)
model = transformers.BertModel(config).eval()
ids = torch.randint(1000, (1, int(sys.argv[1])), generator=torch.Generator().manual_seed(0))
direction = torch.randn(384, generator=torch.Generator().manual_seed(1))
ffattr.contributions(model, ids[:, :16], target=direction, position="cls")
before = psutil.Process().memory_info().rss
found = ffattr.contributions(model, ids, target=direction, position="cls", check=False)
assert found.error.max() < 1e-4, found.error
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def measure_speed(rounds: int) -> dict[str, float]:
    """The ratios to a forward pass, and the error of what was timed."""
    loaded = smollm2(head=True)
    model, ids = loaded.model, prose(loaded, 512)["input_ids"]
    found = ffattr.contributions(model, ids, target="predicted", flow=True)
    error = float(found.error.max())
    if not error < 1e-5:
        raise WrongResult(f"contributions do not add up to the logit, by {error:.1e}: not timed")

    def run_model() -> object:
        with torch.no_grad():
            return model(ids, use_cache=False)

    steps: dict[str, Callable[[], object]] = {
        "forward": run_model,
        "scores": lambda: ffattr.contributions(model, ids, target="predicted"),
        "flow": lambda: ffattr.contributions(model, ids, target="predicted", flow=True),
    }
    # The first round is not counted.
    turns = [{name: processor_seconds(step) for name, step in steps.items()} for _ in range(rounds + 1)][1:]
    ratios = {
        name: round(statistics.median(turn[name] / turn["forward"] for turn in turns), 2) for name in ("scores", "flow")
    }
    return {**ratios, "forward_s": round(statistics.median(turn["forward"] for turn in turns), 3), "error": error}


def measure_memory() -> dict[str, int]:
    """Largest resident size of each length besides the model, in MiB."""
    found = {}
    for length in _LENGTHS:
        command = [sys.executable, "-c", _CHILD, str(length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[str(length)] = round(int(done.stdout.split()[-1]) / 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    speed = measure_speed(chosen.rounds)
    print(f"SmolLM2, T = 512: scores {speed['scores']} and with flow {speed['flow']} forward passes of the model")
    print(f"relative error {speed['error']:.1e}")
    memory = measure_memory()
    for length, size in memory.items():
        print(f"MiniLM's shape, T = {length}: {size} MiB besides the model")
    if chosen.write:
        about = describe_machine(chosen.threads)
        write_figures("contributions", {"machine": about, "smollm2_512": speed, "memory_mib": memory})


if __name__ == "__main__":
    main()
