"""A small corpus and a small model for it, folders of tables compared, and workers that die of a document."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import documented
import torch
from tiny_models import build

from ffattr.corpus import local
from ffattr.corpus.journal import Journal
from ffattr.corpus.measure import Measure
from ffattr.corpus.shards import ShardWorker

EVERY_TABLE = ("documents", "pairs", "tokens", "top:2", "maps")
POISON = 6
"""The row of a document that some workers die of."""
TEXTS = [
    *("the cat sat on the mat", "two dogs barking", "", "a bird saw two dogs , and the cat sat .", "it sat", "of it !"),
    *("the dog", "two birds and a cat saw the dogs", "and it sat on it", "a mat , two mats", "cats barking and dogs"),
]


def save_model(folder: Path, name: str = "bert", **options: object) -> Path:
    """Saves a random model of two layers with the tokenizer of the examples."""
    made = build(name, **{"num_hidden_layers": 2, "num_attention_heads": 2, "dtype": torch.float32, **options})
    made.save_pretrained(folder)
    documented.tokenizer().save_pretrained(folder)
    return folder


def read_tree(folder: Path) -> dict[str, bytes]:
    """Returns the tables of a run, by the names of their files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() for name, path in sorted(names.items()) if not name.startswith("_")}


def read_documents(folder: Path) -> list[dict]:
    """Returns the rows of ``documents``."""
    import pyarrow.parquet as pq

    return [row for path in sorted(folder.glob("documents/*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_of_poison() -> None:
    """Makes this process die when it computes the row `POISON`."""
    compute = Measure.compute

    def compute_or_die(self, batch):
        if any(piece.row == POISON for piece in batch):
            kill_this_process()
        return compute(self, batch)

    Measure.compute = compute_or_die


def work_with_poison(folder, slot, pipe, gpu=None):
    """A worker that dies whenever it computes the row `POISON`."""
    die_of_poison()
    local.work(folder, slot, pipe, gpu)


def work_and_die_once(folder, slot, pipe, gpu=None):
    """A worker that dies in the middle of the first reading, tokenising, batch and writing of all workers."""
    die_once(folder, "read", "tokenise", "batch", "write")
    local.work(folder, slot, pipe, gpu)


class WorkerThatDiesOnce(ShardWorker):
    """Dies in the middle of the first batch."""

    def __init__(self, folder):
        die_once(folder, "batch")
        super().__init__(folder)


class WorkerThatFails(ShardWorker):
    """Raises what no document is to blame for."""

    def compute(self, number, report=None):
        raise OSError(errno.ENOSPC, "No space left on device")


def die_once(folder, *steps):
    """Makes this process die in the middle of each of these steps, if no other one has died of it."""
    enter = Journal.enter

    def enter_or_die(self, *step):
        context = enter(self, *step)
        context.__enter__()
        marker = Path(folder) / f"_died-{step[0]}"
        if step[0] in steps and not marker.exists():
            marker.write_text(json.dumps(step))
            kill_this_process()
        context.__exit__(None, None, None)
        return enter(self, *step)

    Journal.enter = enter_or_die
