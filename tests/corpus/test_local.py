"""Processes on this machine: the same bytes by any number of them, and when they are killed in the middle."""

import os
import signal
import time

import corpora
import psutil
import pytest
from corpora import POISON, read_documents, read_tree

from ffattr.corpus import local
from ffattr.corpus import run as run_module
from ffattr.corpus.local import LocalProcesses, carry_error, count_cores
from ffattr.corpus.supervise import Died, Progressed
from ffattr.errors import BackendUnavailable


@pytest.fixture
def workers(monkeypatch):
    """Makes the engine start workers with another beginning."""

    def set_target(target, slots=1):
        monkeypatch.setattr(
            run_module, "open_engine", lambda name, folder, workers, run: LocalProcesses(folder, slots, target)
        )

    return set_target


def test_two_processes_that_are_killed_in_the_middle_of_everything(compute, undisturbed, tmp_path, workers):
    """G2, G3: SIGKILL while it reads, tokenises, computes and writes."""
    workers(corpora.work_and_die_once, slots=2)
    compute(tmp_path, engine="local")
    died = sorted(path.name for path in tmp_path.glob("_died-*"))
    assert died == ["_died-batch", "_died-read", "_died-tokenise", "_died-write"]
    assert read_tree(tmp_path) == read_tree(undisturbed)


def test_a_document_that_kills_its_process(compute, undisturbed, tmp_path, workers):
    """G4."""
    workers(corpora.work_with_poison)
    deaths = []
    found = compute(tmp_path, engine="local", listen=lambda count: deaths.append(count.documents))
    assert (found.documents, found.errors) == (11, 2)
    rows, whole = read_documents(tmp_path), read_documents(undisturbed)
    assert rows[POISON]["error_type"] == "ProcessDied"
    assert [row["tokens"] for row in rows if row["row"] != POISON] == [r["tokens"] for r in whole if r["row"] != POISON]
    assert {name: content for name, content in read_tree(tmp_path).items() if "000001" not in name} == {
        name: content for name, content in read_tree(undisturbed).items() if "000001" not in name
    }


def test_stopping_is_not_held_against_a_document(compute, tmp_path, undisturbed):
    """G5: Ctrl-C leaves a run that goes on, with nothing in a journal."""

    def interrupt(count):
        if count.documents_ahead:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, engine="local", workers=1, listen=interrupt)
    for path in tmp_path.glob("_journal/*"):
        assert path.read_bytes().strip().splitlines()[-1] == b"done"
    compute(tmp_path)
    assert read_tree(tmp_path) == read_tree(undisturbed)


def test_an_error_of_a_worker_comes_with_its_traceback(tmp_path):
    engine = LocalProcesses(tmp_path / "nowhere", 1)
    try:
        engine.start(0)
        (event,) = engine.wait(300)
    finally:
        engine.stop()
    assert isinstance(event.error, FileNotFoundError)
    assert "holds no run of `ffattr corpus`" in str(event.error)
    assert any("Traceback" in note for note in event.error.__notes__)


def test_an_end_has_a_reason():
    engine = LocalProcesses(None, 1, target=end_by_signal)
    engine.start(0)
    events = []
    while not any(isinstance(event, Died) for event in events):
        events += engine.wait(300)
    engine.stop()
    assert events == [Progressed(0, 1, 1), Died(0, "the process was ended by signal 9 (SIGKILL)")]


def test_a_worker_whose_server_was_killed_is_ended(monkeypatch):
    """Python takes such a process for ended and sends it nothing: this one lets SIGTERM pass."""
    monkeypatch.setattr(local, "_PATIENCE", 0.5)
    engine = LocalProcesses(None, 1, target=stay)
    engine.start(0)
    (event,) = engine.wait(300)
    worker = psutil.Process(event.documents)
    server = worker.parent()
    assert server.pid != os.getpid()
    server.kill()
    psutil.wait_procs([server], timeout=10)
    engine.stop()
    end = time.monotonic() + 10  # its pipe is closed before the system has done with it
    while is_alive(worker):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stay(folder, slot, pipe, gpu):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send(Progressed(slot, os.getpid(), 0))
    time.sleep(600)


def test_processes_that_cannot_be_started_are_said(monkeypatch):
    started = []

    def refuse(process):
        started.append(process)
        raise EOFError("unexpected EOF")

    engine = LocalProcesses(None, 1, target=stay)
    monkeypatch.setattr(engine._context.Process, "start", refuse)
    monkeypatch.setattr(local, "_PAUSE", 0)
    with pytest.raises(RuntimeError, match=r"no worker could be started, 5 times: EOFError: unexpected EOF\. Is there"):
        engine.start(0)
    assert len(started) == 5


def end_by_signal(folder, slot, pipe, gpu):
    pipe.send(Progressed(slot, 1, 1))
    os.kill(os.getpid(), signal.SIGKILL)


def test_errors_that_cannot_be_pickled_are_carried():
    class Odd(Exception):
        pass

    assert isinstance(carry_error(BackendUnavailable("no")), BackendUnavailable)
    assert str(carry_error(Odd("strange"))) == "Odd: strange"
    assert count_cores() >= 1
