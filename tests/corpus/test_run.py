"""The whole way: every row once, the same bytes however the work was shared, errors that say what to do."""

import multiprocessing
import os
import signal
import sys
import time

import filelock
import pytest
from corpora import TEXTS, read_documents, read_tree

from ffattr.corpus import Rank, TooManyErrors, run_corpus
from ffattr.corpus.on_ray import RayActors
from ffattr.corpus.run import Count, count_allowed
from ffattr.corpus.shards import Done, is_done
from ffattr.corpus.supervise import Died, Finished, Progressed


def test_every_row_is_there_once(undisturbed):
    """G1."""
    rows = read_documents(undisturbed)
    assert [row["row"] for row in rows] == list(range(len(TEXTS)))
    assert [row["error_type"] for row in rows] == [None, None, "EmptyText", *[None] * 8]


def test_ranks_share_the_work(compute, undisturbed, tmp_path):
    """G2: two processes that know nothing of each other, in any order."""
    counts = [compute(tmp_path, rank=Rank(number, 2)) for number in (1, 0)]
    assert [count.documents for count in counts] == [4, 7]
    assert read_tree(tmp_path) == read_tree(undisturbed)


def test_a_second_call_finds_it_done(compute, undisturbed, tmp_path):
    heard = []
    first = compute(tmp_path, listen=lambda count: heard.append(count.documents + count.documents_ahead))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("part-*")}
    again = compute(tmp_path)
    assert (again.documents, again.tokens, again.errors, again.before) == (11, first.tokens, 1, 11)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("part-*")}
    assert heard == sorted(heard)
    assert heard[0] == 0
    assert heard[-1] == 11


def compute_and_be_killed(saved_model, corpus_file, folder, options):
    os.setsid()
    run_corpus(saved_model, [corpus_file], folder, **options)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="takes a process that is forked")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_9_at_any_time(compute, undisturbed, tmp_path, saved_model, corpus_file):
    """G2, G3: real kills of the whole group, the later ones later; then the run is finished."""
    options = {"engine": "here", "shard_docs": 4, "batch_tokens": 24}
    options["keep"] = ("documents", "pairs", "tokens", "top:2", "maps")
    done = 0
    for delay in (0.05, 0.3, 0.6, 0.9):
        arguments = (saved_model, corpus_file, tmp_path, options)
        process = multiprocessing.get_context("fork").Process(target=compute_and_be_killed, args=arguments)
        process.start()
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        before, done = done, sum(is_done(tmp_path, number) for number in range(3))
        assert done >= before
    compute(tmp_path)
    assert read_tree(tmp_path) == read_tree(undisturbed)
    assert not list(tmp_path.rglob(".part*"))


def test_two_at_once_are_refused(compute, tmp_path):
    with filelock.FileLock(tmp_path / "_lock-0-of-1"):
        for rank in (None, Rank(1, 2)):
            with pytest.raises(OSError, match=r"another process is at work in .* \(it holds _lock-0-of-1\)"):
                compute(tmp_path, rank=rank)
    with filelock.FileLock(tmp_path / "_lock-1-of-2"):
        compute(tmp_path, rank=Rank(0, 2))


def test_too_many_errors_end_the_run_which_goes_on_with_more(saved_model, tmp_path):
    texts = tmp_path / "t.txt"
    texts.write_text("the cat\n" + "the " * 40 + "\n" + "dog\n\n\n")
    options = {"engine": "here", "shard_docs": 1}
    with pytest.raises(TooManyErrors, match=r"1 of 2 documents have an error, more than max_errors=0 allows \(0\)"):
        run_corpus(saved_model, [str(texts)], tmp_path / "out", max_errors="0", **options)
    found = run_corpus(saved_model, [str(texts)], tmp_path / "out", **options)
    assert (found.documents, found.errors, found.empty, found.before) == (5, 3, 2, 2)
    assert read_documents(tmp_path / "out")[1]["error"] == "42 tokens, expected at most 32"


@pytest.mark.parametrize(
    ("given", "documents", "allowed"),
    [("1%", 5000, 50), ("1%", 100, 10), ("7", 5000, 7), ("0", 9, 0), ("2.5%", 1000, 25)],
)
def test_how_many_errors_are_allowed(given, documents, allowed):
    assert count_allowed(given, documents) == allowed


@pytest.mark.parametrize("given", ["", "some", "-1", "1.5", "nan%"])
def test_what_is_no_number_of_errors(given):
    with pytest.raises(ValueError, match="expected a number of documents or a share such as '1%'"):
        count_allowed(given, 10)


def test_ranks():
    assert Rank.from_text("3/4") == Rank(3, 4)
    for given in ("4/4", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(ValueError, match=r"expected I/N"):
            Rank.from_text(given)


def test_unknown_engines_and_no_workers(compute, tmp_path):
    with pytest.raises(ValueError, match="unknown engine 'spark', expected 'local', 'ray' or 'here'"):
        compute(tmp_path, engine="spark")
    with pytest.raises(ValueError, match="workers is 0, expected at least 1"):
        compute(tmp_path, engine="local", workers=0)


def test_what_is_counted():
    count = Count(10)
    for event in (Progressed(0, 2, 20), Progressed(1, 1, 9), None, Progressed(0, 1, 5)):
        count.take_event(event)
    assert (count.documents, count.documents_ahead, count.tokens_ahead) == (0, 4, 34)
    count.take_event(Died(1, "killed"))
    assert count.documents_ahead == 3
    count.take_event(Finished(0, Done(0, 4, 30, 1, 0)))
    assert (count.documents, count.tokens, count.errors, count.documents_ahead) == (4, 30, 1, 0)


def test_a_model_that_cannot_be_measured_ends_the_run(corpus_file, tmp_path):
    from corpora import save_model

    model = save_model(tmp_path / "model", "bart")
    with pytest.raises(TypeError, match="an encoder and a decoder"):
        run_corpus(str(model), [corpus_file], tmp_path / "out", engine="here")


def test_an_engine_that_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--engine ray needs Ray: pip install 'ffattr\[ray\]'"):
        RayActors(tmp_path, 1, 1)
