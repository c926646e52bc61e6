"""What a run survives: a kill at every write, of every process that it has and of all; a full disk; a second run."""

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from corpora import EVERY_TABLE, TEXTS, kill_this_process, read_tree

from ffattr.corpus import run_corpus
from ffattr.corpus.shards import is_done

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="takes processes that are forked"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

OPTIONS = {"engine": "here", "shard_docs": 4, "batch_tokens": 24, "keep": EVERY_TABLE}
WRITES = 2 + 3 * 5  # the plan, the run, and five tables of three shards


def start(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def compute_until_a_write(saved_model, corpus_file, folder, moment):
    """Kills this process when it is about to make its file number ``moment`` appear."""
    replace, calls = os.replace, []

    def replace_or_die(source, target):
        if len(calls) == moment:
            kill_this_process()
        calls.append(target)
        replace(source, target)

    os.replace = replace_or_die
    run_corpus(saved_model, [corpus_file], folder, **OPTIONS)


def test_a_kill_at_every_write(compute, undisturbed, tmp_path, saved_model, corpus_file):
    """G1, G2, G3."""
    for moment in range(WRITES + 1):
        folder = tmp_path / str(moment)
        process = start(compute_until_a_write, saved_model, corpus_file, folder, moment)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if moment < WRITES else 0)
        assert sum(is_done(folder, number) for number in range(3)) == max(0, moment - 2) // 5
        compute(folder)
        assert read_tree(folder) == read_tree(undisturbed)


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "texts.txt"
    path.write_text("\n".join(TEXTS * 6) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def whole(saved_model, long_file, tmp_path_factory):
    """Returns the folder of a run of the long file that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run_corpus(saved_model, [long_file], folder, **OPTIONS | {"batch_tokens": None})
    return folder


def name_command(saved_model, long_file, folder):
    command = [sys.executable, "-m", "ffattr", "corpus", saved_model, long_file, "-o", str(folder)]
    return [*command, "--workers", "1", "--shard-docs", "4", "--keep", "documents,pairs,tokens,top:2,maps"]


def test_kills_of_the_worker_of_the_first_process_and_of_the_group(saved_model, long_file, whole, tmp_path):
    """G1, G2, G3, by the command: where the worker dies it goes on, where more dies it is called again."""
    folder = tmp_path / "killed"
    command = name_command(saved_model, long_file, folder)
    kinds = iter(["worker", "first process", "group"])
    first, at = None, 0
    while (kind := next(kinds, None)) is not None:
        if first is None:
            first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        at = wait_for_shard(folder, first, at + 3)
        family = psutil.Process(first.pid).children(recursive=True)
        worker = max(family, key=lambda process: process.memory_info().rss)
        if kind == "worker":
            worker.kill()
            continue
        if kind == "group":
            os.killpg(first.pid, signal.SIGKILL)
        else:
            first.kill()
        assert first.wait() == -signal.SIGKILL
        first = None
        assert psutil.wait_procs(family, timeout=60)[1] == []  # nobody goes on alone
        assert count_done(folder) in (at, at + 1, at + 2)  # it ends at once
    run_corpus(saved_model, [long_file], folder, **OPTIONS | {"batch_tokens": None})
    assert read_tree(folder) == read_tree(whole)


def test_kills_of_what_starts_workers(saved_model, long_file, whole, tmp_path):
    """G2, G3: the server that forks workers is killed before it has made the first one and when the worker is at work,
    then what counts resources, then the worker, which takes a new one of both. The command ends as ever."""
    folder = tmp_path / "killed"
    first = subprocess.Popen(
        name_command(saved_model, long_file, folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    killed = wait_for_helper(first, "forkserver")
    killed.kill()  # it imports for seconds
    server = wait_for_helper(first, "forkserver", besides=killed)
    wait_for_shard(folder, first, 1)
    (worker,) = server.children()
    server.kill()
    done = wait_for_shard(folder, first, count_done(folder) + 2)
    wait_for_helper(first, "resource_tracker").kill()
    worker.kill()
    wait_for_shard(folder, first, done + 2)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 3, said  # there are empty documents
    assert "Error" not in said
    assert read_tree(folder) == read_tree(whole)
    assert not list((folder / "_journal").iterdir())


def wait_for_helper(process, name, besides=None):
    """Returns the process of ``multiprocessing`` that has this name and has not ended, another one than ``besides``."""
    while True:
        assert process.poll() is None
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                alive = child != besides and child.status() != psutil.STATUS_ZOMBIE
                if alive and name in " ".join(child.cmdline()):
                    return child
        time.sleep(0.002)


def count_done(folder):
    return len(list(folder.glob("documents/*/part-*")))


def wait_for_shard(folder, process, number):
    """Waits until so many shards are done; returns how many are."""
    while (done := count_done(folder)) < number:
        assert process.poll() is None
        time.sleep(0.002)
    return done


def compute_slowly(saved_model, corpus_file, folder):
    def listen(count):
        if count.documents:
            time.sleep(600)

    run_corpus(saved_model, [corpus_file], folder, listen=listen, **OPTIONS)


def test_two_first_processes(compute, undisturbed, tmp_path, saved_model, corpus_file):
    """The second is refused while the first is alive, and no longer."""
    process = start(compute_slowly, saved_model, corpus_file, tmp_path)
    try:
        while not is_done(tmp_path, 0):
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(OSError, match=r"another process is at work in .* \(it holds _lock-0-of-1\)"):
            compute(tmp_path)
    finally:
        process.kill()
        process.join()
    assert compute(tmp_path).before == 4
    assert read_tree(tmp_path) == read_tree(undisturbed)


def compute_in_small_files(saved_model, corpus_file, folder, most):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        run_corpus(saved_model, [corpus_file], folder, **OPTIONS)
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)


def test_files_that_may_not_grow(compute, undisturbed, tmp_path, saved_model, corpus_file):
    """A write that the system refuses in the middle ends the run, leaves no part of a file, and costs no document."""
    sizes = {path.parent.parent.name: path.stat().st_size for path in undisturbed.glob("*/000/part-000000.*")}
    process = start(compute_in_small_files, saved_model, corpus_file, tmp_path, sizes["documents"] - 100)
    process.join()
    assert process.exitcode == errno.EFBIG
    assert not is_done(tmp_path, 0)
    assert not list(tmp_path.rglob(".*part*"))
    assert (tmp_path / "_run.json").exists()
    assert compute(tmp_path).errors == 1  # the empty one
    assert read_tree(tmp_path) == read_tree(undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 64 KiB, and a function that gives it room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=16m", str(folder)], check=True)
            subprocess.run(["umount", str(folder)], check=True)
            return
    pytest.skip("a small file system cannot be mounted here")


def test_a_full_disk(small_disk, compute, undisturbed):
    """The run ends; where there is room again it goes on."""
    folder, make_room = small_disk
    with pytest.raises(OSError, match="No space left on device"):
        compute(folder)
    done = [number for number in range(3) if is_done(folder, number)]
    assert done in ([], [0])
    assert not [path for path in Path(folder).rglob(".*part*") if path.stat().st_size]
    make_room()
    assert compute(folder).before == 4 * len(done)
    assert read_tree(folder) == read_tree(undisturbed)
