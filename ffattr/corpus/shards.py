"""One shard after the other by one process: read, tokenise, compute, commit.

A shard is done when its part of ``documents`` is there, which is written last. Whatever happens before leaves nothing
that a second try does not write anew, and what a process does not survive is told by the shard's `Journal`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine import machine_rates
from ..machine import replacing, sync
from ..results.saved.write import save_file
from ..selection import parse_indices
from .documents import Document, Failure, read_shard
from .journal import Journal
from .mapper import Mapper
from .pieces import Parts, Piece, join_parts
from .settings import Run, RunMismatch, describe_machine, read_run
from .tables import COMMIT, make_tables, part_path, write_table

__all__ = ["Done", "ShardWorker", "clean_up", "count_part", "is_done", "journal_path"]

_DIED = Failure("ProcessDied", "the process that computed this document ended, twice with this document alone")
_MOST_DEATHS = 5
"""Times that a process may end while it reads or writes, for which no document is to blame."""

Report = Callable[[int, int], None]
"""Takes how many documents and tokens were computed since the last call."""


@dataclass(frozen=True)
class Done:
    """What a shard came to: its documents, their tokens, how many have an error, and of these how many are empty."""

    shard: int
    documents: int
    tokens: int
    errors: int
    empty: int
    seconds: float = 0.0


class ShardWorker:
    """Loads the model of the run in ``folder``, with its threads and rates, and computes shards.

    Raises `RunMismatch` on a machine whose results would have other bytes, and what `Mapper.check` raises.
    """

    def __init__(self, folder: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.run = read_run(folder)
        torch.set_num_threads(self.run.options.threads)
        machine_rates.pin(self.run.rates)
        _check_machine(self.run)
        self.mapper = _make_mapper(self.run)
        self.mapper.check()

    def compute(self, number: int, report: Report = lambda documents, tokens: None) -> Done:
        """Computes a shard and commits it. Raises OSError where it cannot be read or written."""
        began = time.monotonic()
        run, shard = self.run, self.run.shards[number]
        source = run.sources[shard.source]
        path = journal_path(run.folder, number)
        path.parent.mkdir(exist_ok=True)
        journal = Journal(path)
        try:
            with _guard(journal, "read", number):
                documents = read_shard(source, shard, run.options.text, run.options.id)
            pieces, failures = self._encode(documents, source.path, journal)
            parts, failed = self._compute_batches(pieces, journal, report)
            failures |= failed
            with _guard(journal, "write", number):
                tables = make_tables(self.mapper.layout, documents, failures, parts, source.path, number)
                maps = {name: values for name, values in parts.maps.items() if int(name.split(".")[0]) not in failures}
                _commit(run.folder, number, tables, maps if "maps" in self.mapper.layout.tables else None)
        except BaseException:
            journal.close()
            raise
        journal.close(remove=True)
        empty = sum(failure.kind == "EmptyText" for failure in failures.values())
        tokens = sum(piece.tokens for piece in parts.pieces)
        return Done(number, len(documents), tokens, len(failures), empty, time.monotonic() - began)

    def _encode(
        self, documents: Sequence[Document], source: str, journal: Journal
    ) -> tuple[list[Piece], dict[int, Failure]]:
        """Tokenises all documents at once, or where a process did not survive that twice, each on its own."""
        pieces: list[Piece] = []
        failures: dict[int, Failure] = {}

        def encode(document: Document) -> None:
            found = self.mapper.encode(document, source)
            if isinstance(found, Failure):
                failures[document.row] = found
            else:
                pieces.extend(found)

        if journal.count_deaths("tokenise") < 2:
            with journal.enter("tokenise"):
                for document in documents:
                    encode(document)
            return pieces, failures
        for document in documents:
            if journal.count_deaths("tokenise", document.row) >= 2:
                failures[document.row] = _DIED
                continue
            with journal.enter("tokenise", document.row):
                encode(document)
        return pieces, failures

    def _compute_batches(
        self, pieces: Sequence[Piece], journal: Journal, report: Report
    ) -> tuple[Parts, dict[int, Failure]]:
        """Computes all pieces but those of documents that processes did not survive, in batches without these."""
        rows = {piece.row for piece in pieces}
        failures = {row: _DIED for row in rows if journal.count_deaths("alone", row) >= 2}
        batches = self.mapper.cut_batches([piece for piece in pieces if piece.row not in failures])
        parts: list[Parts] = []
        # What a process did not survive comes first: it is known soon whether that happens again.
        for batch in sorted(batches, key=lambda batch: -journal.count_deaths("batch", *_name(batch))):
            found, failed = self._compute_batch(batch, journal)
            parts += found
            failures |= failed
            report(len({piece.row for piece in batch}), sum(len(piece.ids) for piece in batch))
        return join_parts(parts), failures

    def _compute_batch(self, batch: Sequence[Piece], journal: Journal) -> tuple[list[Parts], dict[int, Failure]]:
        """Computes a batch as it is. Where two processes did not survive that, each document is tried alone before; and
        where a third one did not either, though all of them had been survived alone, what was found alone counts."""
        deaths = journal.count_deaths("batch", *_name(batch))
        if deaths >= 2:
            parts: list[Parts] = []
            failures: dict[int, Failure] = {}
            for row in sorted({piece.row for piece in batch}):
                with journal.enter("alone", row):
                    found, failed = self.mapper.compute([piece for piece in batch if piece.row == row])
                parts += found
                failures |= failed
            if deaths > 2:
                return parts, failures
        with journal.enter("batch", *_name(batch)):
            return self.mapper.compute(batch)


def journal_path(folder: Path, number: int) -> Path:
    return folder / "_journal" / f"shard-{number:06d}"


def is_done(folder: Path, number: int) -> bool:
    return part_path(folder, COMMIT, number).exists()


def count_part(folder: Path, number: int) -> Done:
    """Reads what a shard that is done came to."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # One file, not a data set: a folder's name is no column.
    table = pq.ParquetFile(part_path(folder, COMMIT, number)).read(columns=["tokens", "error_type"])
    kinds = table.column("error_type")
    empty = pc.sum(pc.equal(kinds, "EmptyText")).as_py() or 0
    tokens = pc.sum(table.column("tokens")).as_py() or 0
    return Done(number, table.num_rows, tokens, table.num_rows - kinds.null_count, empty)


def clean_up(folder: Path, numbers: Sequence[int]) -> None:
    """Removes what processes that were killed left of shards: files with names of temporary ones."""
    for number in numbers:
        for file in folder.glob(f"*/{number // 1000:03d}/.part-{number:06d}.*"):
            file.unlink(missing_ok=True)


def _commit(folder: Path, number: int, tables: Mapping[str, Any], maps: dict[str, Tensor] | None) -> None:
    """Writes each table durably, `COMMIT` last; the names of their folders are synced before."""
    writers: dict[str, Callable[[Path], None]] = {}
    if maps is not None:
        writers["maps"] = functools.partial(save_file, maps)
    for name in sorted(tables, key=lambda name: name == COMMIT):
        writers[name] = functools.partial(write_table, tables[name])
    paths = {name: part_path(folder, name, number) for name in writers}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(path.parent.parent)
    sync(folder)
    for name, write in writers.items():
        with replacing(paths[name], durable=True) as temporary:
            write(temporary)


def _name(batch: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    return ((piece.row, piece.window) for piece in batch)


@contextmanager
def _guard(journal: Journal, step: str, number: int) -> Iterator[None]:
    """Enters a step for whose deaths no document is to blame. Raises RuntimeError after too many."""
    if journal.count_deaths(step) >= _MOST_DEATHS:
        raise RuntimeError(
            f"the process ended {_MOST_DEATHS} times when it had to {step} shard {number}: is there enough memory?"
        )
    with journal.enter(step):
        yield


def _make_mapper(run: Run) -> Mapper:
    options = run.options
    nlp = None
    if options.spacy is not None:
        import spacy

        nlp = spacy.load(options.spacy)
    return Mapper(
        run.model,
        keep=options.keep,
        scopes=options.scopes,
        layers=None if options.layers is None else parse_indices(options.layers),
        pairs=options.pairs,
        target=options.target,
        long=options.long,
        max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens,
        nlp=nlp,
    )


def _check_machine(run: Run) -> None:
    here = describe_machine()
    for name, value in run.machine.items():
        if here.get(name) != value:
            raise RunMismatch(
                f"this machine has {name} {here.get(name)!r}, where the run in {str(run.folder)!r} has {value!r}: its "
                "results would have other last bits. Use machines that are alike"
            )
