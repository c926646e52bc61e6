"""A corpus from beginning to end: plan, lock, workers, and the promise that every row is there once.

The data flow:

    files -> documents -> shards                                     settings.py, documents.py: planned once
    shard -> pieces -> batches -> measured -> tables -> committed    shards.py, mapper.py, measure.py, tables.py
        by a worker, which is replaced when it dies                  supervise.py, local.py, on_ray.py
    tables -> a study                                                summary.py
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import FfattrError
from .local import LocalProcesses, count_cores
from .on_ray import RayActors
from .settings import Options, Run, begin_run
from .shards import Done, ShardWorker, clean_up, count_part, is_done, journal_path
from .supervise import Engine, Event, Finished, Progressed, supervise

__all__ = ["Count", "Rank", "TooManyErrors", "count_allowed", "open_engine", "run_corpus"]

_FEW = 10  # documents that may have an error whatever share of a small corpus they are


class TooManyErrors(FfattrError):
    """More documents have an error than ``max_errors`` allows; what was computed stays."""


@dataclass(frozen=True)
class Rank:
    """The share ``number``, from 0, of ``count`` of a run's shards: those whose number leaves it when divided."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"rank {self.number}/{self.count}: expected I/N with I from 0 to N - 1")

    @classmethod
    def from_text(cls, given: str) -> Rank:
        """Reads ``"I/N"``. Raises ValueError for anything else."""
        number, _, count = given.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise ValueError(f"rank {given!r}: expected I/N, for instance 0/4")
        return cls(int(number), int(count))

    def list_shards(self, run: Run) -> list[int]:
        return list(range(self.number, len(run.shards), self.count))


@dataclass
class Count:
    """How far a run is: of ``all_documents`` so many ``documents`` are in tables, with their ``tokens``, ``errors`` and
    how many of these are just ``empty``; ``before`` were there already when it went on; ``documents_ahead`` are
    computed, in shards that are not done."""

    all_documents: int
    documents: int = 0
    tokens: int = 0
    errors: int = 0
    empty: int = 0
    before: int = 0
    before_tokens: int = 0
    _ahead: Counter[int] = field(default_factory=Counter)
    _ahead_tokens: Counter[int] = field(default_factory=Counter)

    @property
    def documents_ahead(self) -> int:
        return self._ahead.total()

    @property
    def tokens_ahead(self) -> int:
        return self._ahead_tokens.total()

    def add_shard(self, done: Done) -> None:
        self.documents += done.documents
        self.tokens += done.tokens
        self.errors += done.errors
        self.empty += done.empty

    def take_event(self, event: Event | None) -> None:
        """Counts what a worker says."""
        if isinstance(event, Progressed):
            self._ahead[event.slot] += event.documents
            self._ahead_tokens[event.slot] += event.tokens
        elif event is not None:
            self._ahead[event.slot] = self._ahead_tokens[event.slot] = 0
            if isinstance(event, Finished):
                self.add_shard(event.done)


Listen = Callable[[Count], None]


def run_corpus(
    model: str,
    inputs: Sequence[str],
    folder: str | Path,
    *,
    engine: str = "local",
    workers: int | None = None,
    rank: Rank | None = None,
    max_errors: str = "1%",
    listen: Listen = lambda count: None,
    **options: Any,
) -> Count:
    """Computes the tables of all documents of ``inputs`` into ``folder``, or goes on where a run of it ended.

    model: a folder or a name. inputs: files, globs, folders. engine: ``"local"`` (processes), ``"ray"``, or ``"here"``
    (this process, which a document may end). workers: how many (None: what the machine has room for). rank: this share
    of the shards alone. max_errors: documents with an error, empty ones aside, that end the run: a number or a share,
    which a small corpus may exceed by ten. listen: is told how far it is. options: `Options`.

    Raises `RunMismatch` where ``folder`` holds another run, `TooManyErrors`, OSError, ValueError, and what a model or a
    backend is to blame for.

    >>> from ffattr.corpus import Rank
    >>> Rank.from_text("1/4")
    Rank(number=1, count=4)
    """
    target, share = Path(folder), rank or Rank()
    chosen = Options(**options)
    target.mkdir(parents=True, exist_ok=True)
    with lock_run(target, share):
        for file in target.glob("._*.json") if share.count == 1 else ():  # other ranks may be writing theirs
            file.unlink()
        run = begin_run(target, model, inputs, chosen)
        mine = share.list_shards(run)
        clean_up(target, mine)
        count = Count(sum(run.shards[number].count for number in mine))
        todo = []
        for number in mine:
            if is_done(target, number):
                count.add_shard(count_part(target, number))
                journal_path(target, number).unlink(missing_ok=True)
            else:
                todo.append(number)
        count.before, count.before_tokens = count.documents, count.tokens
        allowed = count_allowed(max_errors, count.all_documents)

        def take_event(event: Event | None) -> None:
            count.take_event(event)
            _check_errors(count, allowed, max_errors, target)
            listen(count)

        take_event(None)
        if engine == "here":
            _compute_here(target, todo, take_event)
        elif todo:
            supervise(open_engine(engine, target, workers, run), todo, take_event)
        _check_rows(run, mine)
        return count


def open_engine(name: str, folder: Path, workers: int | None, run: Run) -> Engine:
    """Returns the engine. Raises ValueError for an unknown one."""
    threads = run.options.threads
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    if name == "local":
        return LocalProcesses(folder, workers or torch.cuda.device_count() or max(1, count_cores() // threads))
    if name == "ray":
        return RayActors(folder, workers, threads)
    raise ValueError(f"unknown engine {name!r}, expected 'local', 'ray' or 'here'")


def count_allowed(given: str, documents: int) -> int:
    """Returns how many of the documents may have an error: ``"25"``, or ``"1%"`` of them and at least ten.

    Raises ValueError for anything else.
    """
    number, percent = given.removesuffix("%"), given.endswith("%")
    try:
        value = float(number) if percent else int(number)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise ValueError(f"max_errors is {given!r}, expected a number of documents or a share such as '1%'")
    return max(_FEW, math.floor(value / 100 * documents)) if percent else int(value)


@contextmanager
def lock_run(folder: Path, rank: Rank) -> Iterator[None]:
    """Admits one process for each rank, and those of one count alone. Raises OSError where there is another one."""
    try:
        import filelock
    except ImportError:
        raise ValueError("a corpus needs filelock and pyarrow: pip install 'ffattr[corpus]'") from None
    mine = folder / f"_lock-{rank.number}-of-{rank.count}"
    with ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(mine, timeout=0))
            for other in folder.glob("_lock-*-of-*"):
                if not other.name.endswith(f"-of-{rank.count}"):
                    with filelock.FileLock(other, timeout=0):
                        pass
        except filelock.Timeout as error:
            raise OSError(
                f"another process is at work in {str(folder)!r} (it holds {Path(error.lock_file).name}): wait for it, "
                "or use another output folder"
            ) from None
        yield


def _compute_here(folder: Path, shards: Sequence[int], listen: Callable[[Event | None], None]) -> None:
    if shards:
        worker = ShardWorker(folder)
        for number in shards:
            done = worker.compute(number, lambda documents, tokens: listen(Progressed(0, documents, tokens)))
            listen(Finished(0, done))


def _check_errors(count: Count, allowed: int, given: str, folder: Path) -> None:
    if count.errors - count.empty > allowed:
        raise TooManyErrors(
            f"{count.errors - count.empty} of {count.documents} documents have an error, more than max_errors={given} "
            f"allows ({allowed}): column 'error' of {str(folder / 'documents')!r} says why. With a larger max_errors "
            "the run goes on"
        )


def _check_rows(run: Run, shards: Sequence[int]) -> None:
    """Raises RuntimeError where a planned row is missing, which would be a fault of this package."""
    for number in shards:
        rows = count_part(run.folder, number).documents if is_done(run.folder, number) else 0
        if rows != run.shards[number].count:
            raise RuntimeError(f"shard {number} has {rows} rows, expected {run.shards[number].count}")
