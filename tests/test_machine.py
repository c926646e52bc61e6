"""Which machine this is, where what was measured on it lies, and files that appear whole or not at all."""

import errno
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ffattr import machine
from ffattr.machine import Cache, Replacement, cache_file, name_processor, replacing, sync

fcntl = pytest.importorskip("fcntl") if os.name == "posix" else None

CPU = torch.device("cpu")


def test_a_cpu_is_named_with_its_cores(monkeypatch):
    lines = "processor\t: 0\nmodel name\t: A CPU: 3 GHz\nflags\t: a\n\nprocessor\t: 1\nmodel name\t: A CPU: 3 GHz\n"
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: lines)
    assert name_processor(CPU) == "A CPU: 3 GHz, 2 cores"
    monkeypatch.setattr(Path, "read_text", lambda path: "processor\t: 0\nBogoMIPS\t: 50.00\n")  # as on ARM
    assert name_processor(CPU) == (platform.processor() or platform.machine()) != ""


def test_a_gpu_is_named_by_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert name_processor(torch.device("cuda", 2)) == "GPU 2"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FFATTR_CACHE", str(tmp_path / "own"))
    assert cache_file("rates.json") == tmp_path / "own" / "rates.json"
    monkeypatch.setenv("FFATTR_CACHE", "~/own")
    assert cache_file("rates.json") == tmp_path / "own" / "rates.json"
    monkeypatch.setenv("FFATTR_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_file("rates.json") == tmp_path / "xdg" / "ffattr" / "rates.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file("rates.json") == tmp_path / ".cache" / "ffattr" / "rates.json"


def parse_number(value):
    if not isinstance(value, int):
        raise TypeError(f"no number: {value!r}")
    return value


CACHE = Cache("numbers.json", "ffattr count", parse_number, int)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The file of numbers, in a folder that is not there yet."""
    monkeypatch.setenv("FFATTR_CACHE", str(tmp_path / "new" / "folder"))
    return tmp_path / "new" / "folder" / "numbers.json"


def test_a_cache_is_written_with_its_folders(cache):
    assert CACHE.read() == {}
    assert CACHE.update(lambda known: {**known, "é": 2}) == cache
    assert json.loads(cache.read_text(encoding="utf-8")) == {"é": 2}
    assert CACHE.update(lambda known: {**known, "a": 1}) == cache
    assert CACHE.read() == {"a": 1, "é": 2}
    with pytest.raises(ValueError, match="invalid literal"):
        CACHE.update(lambda known: {"a": "no number"})
    assert CACHE.read() == {"a": 1, "é": 2}
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize(
    "content",
    [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 10**5, b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", b" " * (2**24 + 1)],
    ids=lambda content: str(content[:8]),
)
def test_a_cache_that_cannot_be_read_is_not_there_and_is_written_anew(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match=r"numbers\.json is not what `ffattr count` writes \(.*\): ignored; delete it"):
        assert CACHE.read() == {}
    CACHE.update(lambda known: {**known, "a": 1})
    assert CACHE.read() == {"a": 1}


def test_of_a_cache_only_what_cannot_be_read_is_ignored(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text('{"a": 1, "b": "two", "c": 3}')
    with pytest.warns(UserWarning, match="b: no number: 'two'"):
        assert CACHE.read() == {"a": 1, "c": 3}
    CACHE.update(lambda known: {**known, "d": 4})
    assert json.loads(cache.read_text()) == {"a": 1, "c": 3, "d": 4}


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
def test_a_pipe_in_place_of_a_cache_makes_nobody_wait(cache):
    cache.parent.mkdir(parents=True)
    os.mkfifo(cache)
    with pytest.warns(UserWarning, match="it is a folder, a device or a pipe"):
        assert CACHE.read() == {}
    with pytest.raises(OSError, match="is a device or a pipe"):
        CACHE.update(lambda known: {"a": 1})
    assert cache.is_fifo()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX locks")
def test_writers_at_once_lose_nothing(cache):
    def add(number):
        for step in range(5):
            CACHE.update(lambda known, step=step: {**known, f"{number}.{step}": step})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert CACHE.read() == {f"{number}.{step}": step for number in range(8) for step in range(5)}


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX locks")
def test_a_folder_that_another_process_keeps_is_not_waited_for_without_end(cache, monkeypatch):
    CACHE.update(lambda known: {"a": 1})
    monkeypatch.setattr(machine, "_PATIENCE", 0.05)
    handle = os.open(cache.parent, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(TimeoutError, match="another process has kept"):
            CACHE.update(lambda known: {"a": 2})
    finally:
        os.close(handle)
    assert CACHE.read() == {"a": 1}


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "maps.tar.gz"
    path.write_text("old")
    with replacing(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".gz")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path, error):
    path = tmp_path / "a.json"

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells files by their handles in /proc")
def test_what_is_durable_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    events, path = [], tmp_path / "a.json"
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda one, other: (events.append("rename"), replace(one, other)))
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(Path(os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle))
    )
    with replacing(path, durable=True) as temporary:
        temporary.write_text("new")
    assert events == [temporary, "rename", tmp_path]
    sync(path)
    assert events[3:] == [path]
    with replacing(path):
        pass
    assert events[4:] == ["rename"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.json"
    first, second = Replacement(path), Replacement(path)
    first.temporary.write_text("first")
    second.temporary.write_text("second")
    first.finish()
    second.finish()
    second.discard()  # of what is gone: nothing
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
@pytest.mark.parametrize("mode", [0o600, 0o440, 0o644, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


_WRITER = """
import sys, time
from ffattr.machine import Replacement
replacement = Replacement(sys.argv[1])
print(replacement.temporary, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files")
def test_what_a_killed_process_left_goes_with_the_next_file_and_nothing_of_a_living_one(tmp_path):
    """Nor does anything that is only called alike, nor the file of a process elsewhere, which holds its lock."""
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path / "a.json")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        left, lives = (Path(writer.stdout.readline().strip()) for writer in writers)
        writers[0].kill()
        writers[0].wait()
        elsewhere = left.with_name(left.name.replace(f".{writers[0].pid}.", ".4194304."))  # above any process's number
        shutil.copy(left, elsewhere)
        others = [tmp_path / name for name in (".a.1.partial.json", "a.4194304.0123abcd.partial.json")]
        for other in others:
            other.touch()
        with elsewhere.open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with replacing(tmp_path / "b.json") as own:
                with replacing(tmp_path / "c.json"):
                    assert own.exists()
                assert not left.exists()
            assert sorted(tmp_path.iterdir()) == sorted([lives, elsewhere, *others, *tmp_path.glob("[bc].json")])
        with replacing(tmp_path / "b.json"):
            assert not elsewhere.exists()
        assert lives.exists()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_an_error_names_the_file_that_the_user_knows(tmp_path):
    path = tmp_path / "a.json"

    def fail(error):
        with replacing(path) as temporary:
            raise error(temporary)

    with pytest.raises(OSError, match=r"No space left.*a\.json'$") as caught:
        fail(lambda temporary: OSError(errno.ENOSPC, "No space left on device"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(PermissionError) as caught:
        fail(lambda temporary: PermissionError(errno.EACCES, "Permission denied", str(temporary)))
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught:  # of another file
        fail(lambda temporary: FileNotFoundError(errno.ENOENT, "No such file", "other"))
    assert caught.value.filename == "other"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes and links")
def test_a_link_stays_and_the_mode_is_that_of_a_new_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as temporary:
        temporary.chmod(0o600)
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "plain").touch()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_no_place_for_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, expected the name of a file to write"):
        Replacement(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nowhere'"):
        Replacement(tmp_path / "nowhere" / "a.json")
    with pytest.raises(OSError, match="'/dev/null' is a device or a pipe"):
        Replacement(os.devnull)
    assert list(tmp_path.iterdir()) == []
