"""Files are written whole or not at all, and what is none is refused."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import safetensors
import torch
from keeping import rewrite_metadata
from paths import environment
from safetensors.torch import save_file
from synthetic import attribution

from ffattr import load
from ffattr.errors import FfattrError, FileFormatError
from ffattr.results import files
from ffattr.results.files import FORMAT_VERSION


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["write", "rename"])
def test_a_save_that_dies_leaves_no_file_and_the_old_one_whole(tmp_path, monkeypatch, error, place):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def half(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise error

    def fail(*_):
        raise error

    monkeypatch.setattr(*((files, "save_file", half) if place == "write" else (os, "replace", fail)))
    with pytest.raises((OSError, KeyboardInterrupt)):
        attribution().save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, sys
from synthetic import attribution
attr = attribution(tokens=100, real=(100,))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    attr.save(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_an_os_error_and_leaves_no_file(tmp_path):
    pytest.importorskip("resource", reason="needs POSIX file size limits")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert "File too large" in result.stdout
    assert str(tmp_path / "a.safetensors") in result.stdout
    assert "a.safetensors" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes, links and pipes")
def test_a_file_has_the_usual_mode_and_special_files_are_left_alone(tmp_path):
    plain, saved = tmp_path / "plain", tmp_path / "a.safetensors"
    plain.touch()
    link = tmp_path / "link"
    link.symlink_to(saved)
    attribution(("atb",)).save(link)
    assert link.is_symlink()
    assert saved.stat().st_mode == plain.stat().st_mode
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is a device or a pipe"):
        attribution(("atb",)).save(pipe)
    assert pipe.is_fifo()


def test_where_a_file_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        attribution().save(tmp_path / "missing" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        attribution().save(tmp_path)


def test_loading_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_loading_a_truncated_file(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    attribution().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match="cut off or damaged"):
        load(path)


def test_loading_something_else(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("hello, this is no safetensors file")
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(FileFormatError, match="not one that ffattr"):
        load(path)
    assert issubclass(FileFormatError, FfattrError)
    assert issubclass(FileFormatError, ValueError)


def test_loading_a_newer_format_says_to_upgrade(tmp_path):
    path = tmp_path / "a.safetensors"
    attribution().save(path)
    rewrite_metadata(path, format_version=str(FORMAT_VERSION + 1))
    with pytest.raises(FileFormatError, match=f"format version {FORMAT_VERSION + 1}, .* upgrade ffattr"):
        load(path)


def _two_files(tmp_path):
    """Files of another size and other numbers; the file that is read, which is the first."""
    names = [tmp_path / name for name in ("one.safetensors", "two.safetensors", "read.safetensors")]
    attribution(("atb",), tokens=5, real=(5, 3), seed=1).save(names[0])
    attribution(("atb", "atb_ff"), tokens=9, real=(9, 4), seed=2).save(names[1])
    shutil.copy(names[0], names[2])
    return names


def _replace(path, other):
    copy = path.with_suffix(".copy")
    shutil.copy(other, copy)
    os.replace(copy, path)


def test_a_file_that_is_replaced_between_its_header_and_its_numbers_is_read_anew(tmp_path, monkeypatch):
    """On systems where an open file has no name of its own."""
    one, two, path = _two_files(tmp_path)
    monkeypatch.setattr(files, "_OPEN_FILES", tmp_path / "nowhere")
    get, left = safetensors.safe_open, [one, two]

    def replace_and_open(*args, **options):
        opened = get(*args, **options)
        if left:
            _replace(path, left.pop())
        return opened

    monkeypatch.setattr(safetensors, "safe_open", replace_and_open)
    assert torch.equal(load(path)["atb"], load(one)["atb"])
    assert left == []
    left += [two, one] * 200
    with pytest.raises(FileFormatError, match=r"was replaced each of the 100 times that it was opened"):
        load(path)


needs_names = pytest.mark.skipif(not files._OPEN_FILES.is_dir(), reason="open files have no names here")


@needs_names
def test_a_file_that_is_replaced_after_it_was_opened_is_the_one_that_was_there(tmp_path, monkeypatch):
    one, two, path = _two_files(tmp_path)
    get = safetensors.safe_open

    def replace_and_open(*args, **options):
        _replace(path, two)
        return get(*args, **options)

    monkeypatch.setattr(safetensors, "safe_open", replace_and_open)
    before = len(os.listdir(files._OPEN_FILES))
    assert torch.equal(load(path)["atb"], load(one)["atb"])
    assert load(path).tokens == load(two).tokens
    assert len(os.listdir(files._OPEN_FILES)) == before


@needs_names
def test_what_is_read_while_others_write_is_one_file_or_the_other(tmp_path):
    one, two, path = _two_files(tmp_path)
    expected = {len(load(file).tokens[0]): load(file)["atb"] for file in (one, two)}
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for file in (two, one):
                _replace(path, file)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = set()
        for _ in range(int(os.environ.get("FFATTR_FUZZ", "300"))):
            found = load(path)
            assert torch.equal(found["atb"], expected[len(found.tokens[0])])
            seen.add(len(found.tokens[0]))
    finally:
        stop.set()
        writer.join()
    assert seen == set(expected)
