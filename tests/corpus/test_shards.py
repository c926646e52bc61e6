"""A shard is done or it is not: after an end at any write, and whatever processes did not survive."""

import errno
import os
import shutil
from pathlib import Path

import corpora
import pyarrow.parquet as pq
import pytest
from corpora import POISON, read_documents, read_tree

from ffattr.corpus import shards
from ffattr.corpus.journal import Journal
from ffattr.corpus.measure import Measure
from ffattr.corpus.shards import ShardWorker, count_part, is_done, journal_path


class Killed(BaseException):
    """Ends the process, as far as anything in it can tell."""


@pytest.fixture
def run(undisturbed, tmp_path):
    """A copy of the run with nothing done, which is a run of its own: its machine, its inputs and its options."""
    for path in undisturbed.glob("_*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def finish(folder):
    """Computes two shards, those of them that are not done."""
    worker = ShardWorker(folder)
    for number in range(2):
        if not is_done(folder, number):
            worker.compute(number)
    return read_tree(folder)


@pytest.mark.parametrize("moment", range(4, 10))
def test_an_end_at_any_write_loses_nothing(run, undisturbed, monkeypatch, moment):
    """Before the commit of the first shard, and before each of the renames of the second. G1, G2."""
    replace, calls = os.replace, []

    def replace_or_end(source, target):
        if len(calls) == moment:
            raise Killed
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_end)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not tidy up
    with pytest.raises(Killed):
        finish(run)
    monkeypatch.undo()
    done = [number for number in range(2) if is_done(run, number)]
    assert len(done) == moment // 5  # G3: the shard at hand is all that is lost
    shards.clean_up(run, range(2))
    assert finish(run) == {name: content for name, content in read_tree(undisturbed).items() if "000002" not in name}


def test_the_commit_comes_last_and_everything_is_synced_before(run, monkeypatch):
    events = []
    replace, fsync = os.replace, os.fsync

    def note_replace(source, target):
        events.append(("rename", Path(target).parent.parent.name))
        replace(source, target)

    def note_fsync(handle):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "fsync", note_fsync)
    ShardWorker(run).compute(0)
    renames = [name for kind, name in events if kind == "rename"]
    assert renames == ["maps", "pairs", "tokens", "top", "documents"]
    for at, (kind, _) in enumerate(events):
        if kind == "rename":
            assert events[at - 1][0] == "sync"
            assert events[at - 1][1].startswith(".part-000000")
            assert events[at + 1] == ("sync", "000")
    before = events[: events.index(("rename", "maps"))]
    assert {name for kind, name in before if not name.startswith(".")} == {*renames, run.name}  # who has the folders


def test_a_full_disk_ends_the_shard(run, monkeypatch):
    def fail(table, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        ShardWorker(run).compute(0)
    assert not is_done(run, 0)
    assert not list(run.glob("*/000/.part*"))
    monkeypatch.undo()
    assert ShardWorker(run).compute(0).errors == 1  # the empty one


@pytest.fixture
def dying(monkeypatch):
    """Makes computing the poison end the process: nothing is crossed out in the journal."""
    compute, enter, dead = Measure.compute, Journal.enter, []

    def compute_or_die(self, batch):
        if any(piece.row == POISON for piece in batch):
            raise Killed
        return compute(self, batch)

    def enter_for_good(self, *step):
        step_entered = enter(self, *step)

        class Context:
            def __enter__(self):
                step_entered.__enter__()

            def __exit__(self, kind, error, traceback):
                if kind is Killed:
                    dead.append(step_entered)  # never leaves
                    return False
                return step_entered.__exit__(kind, error, traceback)

        return Context()

    monkeypatch.setattr(Measure, "compute", compute_or_die)
    monkeypatch.setattr(Journal, "enter", enter_for_good)


def test_a_document_that_ends_processes_costs_itself_alone(run, dying):
    """G4. Twice its batch ends one, twice it does so alone; then it has an error and the batch is made without it."""
    deaths = 0
    while not is_done(run, 1):
        try:
            ShardWorker(run).compute(1)
        except Killed:
            deaths += 1
            assert journal_path(run, 1).exists()
    assert deaths == 4
    rows = read_documents(run)
    assert [row["row"] for row in rows if row["error_type"] == "ProcessDied"] == [POISON]
    assert [row["row"] for row in rows] == [4, 5, 6, 7]
    assert not journal_path(run, 1).exists()
    for table in ("pairs", "tokens", "top"):
        kept = {row for part in run.glob(f"{table}/*/*") for row in pq.read_table(part).column("row").to_pylist()}
        assert kept == {4, 5, 7}


def test_a_batch_that_ends_processes_as_a_whole_is_computed_one_by_one(run, monkeypatch):
    worker = ShardWorker(run)
    pieces, _ = worker._encode(shards.read_shard(*read_arguments(worker, 1)), "", Journal(run / "j"))
    batch = worker.mapper.cut_batches(pieces)[0]
    assert len(batch) > 1
    for deaths, expected in ((2, [1] * len(batch) + [len(batch)]), (3, [1] * len(batch))):
        journal = Journal(run / f"j{deaths}")
        left = [journal.enter("batch", *((piece.row, piece.window) for piece in batch)) for _ in range(deaths)]
        for at, step in enumerate(left):
            step.__enter__()
            journal = Journal(run / f"j{deaths}")
            assert journal.count_deaths("batch", *((piece.row, piece.window) for piece in batch)) == at + 1
        sizes, compute = [], worker.mapper.compute
        with monkeypatch.context() as patch:
            patch.setattr(worker.mapper, "compute", lambda some, c=compute, s=sizes: s.append(len(some)) or c(some))
            parts, _ = worker._compute_batch(batch, journal)
        assert sizes == expected
        assert sorted(piece.row for part in parts for piece in part.pieces) == sorted(piece.row for piece in batch)


def read_arguments(worker, number):
    shard, options = worker.run.shards[number], worker.run.options
    return worker.run.sources[shard.source], shard, options.text, options.id


def test_a_tokenizer_that_ends_processes(run):
    worker, journal = ShardWorker(run), Journal(run / "j")
    left = [journal.enter("tokenise") for _ in range(2)] + [journal.enter("tokenise", 5) for _ in range(2)]
    for step in left:
        step.__enter__()
        journal = Journal(run / "j")
    pieces, failures = worker._encode(shards.read_shard(*read_arguments(worker, 1)), "", journal)
    assert [piece.row for piece in pieces] == [4, 6, 7]
    assert failures[5].kind == "ProcessDied"


def test_reading_that_always_ends_processes_ends_the_run(run):
    path = journal_path(run, 0)
    path.parent.mkdir()
    path.write_bytes(b'\n\n["read"]\n' * 5)
    with pytest.raises(RuntimeError, match="the process ended 5 times when it had to read shard 0"):
        ShardWorker(run).compute(0)


def test_what_a_part_came_to(undisturbed):
    done = count_part(undisturbed, 0)
    assert (done.documents, done.errors, done.empty) == (4, 1, 1)
    lengths = [row["tokens"] or 0 for row in read_documents(undisturbed)[:4]]
    assert done.tokens == sum(lengths) > 0


def test_another_machine_is_refused(run, monkeypatch):
    there = shards.describe_machine()
    monkeypatch.setattr(shards, "describe_machine", lambda: there | {"torch instructions": "other"})
    with pytest.raises(shards.RunMismatch, match="this machine has torch instructions 'other', where the run in"):
        ShardWorker(run)


def test_maps_are_whole(undisturbed, loaded):
    from safetensors.torch import load_file

    maps = load_file(undisturbed / "maps" / "000" / "part-000000.safetensors")
    rows = [row for row in read_documents(undisturbed) if row["shard"] == 0 and row["error_type"] is None]
    assert sorted(maps) == [f"{row['row']}.0.atb_ff_res_ln" for row in rows]
    for row in rows:
        assert maps[f"{row['row']}.0.atb_ff_res_ln"].shape == (2, row["tokens"], row["tokens"])
    assert corpora.EVERY_TABLE[-1] == "maps"
